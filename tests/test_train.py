"""The training step against PyTorch's, and what a run must survive."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import timm.utils
import torch
import torch.nn.functional as F

import convert
import flax_nets
from benchmarks.compare import error, images, leaves, nchw, state_dict, twin
from flax_nets import registry, train
from flax_nets.train import data
from flax_nets.train.state import TrainState

SGD = dict(lr=1e-3, momentum=0.9, weight_decay=1e-2)
LIMIT = 1e-8
CASES = {  # network -> (what makes it small, images per batch, pixels): one row per family
    "lenet5": ({}, 4, 32),
    "resnet18": (dict(depths=(1, 1, 1, 1)), 4, 64),
}
SMALL = ("resnet20_cifar", dict(depths=(1, 1, 1)), 8, 16)  # with batch norm, and cheap


def make(name, overrides):
    """The twin in PyTorch, and the Flax model with its numbers, in float64."""
    reference = twin(registry.resolve(name).with_arguments(**overrides), dropout=0.0).train()
    return reference, flax_nets.create_model(
        name, weights=state_dict(reference), dropout=0.0, **overrides
    )


def make_batches(model, count, batch, side):
    """Each with images and labels of its own."""
    classes = model.spec.complete["num_classes"]
    for seed in range(count):
        labels = np.random.default_rng(seed).integers(0, classes, batch)
        yield {"image": images(model.spec, batch, side, seed), "label": labels}


def start(model, optimizer, **kwargs):
    apply, params, state = flax_nets.functional(model)
    return apply, TrainState.create(params, state, optimizer, **kwargs)


def torch_loss(model, batch, aux_weight=0.3, **options):
    outputs, labels = (
        leaves(model(torch.tensor(nchw(batch["image"])))),
        torch.tensor(batch["label"]),
    )
    losses = [F.cross_entropy(output, labels, **options) for output in outputs]
    return losses[0] + aux_weight * sum(losses[1:])


def exported(params, state):
    return convert.export(params) | convert.export(state)


def assert_equal(ours, theirs, limit=LIMIT):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert error(ours[name], value) <= limit, name


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_end_where_pytorch_ends(name):
    """Parameters, batch statistics and counters, after momentum and weight decay had their say."""
    overrides, batch, side = CASES[name]
    reference, model = make(name, overrides)
    optimizer = train.sgd(SGD["lr"], SGD["momentum"], weight_decay=SGD["weight_decay"])
    apply, ours = start(model, optimizer)
    step = train.make_train_step(apply, optimizer)
    theirs = torch.optim.SGD(reference.parameters(), **SGD)
    for part in make_batches(model, 10, batch, side):
        ours, metrics = step(ours, part)
        theirs.zero_grad()
        loss = torch_loss(reference, part)
        loss.backward()
        theirs.step()
        assert error(train.summary(metrics)["loss"], loss) <= LIMIT
    assert int(ours.step) == 10
    assert_equal(exported(ours.params, ours.state), state_dict(reference))


def test_accumulation_equals_pytorch_in_parts():
    """With batch norm: each part has its own statistics, and moves the running ones."""
    name, overrides, batch, side = SMALL
    reference, model = make(name, overrides)
    optimizer = train.sgd(SGD["lr"], SGD["momentum"], weight_decay=SGD["weight_decay"])
    apply, ours = start(model, optimizer)
    step = train.make_train_step(apply, optimizer, accumulate=2)
    theirs = torch.optim.SGD(reference.parameters(), **SGD)
    for whole in make_batches(model, 3, batch, side):
        ours, _ = step(ours, whole)
        theirs.zero_grad()
        for i in range(2):
            part = {key: value[i::2] for key, value in whole.items()}
            (torch_loss(reference, part) / 2).backward()
        theirs.step()
    assert_equal(exported(ours.params, ours.state), state_dict(reference), 1e-10)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(parts):
    """Without batch norm, also where a mask leaves the parts unequal."""
    _, model = make("lenet5", {})
    optimizer = train.sgd(0.1, momentum=0.9)
    ends = []
    for accumulate in (1, parts):
        apply, now = start(model, optimizer)
        step = train.make_train_step(apply, optimizer, accumulate=accumulate)
        for batch in make_batches(model, 3, 8, 32):
            batch["mask"] = np.array([1, 1, 0, 1, 0, 1, 0, 0], np.float32)
            now, metrics = step(now, batch)
        ends.append((now.params, metrics))
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        assert error(other, one) <= 1e-10
    assert float(metrics["count"]) == 4


def test_padding_is_no_example():
    _, model = make("lenet5", {})
    optimizer = train.sgd(0.1)
    (batch,) = make_batches(model, 1, 4, 32)
    padded = {key: np.concatenate([value, value[:2]]) for key, value in batch.items()}
    padded["mask"] = np.array([1, 1, 1, 1, 0, 0])
    ends = []
    for part in (batch, padded):
        apply, now = start(model, optimizer)
        ends.append(train.make_train_step(apply, optimizer)(now, part))
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            assert error(other, one) <= 1e-13


def test_label_smoothing():
    reference, model = make("lenet5", {})
    (batch,) = make_batches(model, 1, 8, 32)
    optimizer = train.sgd(0.1)
    apply, now = start(model, optimizer)
    step = train.make_train_step(apply, optimizer, label_smoothing=0.1)
    now, metrics = step(now, batch)
    loss = torch_loss(reference, batch, label_smoothing=0.1)
    loss.backward()
    assert error(train.summary(metrics)["loss"], loss) <= 1e-12
    moved = state_dict(reference)["fc2.bias"] - 0.1 * reference.fc2.bias.grad.numpy()
    assert error(now.params["fc2"]["bias"], moved) <= 1e-12


def test_soft_labels():
    """Probabilities are labels too; right is who finds the likeliest class."""
    _, model = make("lenet5", {})
    (batch,) = make_batches(model, 1, 8, 32)
    optimizer, metrics = train.sgd(0.1), []
    soft = np.eye(10)[batch["label"]]
    for label in (batch["label"], soft):
        apply, now = start(model, optimizer)
        step = train.make_train_step(apply, optimizer)
        metrics.append(step(now, batch | {"label": label})[1])
    for key in ("loss", "correct", "count"):
        assert error(metrics[0][key], metrics[1][key]) <= 1e-13


class Heads(NamedTuple):
    logits: jax.Array
    aux2: jax.Array
    aux1: jax.Array


@pytest.mark.parametrize(("weights", "each"), [(0.3, (0.3, 0.3)), ((0.4, 0.2), (0.4, 0.2))])
def test_auxiliary_heads(weights, each):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(3, 5))) for name in Heads._fields}
    batch = {"image": rng.normal(size=(6, 3)), "label": rng.integers(0, 5, 6)}

    def apply(params, state, x, train=False, rngs=None):
        return Heads(*(x @ params[name] for name in Heads._fields)), state

    def total(params):
        parts = [F.cross_entropy(x @ params[n], labels) for n in Heads._fields]
        return parts[0] + each[0] * parts[1] + each[1] * parts[2]

    x, labels = torch.tensor(batch["image"]), torch.tensor(batch["label"])
    theirs = {n: torch.tensor(np.asarray(v), requires_grad=True) for n, v in params.items()}
    loss = total(theirs)
    loss.backward()
    optimizer = train.sgd(1.0)
    now = TrainState.create(params, {}, optimizer)
    step = train.make_train_step(apply, optimizer, aux_weights=weights)
    now, metrics = step(now, batch)
    assert error(train.summary(metrics)["loss"], loss) <= 1e-13
    for name, value in theirs.items():
        assert error(now.params[name], value - value.grad) <= 1e-13
    with pytest.raises(ValueError, match="aux_weights: got 3 numbers, and the network has 2"):
        train.make_train_step(apply, optimizer, aux_weights=(1, 2, 3))(now, batch)


def test_averages_equal_timms():
    name, overrides, batch, side = SMALL
    reference, model = make(name, overrides)
    optimizer = train.sgd(0.1)
    apply, ours = start(model, optimizer, ema=True)
    step = train.make_train_step(apply, optimizer, ema_decay=0.9)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    average = timm.utils.ModelEmaV3(reference, decay=0.9)
    for part in make_batches(model, 3, batch, side):
        ours, _ = step(ours, part)
        theirs.zero_grad()
        torch_loss(reference, part).backward()
        theirs.step()
        average.update(reference)
    assert_equal(exported(*ours.evaluated), state_dict(average.module))
    with pytest.raises(ValueError, match="ema_decay is None, and the state was created with ema="):
        train.make_train_step(apply, optimizer)(ours, part)


def test_dropout_is_new_in_every_step_and_the_same_in_every_run():
    model = flax_nets.create_model("lenet5", dropout=0.5)
    (batch,) = make_batches(model, 1, 8, 32)
    batch["image"] = batch["image"].astype(np.float32)
    optimizer = train.sgd(0.0)  # nothing but dropout changes the loss
    apply, _ = start(model, optimizer)
    step = train.make_train_step(apply, optimizer)

    def losses(key):
        _, now = start(model, optimizer, key=key)
        found = []
        for _ in range(3):
            now, metrics = step(now, batch)
            found.append(float(metrics["loss"]))
        return found

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert not set(losses(1)) & set(first)
    in_parts = train.make_train_step(apply, optimizer, accumulate=2)
    twice = {key: np.repeat(value[:4], 2, 0) for key, value in batch.items()}
    halves = in_parts(start(model, optimizer)[1], twice)[1]["loss"]
    same = step(start(model, optimizer)[1], {k: v[:4] for k, v in batch.items()})[1]["loss"]
    assert not np.isclose(halves, 2 * same), "both parts had one dropout"


def test_the_state_is_given_away_and_the_model_stays():
    _, model = make("lenet5", {})
    optimizer = train.adam(1e-3)
    apply, now = start(model, optimizer, ema=True)
    (batch,) = make_batches(model, 1, 4, 32)
    after, metrics = train.make_train_step(apply, optimizer, ema_decay=0.5)(now, batch)
    assert now.params["fc1"]["kernel"].is_deleted()
    assert not model.fc1.kernel[...].is_deleted()
    assert all(isinstance(value, jax.Array) for value in metrics.values())
    assert jax.tree.structure(after) == jax.tree.structure(now)


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    name, overrides, batch, side = SMALL
    model = flax_nets.create_model(name, dtype=jnp.bfloat16, **overrides)
    optimizer = train.sgd(0.1, momentum=0.9)
    apply, now = start(model, optimizer)
    step = train.make_train_step(apply, optimizer, accumulate=2)
    for part in make_batches(model, 2, batch, side):
        part["image"] = part["image"].astype(np.float32)
        now, metrics = step(now, part)
    dtypes = {x.dtype for x in jax.tree.leaves((now.params, now.state, now.opt_state))}
    assert dtypes <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert metrics["loss"].dtype == jnp.float32
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("batch_size", [355, 100, 64])
def test_evaluation_counts_each_example_once(batch_size):
    """However large the batches are, and whatever their filling holds."""
    held_out = data.digits("test")
    model = flax_nets.create_model("lenet5", weights=ASSET)
    apply, params, state = flax_nets.functional(model)
    logits = torch.tensor(np.asarray(apply(params, state, held_out.images)[0]))
    labels = torch.tensor(held_out.labels).long()

    def poisoned():
        for batch in data.Batches(held_out, batch_size):
            batch["image"][batch["mask"] == 0] = np.nan
            yield batch

    found = train.evaluate(train.make_eval_step(apply), params, state, poisoned())
    assert found["count"] == 355
    assert found["accuracy"] == (logits.argmax(1) == labels).sum().item() / 355
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


ON_A_MESH = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import flax_nets
from flax_nets import train

model = flax_nets.create_model("resnet20_cifar", depths=(1, 1, 1), param_dtype=np.float64)
optimizer = train.sgd(0.1, momentum=0.9)
apply, params, state = flax_nets.functional(model)
step = train.make_train_step(apply, optimizer, accumulate=2, ema_decay=0.9)
eval_step = train.make_eval_step(apply)
rng = np.random.default_rng(0)
batch = {"image": rng.normal(size=(16, 16, 16, 3)), "label": rng.integers(0, 10, 16)}
ends = []
for mesh in (train.make_mesh(jax.devices()[:1]), train.make_mesh()):
    now = train.replicate(train.TrainState.create(params, state, optimizer, ema=True), mesh)
    part = train.shard(batch, mesh)
    now, metrics = step(now, part)
    now, metrics = step(now, part)
    ends.append((now.params, now.state, now.ema, metrics, eval_step(now.params, now.state, part)))
assert len(part["image"].sharding.device_set) == 4
assert part["image"].addressable_shards[0].data.shape[0] == 4
for one, four in zip(*map(jax.tree.leaves, ends)):
    one, four = np.float64(one), np.float64(four)
    assert np.abs(one - four).max() <= 1e-12 * np.abs(one).max()
try:
    train.shard({"label": np.zeros(6)}, mesh)
except ValueError as error:
    assert "a batch of 6 does not divide among 4 devices" in str(error)
else:
    sys.exit("no error")
"""


