"""What tests/test_scale.py starts: `python -m tests.scale WHAT FOLDER [HOST PORT]`."""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

import flax_nets
from flax_nets import train
from flax_nets.train import data, loop

STEPS, BATCH = 20, 16
TINY = dict(depths=(1,), widths=(8,))
EXAMPLES = 21  # held out: they divide among nothing


def batches():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(STEPS, BATCH, 8, 8, 3))
    return {"image": images, "label": rng.integers(0, 10, (STEPS, BATCH))}


def held_out():
    rng = np.random.default_rng(1)
    return {
        "image": rng.normal(size=(EXAMPLES, 8, 8, 3)),
        "label": rng.integers(0, 10, EXAMPLES),
    }


def pieces(**options):
    """A tiny network with batch norm: (apply, step, the state before the first step)."""
    model = flax_nets.create_model("resnet20_cifar", param_dtype=np.float64, **TINY)
    optimizer = train.sgd(0.05, momentum=0.9, weight_decay=1e-3)
    apply, params, state = flax_nets.functional(model)
    step = train.make_train_step(apply, optimizer, ema_decay=0.9, **options)
    return apply, step, train.TrainState.create(params, state, optimizer, ema=True)


def rows(batch, host, hosts):
    """A host's share of a batch [N, ...]."""
    size = len(batch["label"]) // hosts
    return {name: x[host * size : (host + 1) * size] for name, x in batch.items()}


def run(mesh, host=0, hosts=1, **options):
    """The end of STEPS steps on a mesh, and the layout before and after them."""
    apply, step, first = pieces(**options)
    now = train.shard_state(first, mesh, smallest=64)
    before = jax.tree.map(lambda x: x.sharding, now)
    for i in range(STEPS):
        batch = {name: x[i] for name, x in batches().items()}
        now, metrics = step(now, train.shard(rows(batch, host, hosts), mesh))
    after = jax.tree.map(lambda x: x.sharding, now)
    assert jax.tree.all(
        jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), before, after, now)
    )
    return apply, now, metrics


def numbers(now, metrics):
    """What two runs must agree on."""
    return {"params": now.params, "state": now.state, "ema": now.ema, "metrics": metrics}


def save(path, tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(path, **{jax.tree_util.keystr(key): np.asarray(x) for key, x in flat})


def eight_devices(folder):
    """One device, eight, four by two; and batch norm for each device."""
    devices = jax.devices()
    assert len(devices) == 8
    meshes = {
        "one": train.make_mesh(devices[:1]),
        "eight": train.make_mesh(),
        "fsdp": train.make_mesh(data=4, fsdp=2),
    }
    for name, mesh in meshes.items():
        _, now, metrics = run(mesh)
        if name == "fsdp":
            for tree in (now.params, now.ema["params"], now.opt_state[1].trace):
                kernel = tree["layer1"]["0"]["conv1"]["kernel"]
                assert kernel.shape == (3, 3, 8, 8)
                assert {s.data.shape for s in kernel.addressable_shards} == {(3, 3, 4, 8)}
            assert now.params["bn1"]["scale"].sharding.is_fully_replicated
        save(folder / f"{name}.npz", numbers(now, metrics))
    for name in ("one", "eight"):
        _, now, metrics = run(meshes[name], batch_norm_groups=8)
        save(folder / f"{name}_grouped.npz", numbers(now, metrics))


def two_hosts(folder, host):
    """Two devices each; what is large is split between them, and the one checkpoint too."""
    mesh = train.make_mesh(data=2, fsdp=2)
    apply, now, metrics = run(mesh, host, 2)
    checkpoints = train.Checkpoints(folder / "checkpoints")
    checkpoints.save(STEPS, now)
    whole = train.replicate(numbers(now, metrics), mesh)
    figures = train.evaluate(
        train.make_eval_step(apply), now.params, now.state, _Uneven(host), mesh
    )
    checkpoints.close()
    if host == 0:
        save(folder / "hosts.npz", whole | {"figures": figures})


class _Uneven:
    """One host has 16 examples in three batches, the other 5 in two."""

    def __init__(self, host):
        self.cuts = [(0, 7), (7, 14), (14, 16)] if host == 0 else [(16, 20), (20, 21)]

    def __len__(self):
        return len(self.cuts)

    def __iter__(self):
        for begin, end in self.cuts:
            yield {name: x[begin:end] for name, x in held_out().items()}


def fit(out):
    """40 steps on the digits; the network's numbers in the end."""
    images = data.digits("train", size=8, channels=3)
    some = data.Dataset(images.images[:240].astype(np.float64), images.labels[:240], ())
    model = flax_nets.create_model("resnet20_cifar", param_dtype=np.float64, dropout=0.2, **TINY)
    batches = data.Batches(some, 12, seed=0, drop_last=True)
    optimizer, options = train.sgd(0.05, momentum=0.9), dict(resume=True, progress=False)
    train.fit(model, batches, data.Batches(some, 26), optimizer, 2, out=out, **options)
    return flax_nets.functional(model)[1:]


def told_to_go(out, host):
    """The second host gets SIGTERM at its fourth step: both save, and leave."""
    shard, count = loop.shard, 0

    def watched(batch, mesh, stacked=False):
        nonlocal count
        count += 1
        if count == 4 and host == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return shard(batch, mesh, stacked)

    loop.shard = watched
    fit(out)


def main():
    what, folder, *rest = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    jax.config.update("jax_enable_x64", True)
    if what == "eight":
        eight_devices(folder)
    elif what == "hosts":
        host, port = map(int, rest)
        jax.distributed.initialize(f"localhost:{port}", 2, host)
        two_hosts(folder, host)
        told_to_go(folder / "run", host)
    else:
        for name in ("run", "undisturbed"):
            save(folder / f"{name}.npz", fit(folder / name))


if __name__ == "__main__":
    main()
