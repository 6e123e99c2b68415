"""One device, many, several hosts: the same numbers; and what a run survives."""

import contextlib
import copy
import gc
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import flax_nets
from benchmarks.compare import error, state_dict
from flax_nets import train
from tests import scale
from tests.test_train import assert_equal, exported, make, make_batches, start, torch_loss
from tests.test_train import tree as small_tree

ROOT = Path(__file__).parent.parent
LIMIT = 1e-10
SMALL = ("resnet20_cifar", scale.TINY, 8, 8)


def begin(devices, *args):
    """A process of tests/scale.py with so many simulated devices."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-W", "error", "-m", "tests.scale", *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """After 20 steps: name of the mesh -> all numbers."""
    folder = tmp_path_factory.mktemp("ends")
    eight = begin(8, "eight", folder)
    _, errors = eight.communicate(timeout=600)
    assert eight.returncode == 0, errors
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


def assert_same(one, other):
    assert set(one) == set(other)
    for name, value in one.items():
        assert error(other[name], value) <= LIMIT, name


@pytest.mark.parametrize(
    ("name", "single"), [("eight", "one"), ("fsdp", "one"), ("eight_grouped", "one_grouped")]
)
def test_eight_devices_compute_what_one_does(ends, name, single):
    assert_same(ends[single], ends[name])


def test_batch_norm_groups_are_something_else(ends):
    kernel = "['params']['conv1']['kernel']"
    assert error(ends["one_grouped"][kernel], ends["one"][kernel]) > 1e-3


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two processes of two devices each: (their folder, standard errors)."""
    folder = tmp_path_factory.mktemp("hosts")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [begin(2, "hosts", folder, host, port) for host in range(2)]
    try:
        errors = [host.communicate(timeout=600)[1] for host in both]
    finally:
        for host in both:
            host.kill()
    assert [host.returncode for host in both] == [train.Preempted.CODE] * 2, errors
    return folder, errors


def test_two_hosts_compute_what_one_does(ends, hosts):
    """With an fsdp axis across them, a checkpoint from both, and evaluation of uneven shares."""
    folder, _ = hosts
    found = dict(np.load(folder / "hosts.npz"))
    figures = {name: found.pop(f"['figures']['{name}']") for name in ("loss", "accuracy", "count")}
    assert_same(ends["one"], found)

    checkpoints = train.Checkpoints(folder / "checkpoints")
    apply, _, like = scale.pieces()
    step, kept = checkpoints.restore(like)
    checkpoints.close()
    assert (step, int(kept.step)) == (scale.STEPS, scale.STEPS)
    flat = jax.tree_util.tree_leaves_with_path({"params": kept.params, "ema": kept.ema})
    for path, value in flat:
        assert np.array_equal(value, found[jax.tree_util.keystr(path)])

    # One host, in one batch: each of the 21 examples counted once.
    alone = train.evaluate(
        train.make_eval_step(apply), kept.params, kept.state, [scale.held_out()], train.make_mesh()
    )
    assert figures["count"] == alone["count"] == scale.EXAMPLES
    for name, value in alone.items():
        assert error(figures[name], value) <= LIMIT


def test_two_hosts_are_told_to_go_and_one_goes_on(hosts):
    """SIGTERM reaches one of them; both save the same step. The end is that of one host."""
    folder, errors = hosts
    saved = {int(p.stem) for p in (folder / "run" / "checkpoints").glob("*.json")}
    steps = [re.search(r"stopped by SIGTERM after step (\d+), saved in", text) for text in errors]
    (step,) = {int(found[1]) for found in steps if found}
    assert None not in steps and 4 <= step < 40 and step in saved
    resumed = begin(1, "fit", folder)
    assert resumed.communicate(timeout=600) == ("", "")
    assert_same(*(dict(np.load(folder / f"{name}.npz")) for name in ("undisturbed", "run")))