def test_four_devices_compute_what_one_does():
    """Batch statistics over the whole batch, gradients summed: nothing in the step knows of it."""
    programs.run(ON_A_MESH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(accumulate=0), "accumulate: got 0"),
        (dict(accumulate=3), "a batch of 4 does not divide into accumulate=3 parts"),
        (dict(ema_decay=1.0), "ema_decay: got 1.0"),
        (dict(ema_decay=0.9), "ema_decay is 0.9, and the state was created with ema=False"),
        (dict(label_smoothing=-0.1), "label_smoothing: got -0.1"),
        (dict(label_smoothing=0.1, loss=train.rbf_loss), "rbf_loss.* knows no smoothing"),
    ],
)
def test_errors_of_the_step(options, message):
    _, model = make("lenet5", {})
    optimizer = train.sgd(0.1)
    apply, now = start(model, optimizer)
    (batch,) = make_batches(model, 1, 4, 32)
    with pytest.raises(ValueError, match=message):
        train.make_train_step(apply, optimizer, **options)(now, batch)


# Data

ROOT = Path(__file__).parent.parent
ASSET = ROOT / "flax_nets" / "assets" / "lenet5_digits.pth"


def test_digits_are_split_by_class_and_exact():
    parts = [data.digits(split, size=8) for split in ("train", "test")]
    assert [len(part) for part in parts] == [1442, 355]
    shares = np.bincount(parts[1].labels) / sum(np.bincount(part.labels) for part in parts)
    assert np.all(np.abs(shares - 0.2) < 0.01)
    seen = [{image.tobytes() for image in part.images} for part in parts]
    assert not seen[0] & seen[1]

    large = data.digits("test", channels=3).images
    assert large.shape == (355, 32, 32, 3)
    assert np.array_equal(large * 512, np.round(large * 512)), "no rounding at 32 pixels"
    small = torch.tensor(nchw(parts[1].images))
    wanted = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    assert np.array_equal(nchw(large)[:, :1], wanted.numpy())


