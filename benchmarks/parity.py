"""The full sweep: every network at full depth against PyTorch, float64, on the CPU.

    python -m benchmarks.parity                    # all variants, and all names of the libraries
    python -m benchmarks.parity --only 'vit*' --workers 2
    python -m benchmarks.parity --table docs/parity.md

Each variant is compared with its twin in `torch_ref` (eval and train mode), each name of
torchvision and timm with the library itself (eval mode, through a checkpoint that torch saved):
outputs, the gradient of every parameter and of the input, and statistics. PyTorch and JAX run in
processes of their own, one after the other, so that only one of them is in memory. Each result is
a line of the file `--out`; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

NAMES = pathlib.Path(__file__).parent.parent / "tests" / "data" / "names.txt"
# Sides of the images in pixels: small, and large enough for train mode (16 values per channel in
# the last batch norm of a batch of 4).
SIDES = {
    "lenet": 32,
    "alexnet": 128,
    "vgg": 64,
    "nin": 128,
    "squeezenet": 64,
    "inception_v3": 299,  # the auxiliary head takes no smaller one
    "inception_v4": 139,
}
SIDE = 64
LIMITS = {"outputs": 1e-12, "gradients": 1e-9, "input_gradient": 1e-9, "statistics": 1e-12}


def jobs() -> list[str]:
    """ "torch_ref/name" for each variant, then "torchvision/name" and "timm/name"."""
    from flax_nets import registry

    ours = [
        f"torch_ref/{name}" for file in registry.FILES for name in registry.module(file).VARIANTS
    ]
    return ours + NAMES.read_text().split()


def modes(job: str) -> list[bool]:
    return [False, True] if job.startswith("torch_ref/") else [False]


def inputs(spec, train: bool) -> np.ndarray:
    from benchmarks.compare import images

    side = SIDES.get(spec.file, SIDE)
    if "image_size" in spec.cls("torch_ref").__init__.__code__.co_varnames:
        side = spec.input_shape[0]
    elif spec.name in ("se_inception_v3", "googlenet_2014"):  # likewise
        side = 299 if "inception" in spec.name else 224
    elif "cifar" in spec.name or "highway" in spec.name:
        side = spec.input_shape[0]
    return images(spec, 4 if train else 2 if side < 200 else 1, side)


def torch_side(job: str, folder: pathlib.Path) -> None:
    """Write a checkpoint, and what PyTorch makes of it."""
    import torch

    from benchmarks import libraries
    from benchmarks.compare import leaves, torch_pass, twin
    from flax_nets import registry

    library, _, name = job.partition("/")
    spec = registry.resolve(name)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if library == "torch_ref":
        model = twin(spec, dropout=0.0)
    else:
        model = libraries.materialise(libraries.build(job))
    torch.save(model.state_dict(), folder / "checkpoint.pth")
    for train in modes(job):
        result = torch_pass(model, inputs(spec, train), train)
        arrays = {f"output/{i}": o for i, o in enumerate(leaves(tuple(result["outputs"])))}
        arrays |= {f"gradient/{k}": v for k, v in result["gradients"].items()}
        arrays |= {"input_gradient": result["input_gradient"]}
        arrays |= {f"state/{k}": torch.from_numpy(v) for k, v in result["state"].items() if train}
        torch.save({k: v.detach() for k, v in arrays.items()}, folder / f"{train}.pth")


def flax_side(job: str, folder: pathlib.Path) -> dict[str, object]:
    """The same checkpoint in Flax, and how far it is from what PyTorch made of it."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import convert
    import flax_nets
    from benchmarks.compare import error, flax_pass
    from convert import rules

    name = job.partition("/")[2]
    model = flax_nets.create_model(name, weights=folder / "checkpoint.pth", dropout=0.0)
    native = [e.key for e in rules.entries(model)]
    row: dict[str, object] = {"job": job, "parameters": _count(model)}
    for train in modes(job):
        ours = flax_pass(model, inputs(model.spec, train), train)
        theirs = convert.read(folder / f"{train}.pth")

        def part(prefix: str, theirs=theirs) -> dict[str, np.ndarray]:
            found = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
            return convert.port.open_checkpoint(found, native, model.spec, "auto").tensors

        gradients = part("gradient/")
        assert set(gradients) == set(ours["gradients"]), "the names of the gradients differ"
        floor = 1e-6 * max(float(np.abs(g).max()) for g in gradients.values())
        mode = "train" if train else "eval"
        row[mode] = {
            "outputs": max(error(o, theirs[f"output/{i}"]) for i, o in enumerate(ours["outputs"])),
            "gradients": max(error(ours["gradients"][k], g, floor) for k, g in gradients.items()),
            "input_gradient": error(ours["input_gradient"], theirs["input_gradient"]),
        }
        if train:
            row[mode]["statistics"] = max(
                (
                    error(ours["state"][k], v)
                    for k, v in part("state/").items()
                    if "running" in k or "num_batches" in k
                ),
                default=0.0,
            )
    row["equal"] = all(
        value <= LIMITS[what]
        for mode in ("eval", "train")
        for what, value in row.get(mode, {}).items()
    )
    return row