def test_batch_norm_groups_equal_pytorch():
    """As so many devices: each its own statistics, gradients and running statistics averaged."""
    name, overrides, batch, side = SMALL
    reference, model = make(name, overrides)
    optimizer = train.sgd(0.1)
    apply, ours = start(model, optimizer)
    step = train.make_train_step(apply, optimizer, batch_norm_groups=2)
    (whole,) = make_batches(model, 1, batch, side)
    ours, metrics = step(ours, whole)
    devices = [copy.deepcopy(reference) for _ in range(2)]
    losses = []
    for i, device in enumerate(devices):
        part = {key: np.split(value, 2)[i] for key, value in whole.items()}
        losses.append(torch_loss(device, part) / 2)
        losses[-1].backward()
    with torch.no_grad():
        for mine, *theirs in zip(*(m.parameters() for m in (reference, *devices)), strict=True):
            mine -= 0.1 * sum(p.grad for p in theirs)
        for mine, *theirs in zip(*(m.buffers() for m in (reference, *devices)), strict=True):
            mine.copy_(sum(theirs) / 2)
    assert error(train.summary(metrics)["loss"], sum(losses)) <= 1e-12
    assert_equal(exported(ours.params, ours.state), state_dict(reference), LIMIT)


def test_many_steps_in_one_call():
    name, overrides, batch, side = SMALL
    _, model = make(name, overrides)
    optimizer = train.adamw(1e-3)
    apply, one = start(model, optimizer)
    _, many = start(model, optimizer)
    parts = list(make_batches(model, 3, batch, side))
    step = train.make_train_step(apply, optimizer)
    sums = []
    for part in parts:
        one, metrics = step(one, part)
        sums.append(metrics)
    stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
    many, metrics = train.make_train_step(apply, optimizer, scan=True)(many, stacked)
    assert metrics["loss"].shape == (3,)
    for a, b in zip(
        *map(jax.tree.leaves, ((one.params, one.state), (many.params, many.state))), strict=True
    ):
        assert error(b, a) <= 1e-12
    assert (
        error(train.summary(metrics)["loss"], np.mean([m["loss"] for m in sums]) / batch) <= 1e-12
    )
    assert train.summary(metrics)["count"] == 3 * batch