@pytest.mark.parametrize("size", [28, 5, 8, 40])
def test_resize_is_pytorchs_bilinear(size):
    x = np.random.default_rng(0).normal(size=(2, 8, 8))
    wanted = F.interpolate(torch.tensor(x)[:, None], (size, size), mode="bilinear")[:, 0]
    assert error(data.resize(x, size), wanted) <= 1e-14


def numbered(n):
    return data.Dataset(np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), np.arange(n), ())


def test_batches():
    batches = data.Batches(numbered(10), 4, seed=3)
    epoch = list(batches.epoch(1))
    assert len(batches) == len(epoch) == 3
    assert [batch["image"].shape for batch in epoch] == [(4, 1, 1, 1)] * 3
    labels, mask = (np.concatenate([b[key] for b in epoch]) for key in ("label", "mask"))
    assert sorted(labels[mask == 1]) == list(range(10))
    assert mask.sum() == 10
    assert np.array_equal([b["image"].ravel() for b in epoch], [b["label"] for b in epoch])

    def order(**kwargs):
        batches = data.Batches(numbered(10), 4, **({"seed": 3} | kwargs))
        return [b["label"].tolist() for b in batches.epoch(1)]

    assert order() == [b["label"].tolist() for b in epoch], "a function of seed and epoch"
    assert order() != order(seed=4)
    assert order() != [b["label"].tolist() for b in batches.epoch(2)]
    assert order(drop_last=True) == order()[:2]
    assert order(seed=None)[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_batches_resume_anywhere():
    batches = data.Batches(data.digits("train"), 500, seed=0, augment=data.shift(3))
    whole = list(batches.epoch(5))
    for start in (1, 2):
        for one, other in zip(whole[start:], batches.epoch(5, start), strict=True):
            assert all(np.array_equal(one[key], other[key]) for key in one)


def test_shift_moves_images_within_bounds():
    images = np.full((50, 9, 9, 1), -1.0)
    images[:, 4, 4] = 1
    moved = data.shift(2)(images, np.random.default_rng(0))
    rows, columns = np.nonzero(moved[..., 0] == 1)[1:]
    assert len(rows) == 50
    assert set(rows) == set(columns) == {2, 3, 4, 5, 6}
    assert len(set(zip(rows, columns, strict=True))) > 10, "both ways, each image by itself"
    assert moved.min() == -1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.digits("validation"), "split: got 'validation'"),
        (lambda: data.digits("test", size=0), "got size=0"),
        (lambda: data.Batches(numbered(3), 0), "batch size: got 0"),
        (lambda: data.Batches(numbered(3), 4, drop_last=True), "only 3 examples"),
        (lambda: data.Batches(numbered(3), 2, augment=data.shift(1)), "seed: got None"),
        (lambda: data.shift(-1), "shift: got -1"),
    ],
)
def test_errors_of_data(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Checkpoints and whole runs


def tree(value):
    return {"a": jnp.full((3, 4), value), "key": jax.random.key(value), "none": None}


def test_checkpoints_are_the_last_ones_and_exact(tmp_path):
    with_two = train.Checkpoints(tmp_path, keep=2)
    assert with_two.restore(tree(0)) is None
    for step in (1, 2, 3):
        with_two.save(step, tree(step))
    with_two.close()
    again = train.Checkpoints(tmp_path, keep=2)
    assert again.steps() == [2, 3]
    step, found = again.restore(tree(0))
    assert step == 3
    assert np.array_equal(found["a"], tree(3)["a"])
    assert found["key"] == tree(3)["key"]
    for like in (tree(0) | {"a": jnp.zeros((3, 5))}, tree(0) | {"b": jnp.zeros(())}):
        with pytest.raises(ValueError, match=r"another network or optimizer: .*\['[ab]'\]"):
            again.restore(like)
    again.close()


@pytest.mark.parametrize("damage", ["no list", "cut short", "a bit", "lost"])
def test_a_torn_checkpoint_is_passed_over(tmp_path, caplog, damage):
    checkpoints = train.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree(step))
    checkpoints.wait()
    largest = max(
        (p for p in (tmp_path / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = largest.read_bytes()
    if damage == "no list":  # killed in between
        (tmp_path / "2.json").unlink()
    elif damage == "cut short":
        largest.write_bytes(content[:-1])
    elif damage == "a bit":
        largest.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        shutil.rmtree(largest.parent)
    step, found = checkpoints.restore(tree(0))
    assert step == 1
    assert np.array_equal(found["a"], tree(1)["a"])
    assert "2 is torn" in caplog.text
    checkpoints.save(2, tree(5))
    assert np.array_equal(checkpoints.restore(tree(0))[1]["a"], tree(5)["a"])
    for list_of_files in tmp_path.glob("*.json"):
        list_of_files.unlink()
    with pytest.raises(ValueError, match=r"every checkpoint there \(\[1, 2\]\) is torn"):
        checkpoints.restore(tree(0))
    checkpoints.close()


RUN = """
import os, signal, sys
from flax_nets import cli
from flax_nets.train import checkpoint

moment, *outs = sys.argv[1:]
write_text = checkpoint.write_text

def write(path, text):
    if path.name == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    write_text(path, text)

checkpoint.write_text = write
for out in outs:
    code = cli.main([
        "train", "--model", "lenet5", "--out", out, "--resume", "--epochs", "2", "--quiet",
        "--batch-size", "128", "--dropout", "0.3", "--ema-decay", "0.9", "--warmup-epochs", "1",
        "--shift", "2", "--checkpoint-every", "4",
    ])
    assert code == 0
"""


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    """Killed within an epoch, when a checkpoint was written but did not count yet."""

    def run(moment, *outs):
        command = [sys.executable, "-W", "error", "-c", RUN, moment, *map(str, outs)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert run("15.json", killed).returncode == -signal.SIGKILL
    left = {path.name for path in (killed / "checkpoints").iterdir()}
    assert "11.json" in left
    assert "15.new" in left
    assert "15" not in left
    done = run("never", killed, whole)
    assert done.returncode == 0, done.stderr
    assert not list((killed / "checkpoints").glob("*.new*"))
    weights, rows = [], []
    for out in (killed, whole):
        weights.append((out / "weights.safetensors").read_bytes())
        lines = (out / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "images_per_second")
        rows.append([{k: v for k, v in json.loads(r).items() if k not in timed} for r in lines])
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[0]] == [1, 2]
    assert weights[0] == weights[1]
    assert (killed / "curves.png").read_bytes()[:4] == b"\x89PNG"


def fit(out, lr, **kwargs):
    model = flax_nets.create_model("lenet5")
    part = data.digits("train")
    part = data.Dataset(part.images[:256], part.labels[:256], part.classes)
    batches = data.Batches(part, 64, seed=0, drop_last=True)
    rows = train.fit(
        model,
        batches,
        data.Batches(part, 100),
        train.sgd(lr, 0.9),
        out=out,
        progress=False,
        **kwargs,
    )
    return model, rows


def test_fit_compiles_each_step_once(tmp_path, caplog):
    with jax.log_compiles():
        fit(None, 0.05, epochs=2)
    done = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert len([text for text in done if "jit(step)" in text]) == 2  # training, evaluation


def test_fit_trains_the_model_and_goes_on(tmp_path):
    model, rows = fit(tmp_path, 0.05, epochs=2)
    assert rows[1]["test_loss"] < rows[0]["test_loss"]
    assert [row["step"] for row in rows] == [4, 8]
    apply, params, state = flax_nets.functional(model)
    part = data.digits("train")
    logits = np.asarray(apply(params, state, part.images[:256])[0])
    assert np.mean(logits.argmax(1) == part.labels[:256]) == rows[1]["test_accuracy"]

    with pytest.raises(ValueError, match="holds a run of 8 steps already: resume it"):
        fit(tmp_path, 0.05, epochs=2)
    longer, more = fit(tmp_path, 0.05, epochs=3, resume=True)
    assert more[:2] == rows
    assert more[2]["step"] == 12
    again, same = fit(tmp_path, 0.05, epochs=3, resume=True)  # nothing left to do
    assert same == more
    assert np.array_equal(again.fc1.kernel[...], longer.fc1.kernel[...])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"loss is NaN or infinite at step 2 \(batch 2 of epoch 1\): lower .*no checkpoint"),
        (dict(steps_per_call=3), r"loss is NaN or infinite at step 2 \(batch 2 of epoch 1\)"),
        (dict(checkpoint_every=1), r"a parameter is NaN or infinite at step 1 \(batch 1 of"),
    ],
)
def test_a_run_that_diverges_stops_and_saves_nothing(tmp_path, options, message):
    with pytest.raises(train.Diverged, match=message):
        fit(tmp_path, np.inf, epochs=2, **options)
    assert not list((tmp_path / "checkpoints").iterdir())
