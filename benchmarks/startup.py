"""What passes before and around the steps: importing, creating, compiling, Python.

    python -m benchmarks.startup
    python -m benchmarks.startup --only 'compile *' --rounds 3

Each measurement is a process of its own, in turns with what it is compared to:

- import: `import flax_nets` against `import flax.nnx`.
- create: a ResNet-50 with random weights, and with a checkpoint that torch wrote, against
  torchvision's; after the imports.
- python: a call of the training step of `flax_nets.train`, shaped like a ResNet-50's but with a
  single number in each array, against `jax.jit` of the same computation on a list of bare arrays.
- compile: tracing and compiling a network's training step, 8 images, against the same in XLA's own
  operations; and again in a second process, by JAX's persistent cache. Twice, whatever `--rounds`.

`python -m benchmarks.networks --write docs` puts the results into docs/performance.md.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import timing
from benchmarks.timing import Row

RESNET = "resnet50"
CREATE, LOAD, PYTHON = f"create {RESNET}", f"create {RESNET} with a checkpoint", f"python {RESNET}"
# What is allowed: seconds, milliseconds more than the other side, or times the other side.
LIMITS = {
    "import": "1.1 times",
    CREATE: "2 s",
    LOAD: "1 s",
    PYTHON: "1 ms more",
    f"compile {RESNET}": "5 s",
}
COMPILE, AGAIN = "12 s", "2 s"

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
CALL = "from benchmarks import startup; print(startup.{})"


def jobs() -> list[str]:
    from benchmarks import networks

    names = [name for name in networks.jobs() if name != networks.TRANSFORMER]
    return ["import", CREATE, LOAD, PYTHON, *(f"compile {name}" for name in names)]


def measure(job: str, rounds: int) -> Row:
    if job == "import":
        return in_turns(IMPORT.format("flax_nets"), IMPORT.format("flax.nnx"), rounds)
    if job == PYTHON:
        return python_time(rounds)
    with tempfile.TemporaryDirectory() as folder:
        if job in (CREATE, LOAD):
            path = None
            if job == LOAD:
                path = str(pathlib.Path(folder) / "checkpoint.pth")
                timing.python(SAVE.format(name=RESNET, path=path))
            also = "" if path is None else ", convert"
            ours = OURS.format(name=RESNET, path=path, also=also)
            return in_turns(ours, THEIRS.format(name=RESNET, path=path), rounds)
        name = job.removeprefix("compile ")
        both = [CALL.format(f"compile_seconds({name!r}, {form!r})") for form in ("auto", "xla")]
        row = in_turns(*both, min(rounds, 2))
        kept = {"JAX_COMPILATION_CACHE_DIR": folder}
        timing.python(both[0], **kept)
        again = [timing.python(both[0], **kept) for _ in range(min(rounds, 2))]
        return row | {"again": statistics.median(again)}


def in_turns(ours: str, theirs: str, rounds: int) -> Row:
    """Medians of the seconds that two pieces of code print, after one run that does not count."""
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for side, code in (("ours", ours), ("theirs", theirs)):
            found[side].append(timing.python(code))
    return {side: statistics.median(values[1:]) for side, values in found.items()}


def compile_seconds(name: str, form: str) -> float:
    """Of the training step, tracing included."""
    from benchmarks import networks
    from flax_nets.inspect.bench import prepare

    model, batch = networks.ours(name)
    return prepare(model, batch, train=True, form=form).compile_seconds


def python_time(rounds: int) -> Row:
    """The step that does the least for the arrays of a network, called in two ways."""
    import jax
    import jax.numpy as jnp

    import flax_nets
    from flax_nets import train
    from flax_nets.inspect.bench import in_turns

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

    found = in_turns({"ours": run_ours, "theirs": run_bare}, rounds)
    return {side: statistics.median(values) for side, values in found.items()}


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| what | ours | compared to | ratio | limit | second process |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        job = row["job"]
        if "error" in row:
            lines.append(f"| {job} | failed: {row['error']} | | | | |")
            continue
        times = [shown(row[side]) for side in ("ours", "theirs")]
        again = f"{shown(row['again'])} (limit {AGAIN})" if "again" in row else ""
        cells = [job, *times, f"**{row['ours'] / row['theirs']:.2f}**", LIMITS.get(job, COMPILE)]
        lines.append(f"| {' | '.join([*cells, again])} |")
    return "\n".join(lines)


def shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3f} ms"


BENCHMARK = timing.Benchmark("startup", __doc__, jobs, measure, table)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
