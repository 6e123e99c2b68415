"""Whether the input keeps a device busy: JPEGs of 500 x 375, cropped, flipped, normalised.

    python -m benchmarks.input                         # batches of 8, steps of 50 ms, threads
    python -m benchmarks.input --workers 2 --step 25   # decoded by two processes

The photographs are parts of the two that scikit-learn bundles. A step is a wait, so that the cores
(`--cores` of them, 2 by default) have nothing to do but to prepare. Busy is the share of the time
that the steps take, from the second batch on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from flax_nets.train.data import Pipeline, augment, load

SIZE = (500, 375)


def write_photos(root: Path, count: int) -> None:
    """Parts of two photographs, in two folders."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(count):
        photo = photos[i % 2]
        width = int(rng.integers(400, 560))
        height = width * SIZE[1] // SIZE[0]
        left = int(rng.integers(0, photo.width - width + 1))
        top = int(rng.integers(0, photo.height - height + 1))
        part = photo.crop((left, top, left + width, top + height)).resize(SIZE)
        folder = root / ("china", "flower")[i % 2]
        folder.mkdir(exist_ok=True)
        part.save(folder / f"{i:04}.jpg", quality=90)


def measure(pipeline: Pipeline, steps: int, wait: float) -> tuple[float, float, float]:
    """(share of the time in steps, the longest between two, this process's work per batch).

    In seconds; the work does not grow when others use the cores too, as the waiting does.
    """
    batches = (batch for epoch in range(1 << 30) for batch in pipeline.epoch(epoch))
    for _ in range(2):  # made here, and started: neither tells of the stream that follows
        next(batches)
    longest, begin, work = 0.0, time.perf_counter(), time.process_time()
    for _ in range(steps):
        time.sleep(wait)
        asked = time.perf_counter()
        next(batches)
        longest = max(longest, time.perf_counter() - asked)
    busy = steps * wait / (time.perf_counter() - begin)
    return busy, longest, (time.process_time() - work) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch", type=int, default=8, help="images (default: %(default)s)")
    add("--step", type=float, default=50, help="milliseconds of a step (default: %(default)s)")
    add("--steps", type=int, default=200, help="how many to measure (default: %(default)s)")
    add("--images", type=int, default=128, help="files (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes; 0: threads (default: %(default)s)")
    add("--threads", type=int, help="of each process (default: one for each core)")
    add("--cores", type=int, default=2, help="cores to use (default: %(default)s)")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    transform = augment.compose(
        augment.random_resized_crop(224), augment.flip(), augment.normalize()
    )
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), args.images)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.jpg")) / args.images
        pipeline = Pipeline(
            load(f"folder:{folder}"),
            args.batch,
            transform,
            seed=0,
            drop_last=True,
            workers=args.workers,
            threads=args.threads or (None if args.workers else args.cores),
        )
        try:
            busy, longest, work = measure(pipeline, args.steps, args.step / 1e3)
        finally:
            pipeline.close()
    how = f"{pipeline.threads} threads, {work * 1e3:.0f} ms of work each"
    if args.workers:  # whose work this process cannot see
        how = f"{args.workers} processes"
    print(
        f"{args.batch} JPEGs of {SIZE[0]} x {SIZE[1]} ({size / 1e3:.0f} kB) a batch, {how}, "
        f"{args.cores} cores: {busy:.1%} busy in {args.steps} steps of {args.step:g} ms, longest "
        f"wait {longest * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
