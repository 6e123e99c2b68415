"""Tracing and compiling a network's training step, and again in a second process.

    python -m benchmarks.compile
    python -m benchmarks.compile --only resnet50 'mobilenet*'

Each measurement is a process of its own: our network's step, 8 images, in turns with the same in
XLA's own operations; then once more by JAX's persistent cache, tracing and reading included. Twice,
whatever `--rounds`. `python -m benchmarks.networks --write docs` puts the results into
docs/performance.md.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import timing
from benchmarks.timing import Row, in_turns, shown

LIMIT, AGAIN = 12, 2  # seconds
LIMITS = {"resnet50": 5}
CALL = "from benchmarks import compile; print(compile.seconds({!r}, {!r}))"


def jobs() -> list[str]:
    from benchmarks import networks

    return [name for name in networks.jobs() if name != networks.TRANSFORMER]


def measure(job: str, rounds: int) -> Row:
    rounds = min(rounds, 2)
    ours, plain = (CALL.format(job, form) for form in ("auto", "xla"))
    with tempfile.TemporaryDirectory() as folder:
        kept = {"JAX_COMPILATION_CACHE_DIR": folder}
        timing.python(ours, **kept)
        again = [timing.python(ours, **kept) for _ in range(rounds)]
    return in_turns(ours, plain, rounds) | {"again": statistics.median(again)}


def seconds(name: str, form: str) -> float:
    """Of the training step, tracing included."""
    from benchmarks import networks
    from flax_nets.inspect.bench import prepare

    model, batch = networks.ours(name)
    return prepare(model, batch, train=True, form=form).compile_seconds


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    again = f"second process, limit {AGAIN} s"

    def cells(row: Row) -> list[str]:
        limit, ratio = LIMITS.get(row["job"], LIMIT), row["ours"] / row["theirs"]
        ours, theirs, kept = (shown(row[side]) for side in ("ours", "theirs", "again"))
        return [f"**{ours}**", f"{limit} s", theirs, f"{ratio:.2f}", kept]

    header = ["network", "ours", "limit", "plain XLA", "ours : plain", again]
    return timing.markdown(header, rows, cells)


BENCHMARK = timing.Benchmark("compile", __doc__, jobs, measure, table)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
