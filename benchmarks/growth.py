"""How the cost of a ResNet grows with the batch, the size of the images and the depth.

    python -m benchmarks.growth
    python -m benchmarks.growth --only '*pixels*' --rounds 5

Measured as `python -m benchmarks.networks` measures, whose `--write docs` puts the results into
docs/performance.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import timing
from benchmarks.timing import Row

NAME = "resnet50"
IMAGES, PIXELS = (1, 2, 4, 8, 16), (64, 128, 224, 320)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101")


def jobs() -> list[str]:
    return [
        *(f"{NAME}, images: {number}" for number in IMAGES),
        *(f"{NAME}, pixels: {side}" for side in PIXELS),
        *(f"depth: {name}" for name in DEPTHS),
    ]


def measure(job: str, rounds: int) -> Row:
    from benchmarks import networks

    what, _, value = job.partition(": ")
    if what == "depth":
        return networks.measure(value, rounds)
    changed = {"images": int(value)} if what.endswith("images") else {"side": int(value)}
    return networks.measure(NAME, rounds, **changed)


def table(rows: Sequence[Row]) -> str:
    from benchmarks import networks

    return timing.ratios(rows, networks.MODES, "what (against)")


BENCHMARK = timing.Benchmark("growth", __doc__, jobs, measure, table)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
