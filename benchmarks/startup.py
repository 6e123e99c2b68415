"""What passes before and around the steps: importing, creating, Python.

    python -m benchmarks.startup
    python -m benchmarks.startup --only import 'create *' --rounds 3

Each measurement is a process of its own, in turns with what it is compared to:

- import: `import flax_nets` against `import flax.nnx`.
- create: a ResNet-50 with random weights, and with a checkpoint that torch wrote, against
  torchvision's; after the imports.
- python: a call of the training step of `flax_nets.train`, shaped like a ResNet-50's but with a
  single number in each array, against `jax.jit` of the same computation on a list of bare arrays.

Compiling has `benchmarks.compile`. `python -m benchmarks.networks --write docs` puts the results
into docs/performance.md.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import timing
from benchmarks.timing import Row, in_turns, shown

RESNET = "resnet50"
CREATE, LOAD, PYTHON = f"create {RESNET}", f"create {RESNET} with a checkpoint", f"python {RESNET}"
# What is allowed: seconds, milliseconds more than the other side, or times the other side.
LIMITS = {
    "import": "1.1 times",
    CREATE: "2 s",
    LOAD: "1 s",
    PYTHON: "1 ms more",
}

IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
OURS = """
import jax, flax_nets, time{also}
jax.numpy.zeros(1).block_until_ready()
t = time.perf_counter()
model = flax_nets.create_model({name!r}, weights={path!r})
jax.block_until_ready(jax.tree.leaves(model))
print(time.perf_counter() - t)
"""
THEIRS = """
import torch, torchvision, time
t = time.perf_counter()
model = torchvision.models.get_model({name!r})
if {path!r}:
    model.load_state_dict(torch.load({path!r}, mmap=True, weights_only=True))
print(time.perf_counter() - t)
"""
SAVE = """
import torch, torchvision
torch.save(torchvision.models.get_model({name!r}).state_dict(), {path!r})
print(0)
"""


def jobs() -> list[str]:
    return ["import", CREATE, LOAD, PYTHON]


def measure(job: str, rounds: int) -> Row:
    if job == "import":
        return in_turns(IMPORT.format("flax_nets"), IMPORT.format("flax.nnx"), rounds)
    if job == PYTHON:
        return python_time(rounds)
    with tempfile.TemporaryDirectory() as folder:
        path = None
        if job == LOAD:
            path = str(pathlib.Path(folder) / "checkpoint.pth")
            timing.python(SAVE.format(name=RESNET, path=path))
        also = "" if path is None else ", convert"
        ours = OURS.format(name=RESNET, path=path, also=also)
        return in_turns(ours, THEIRS.format(name=RESNET, path=path), rounds)


def python_time(rounds: int) -> Row:
    """The step that does the least for the arrays of a network, called in two ways."""
    import jax
    import jax.numpy as jnp

    import flax_nets
    from flax_nets import train
    from flax_nets.inspect import bench

    _, params, state = flax_nets.functional(flax_nets.create_model(RESNET))
    params, state = jax.tree.map(lambda v: jnp.zeros(1, v.dtype), (params, state))

    def apply(params: Any, state: Any, x: Any, train: bool = False, rngs: Any = None) -> Any:
        return sum(jax.tree.leaves(params)) * x, state

    optimizer = train.sgd(1e-3, momentum=0.9)
    step = train.make_train_step(apply, optimizer)
    batch = {"image": jnp.ones((8, 10)), "label": jnp.zeros(8, jnp.int32)}
    held = train.TrainState.create(params, state, optimizer)
    leaves, structure = jax.tree.flatten(train.TrainState.create(params, state, optimizer))

    def flat(leaves: list[Any], batch: Any) -> Any:
        new, metrics = step(jax.tree.unflatten(structure, leaves), batch)
        return jax.tree.leaves(new), metrics

    bare = jax.jit(flat, donate_argnums=0)

    def run_ours() -> None:
        nonlocal held
        held, metrics = step(held, batch)
        jax.block_until_ready(metrics)

    def run_bare() -> None:
        nonlocal leaves
        leaves, metrics = bare(leaves, batch)
        jax.block_until_ready(metrics)

    found = bench.in_turns({"ours": run_ours, "theirs": run_bare}, rounds)
    return {side: statistics.median(values) for side, values in found.items()}


def table(rows: Sequence[Row]) -> str:
    """Markdown."""

    def cells(row: Row) -> list[str]:
        ratio = f"**{row['ours'] / row['theirs']:.2f}**"
        return [shown(row["ours"]), shown(row["theirs"]), ratio, LIMITS[row["job"]]]

    return timing.markdown(["what", "ours", "compared to", "ratio", "limit"], rows, cells)


BENCHMARK = timing.Benchmark("startup", __doc__, jobs, measure, table)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