def test_loss_scale_equals_pytorchs():
    """An overflow skips the step and halves the scale; good steps double it."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(3, 5))
    # The fourth and fifth overflow once scaled: 1e307 * 2**16.
    batches = [
        {"image": rng.normal(size=(4, 3)) * size, "label": rng.integers(0, 5, 4)}
        for size in (1, 1, 1, 1e305, 1e305, 1, 1, 1)
    ]

    def apply(params, state, x, train=False, rngs=None):
        return 1e-300 * (x @ params["w"]), state

    def loss(logits, labels, weights=None, reduction="sum"):
        return jnp.sum(logits * jax.nn.one_hot(labels, 5)) * 1e300

    def told(params):
        return [float(params.scale.value), np.asarray(params.params["w"])]

    optimizer = train.sgd(0.1, momentum=0.9)
    scale = train.LossScale.create(2.0**16, interval=2)
    now = train.TrainState.create({"w": jnp.asarray(first)}, {}, optimizer, scale=scale)
    step = train.make_train_step(apply, optimizer, loss=loss)
    theirs = torch.tensor(first, requires_grad=True)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    for batch in batches:
        now, _ = step(now, batch)
        x, labels = torch.tensor(batch["image"]), torch.tensor(batch["label"])
        logits = 1e-300 * (x @ theirs)
        sgd.zero_grad()
        value = 1e300 * logits.gather(1, labels[:, None]).sum() / 4
        scaler.scale(value).backward()
        scaler.step(sgd)
        scaler.update()
        value, w = told(now)
        assert value == scaler.get_scale()
        assert error(w, theirs.detach().numpy()) <= 1e-12
    assert int(now.step) == len(batches)


def test_float16_trains_with_a_scale():
    """Too large a scale comes down; parameters, statistics and the loss stay in float32."""
    model = flax_nets.create_model("resnet20_cifar", dtype=jnp.float16, **scale.TINY)
    optimizer = train.sgd(0.05, momentum=0.9)
    apply, params, state = flax_nets.functional(model)
    now = train.TrainState.create(params, state, optimizer, scale=train.LossScale.create(2.0**30))
    step = train.make_train_step(apply, optimizer)
    batch = {name: x[0] for name, x in scale.batches().items()}
    batch["image"] = batch["image"].astype(np.float32)
    losses = []
    for _ in range(50):
        now, metrics = step(now, batch)
        losses.append(float(metrics["loss"]))
    assert 1 <= float(now.scale.value) <= 2.0**20
    assert losses[0] == losses[1], "skipped"
    assert losses[-1] < 0.9 * losses[0]
    kept = jax.tree.leaves((now.params, now.state, now.opt_state, metrics))
    assert {x.dtype for x in kept} <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_evaluation_on_a_mesh_counts_each_example_once():
    """Batches of any size, whatever stands in the filling."""
    apply, _, now = scale.pieces()
    step, whole = train.make_eval_step(apply), scale.held_out()
    parts = [{name: x[a:b] for name, x in whole.items()} for a, b in ((0, 9), (9, 18), (18, 21))]
    alone = train.evaluate(step, now.params, now.state, [whole])
    found = train.evaluate(step, now.params, now.state, iter(parts), train.make_mesh())
    assert found["count"] == alone["count"] == scale.EXAMPLES
    for name, value in alone.items():
        assert error(found[name], value) <= 1e-12
    with pytest.raises(ValueError, match="a batch of 9, and there is room for 3"):
        train.evaluate(step, now.params, now.state, parts[::-1], train.make_mesh())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train.make_mesh(data=2), r"a mesh of data=2 by fsdp=1, and 1 devices"),
        (lambda: train.make_mesh(fsdp=0), r"a mesh of data=1 by fsdp=0"),
        (lambda: train.LossScale.create(0.0), "loss scale: got 0.0"),
        (lambda: train.make_train_step(None, None, batch_norm_groups=0), "batch_norm_groups: got"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_best_checkpoints_stay(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, keep=2)
    assert checkpoints.best() is None
    for step, score in enumerate([0.1, 0.9, 0.3, None, 0.2], 1):
        checkpoints.save(step, small_tree(step), score)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["2.json", "4.json", "5.json"]
    assert checkpoints.best() == 2
    assert np.array_equal(checkpoints.restore(small_tree(0), 2)[1]["a"], small_tree(2)["a"])
    checkpoints.close()


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond a kilobyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_costs_one_checkpoint(tmp_path, monkeypatch):
    # Orbax's own thread and its futures complain too, besides the error that we get.
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)

    def large(value):
        return small_tree(value) | {
            "w": jnp.asarray(np.random.default_rng(value).normal(size=5000))
        }

    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, large(1))
    checkpoints.wait()
    with (
        full_disk(),
        pytest.raises(OSError, match=r"2 could not be written; the last good one is .*1:"),
    ):
        checkpoints.save(2, large(2))
        checkpoints.wait()
    assert not list(tmp_path.glob("*.new*"))
    step, found = checkpoints.restore(large(0))
    assert step == 1
    assert np.array_equal(found["w"], large(1)["w"])
    checkpoints.save(2, large(3))
    assert np.array_equal(checkpoints.restore(large(0))[1]["w"], large(3)["w"])
    checkpoints.close()
    gc.collect()  # here, where complaints are expected


def test_killed_at_random_moments_the_end_is_the_same():
    """SIGKILL, SIGTERM, and a damaged newest checkpoint."""
    command = [sys.executable, "-m", "benchmarks.kill", "--count", "1", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills, 1 of 1 runs ended bit-identical" in done.stdout