def _count(model) -> int:
    import jax
    from flax import nnx

    return sum(v.size for v in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))


def run(job: str) -> dict[str, object]:
    """Both sides of one job, each in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for side in ("torch", "flax"):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.parity", "--side", side, job, folder],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                return {"job": job, "equal": False, "error": f"{side}: {last}"}
        row = json.loads((pathlib.Path(folder) / "row.json").read_text())
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def sweep(pattern: str, out: pathlib.Path, workers: int, seconds: float) -> list[dict]:
    """Run what is not in `out` yet, and append each result there."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    rows = [row for row in rows if "error" not in row]
    done = {row["job"] for row in rows}
    todo = [
        job
        for job in jobs()
        if job not in done
        and (fnmatch.fnmatch(job, pattern) or fnmatch.fnmatch(job.partition("/")[2], pattern))
    ]
    end = time.monotonic() + seconds
    with out.open("a") as file, ThreadPoolExecutor(workers) as pool:
        for row in pool.map(lambda job: run(job) if time.monotonic() < end else None, todo):
            if row is None:
                continue
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"[{len(rows)}/{len(done) + len(todo)}] {summary(row)}", file=sys.stderr)
    return rows


def summary(row: dict) -> str:
    if "error" in row:
        return f"{row['job']}: {row['error']}"
    worst = {w: max(row.get(m, {}).get(w, 0.0) for m in ("eval", "train")) for w in LIMITS}
    shown = ", ".join(f"{what} {value:.0e}" for what, value in worst.items())
    return f"{row['job']}: {'equal' if row['equal'] else 'NOT EQUAL'} ({shown})"


def table(rows: list[dict]) -> str:
    """Markdown: the largest errors of each network, against each reference."""
    lines = [
        "| against | network | parameters | outputs | gradients | input's gradient | statistics |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        library, _, name = row["job"].partition("/")
        if "error" in row:
            lines.append(f"| {library} | {name} | failed: {row['error']} | | | | |")
            continue
        modes = [row[m] for m in ("eval", "train") if m in row]
        worst = [max(m.get(w, 0.0) for m in modes) for w in LIMITS]
        cells = [f"{v:.0e}" for v in worst[:3]] + [f"{worst[3]:.0e}" if "train" in row else "-"]
        lines.append(f"| {library} | {name} | {row['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="*", help="a glob pattern of names")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("parity.jsonl"))
    parser.add_argument("--workers", type=int, default=1, help="networks at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after this")
    parser.add_argument("--table", type=pathlib.Path, help="write the table there, as Markdown")
    parser.add_argument("--json", action="store_true", help="print the rows")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, job, folder = args.side[0], args.side[1], pathlib.Path(args.side[2])
        if side == "torch":
            torch_side(job, folder)
        else:
            (folder / "row.json").write_text(json.dumps(flax_side(job, folder)))
        return 0
    rows = sweep(args.only, args.out, args.workers, args.seconds)
    if args.table:
        args.table.write_text(table(rows) + "\n")
    print(json.dumps(rows) if args.json else "\n".join(map(summary, rows)))
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
