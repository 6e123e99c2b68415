"""The full sweep: every network at full depth against PyTorch on the CPU, in float64.

    python -m benchmarks.parity                    # all variants, and all names of the libraries
    python -m benchmarks.parity --only 'vit*' --workers 2
    python -m benchmarks.parity --float32          # how far float32 is from float64, on both sides
    python -m benchmarks.parity --table            # docs/parity.md, of what has been measured
    python -m benchmarks.parity --out benchmarks/results/parity_gpu.jsonl   # where JAX has a GPU

Each variant is compared with its twin in `torch_ref` (eval and train mode), each name of
torchvision and timm with the library itself (eval mode, through a checkpoint that torch saved):
outputs, the gradient of every parameter and of the input, and statistics. With --float32 the
outputs in eval mode alone, and both are compared with what PyTorch computes in float64 from the
same float32 numbers. PyTorch and JAX run in processes of their own, one after the other, so that
only one of them has a model in memory; these are forked from a server that has imported the
libraries once. Each result is a line of the file `--out`; a run that was stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ROOT / "tests" / "data" / "names.txt"
RESULTS = ROOT / "benchmarks" / "results"
OUT, OUT32 = RESULTS / "parity.jsonl", RESULTS / "float32.jsonl"
OUT_GPU = RESULTS / "parity_gpu.jsonl"
PAGE = ROOT / "docs" / "parity.md"
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
FLOAT32 = 1.5  # times PyTorch's own distance from the truth


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
    normalised = train and spec.file != "vit"  # by the batch, of which there should be some
    return images(spec, 4 if normalised else 2 if side < 200 else 1, side)


def reference(job: str):
    """(the PyTorch model in float64, our spec of it)."""
    import torch

    from benchmarks import libraries
    from benchmarks.compare import twin
    from flax_nets import registry

    library, _, name = job.partition("/")
    spec = registry.resolve(name)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if library == "torch_ref":
        model = twin(spec, dropout=0.0)
        if spec.file == "senet":
            # With the kernels of its own initialisation and statistics that are not its images', a
            # SE-ResNet-152 works with numbers of up to 1e6, and a sigmoid of such a number turns a
            # rounding error into one as much larger.
            libraries.draw_kernels(model)
        return model, spec
    return libraries.materialise(libraries.build(job)), spec


def torch_side(job: str, folder: pathlib.Path) -> None:
    """Write a checkpoint, and what PyTorch makes of it."""
    import torch

    from benchmarks.compare import leaves, torch_pass

    model, spec = reference(job)
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

    def errors(train: bool) -> dict[str, float]:
        ours = flax_pass(model, inputs(model.spec, train), train, jit=jax.jit)
        theirs = convert.read(folder / f"{train}.pth")

        def part(prefix: str) -> dict[str, np.ndarray]:
            found = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
            return convert.port.open_checkpoint(found, native, model.spec, "auto").tensors

        gradients = part("gradient/")
        assert set(gradients) == set(ours["gradients"]), "the names of the gradients differ"
        floor = 1e-6 * max(float(np.abs(g).max()) for g in gradients.values())
        found = {
            "outputs": max(error(o, theirs[f"output/{i}"]) for i, o in enumerate(ours["outputs"])),
            "gradients": max(error(ours["gradients"][k], g, floor) for k, g in gradients.items()),
            "input_gradient": error(ours["input_gradient"], theirs["input_gradient"]),
        }
        if train:
            found["statistics"] = max(
                (
                    error(ours["state"][k], v)
                    for k, v in part("state/").items()
                    if "running" in k or "num_batches" in k
                ),
                default=0.0,
            )
        return found

    device = jax.devices()[0].device_kind
    row: dict[str, object] = {"job": job, "device": device, "parameters": _count(model)}
    for train in modes(job):
        row["train" if train else "eval"] = errors(train)  # which then lets go of its arrays
    row["equal"] = equal(row)
    return row


def equal(row: dict) -> bool:
    """Within the limits, or in train mode as near to PyTorch as that is to itself."""
    itself = row.get("itself", {})
    return all(
        value <= max(LIMITS[what], itself.get(what, 0) if mode == "train" else 0)
        for mode in ("eval", "train")
        for what, value in row.get(mode, {}).items()
    )


def torch_itself(job: str, folder: pathlib.Path) -> dict[str, object]:
    """The row, with PyTorch's distance from itself when it sees the images in the other order.

    Batch norm on the batch's own statistics amplifies rounding from layer to layer. (In its other
    memory layout PyTorch computes float64 as in the first one.)
    """
    import torch

    from benchmarks.compare import torch_pass, worst_errors

    row = json.loads((folder / "row.json").read_text())
    model, spec = reference(job)
    model.register_forward_pre_hook(lambda _, images: images[0].flip(0))
    model.register_forward_hook(
        lambda _, __, output: (
            type(output)(*(o.flip(0) for o in output))
            if isinstance(output, tuple)
            else output.flip(0)
        )
    )
    found = torch_pass(model, inputs(spec, True), True)
    kept = torch.load(folder / "True.pth")
    first: dict[str, object] = {"input_gradient": kept["input_gradient"]}
    first["outputs"] = [kept[f"output/{i}"] for i in range(len(found["outputs"]))]
    for name in ("gradients", "state"):
        start = f"{name.removesuffix('s')}/"
        first[name] = {k.removeprefix(start): v for k, v in kept.items() if k.startswith(start)}
    worst = worst_errors(found, first)
    row["itself"] = {what: worst[what] for what in LIMITS}
    row["equal"] = equal(row)
    return row


def torch_side32(job: str, folder: pathlib.Path) -> None:
    """Write a float32 checkpoint, and what PyTorch makes of it in float64 and in float32."""
    import torch

    from benchmarks.compare import nchw

    model, spec = reference(job)
    model = model.float().eval()
    torch.save(model.state_dict(), folder / "checkpoint.pth")
    x = torch.tensor(nchw(inputs(spec, train=False)), dtype=torch.float32)
    with torch.no_grad():
        theirs = model(x)
        found = {"theirs": theirs, "truth": model.double()(x.double())}
    torch.save(found, folder / "outputs.pth")


def flax_side32(job: str, folder: pathlib.Path) -> dict[str, object]:
    """How far either float32 output is from the float64 one."""
    import jax

    import convert
    import flax_nets

    name = job.partition("/")[2]
    model = flax_nets.create_model(name, weights=folder / "checkpoint.pth", dropout=0.0)
    apply, params, state = flax_nets.functional(model)
    x = inputs(model.spec, train=False).astype(np.float32)
    outputs = convert.read(folder / "outputs.pth")
    output = jax.jit(lambda params, state, x: apply(params, state, x)[0])(params, state, x)
    ours, theirs = (distance(o, outputs["truth"]) for o in (output, outputs["theirs"]))
    return {"job": job, "ours": ours, "theirs": theirs, "equal": ours <= FLOAT32 * theirs}


def distance(output, truth: np.ndarray) -> float:
    """Root of the mean square of the difference, over that of the truth: unlike the largest
    difference, it hardly depends on the draw."""
    difference = np.asarray(output, np.float64) - truth
    return float(np.sqrt(np.mean(difference**2) / np.mean(truth**2)))


def _count(model) -> int:
    import jax
    from flax import nnx

    return sum(v.size for v in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))


def versions() -> str:
    """What was measured, and on what."""
    from importlib.metadata import version

    from flax_nets import processor

    names = ("jax", "jaxlib", "flax", "torch", "torchvision", "timm")
    # Processors of one name differ: with AVX-512 the same program takes half the time.
    told = processor.features().split()
    vectors = next((v for v in ("avx512f", "avx2") if v in told), "")
    return ", ".join(
        [
            *(f"{name} {version(name)}" for name in names),
            f"{processor.name()} {vectors.upper()}".strip(),
        ]
    )


# Imported once, by the server that every side of every job is forked from: it takes longer than
# most of the work.
PRELOAD = ["torch", "torchvision", "timm", "jax", "benchmarks.compare", "benchmarks.libraries"]


def side(work: Callable[[str, pathlib.Path], object], job: str, folder: pathlib.Path) -> None:
    """One side of a job, in a process of its own: what it returns, or why it failed, as a file."""
    try:
        found = work(job, folder)
    except Exception as trouble:
        found = {"error": f"{type(trouble).__name__}: {trouble}".splitlines()[0]}
    (folder / "row.json").write_text(json.dumps(found))


def run(job: str, float32: bool) -> dict[str, object]:
    """Both sides of one job, one process after the other."""
    start = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    sides: list[Callable] = [torch_side32, flax_side32] if float32 else [torch_side, flax_side]
    row: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for work in sides:
            process = context.Process(target=side, args=(work, job, folder))
            process.start()
            process.join()
            done = {"error": "killed"} if process.exitcode else {}
            row = done or json.loads((folder / "row.json").read_text()) or {}
            if "error" in row:
                who = work.__name__.partition("_")[0]
                return {"job": job, "equal": False, "error": f"{who}: {row['error']}"}
            if work is flax_side and not row["equal"] and "train" in row:
                sides.append(torch_itself)
    return row | {"seconds": round(time.perf_counter() - start, 1), "versions": versions()}


def read(out: pathlib.Path) -> list[dict]:
    """The rows of a file, none where there is no such file yet; of several for one job the last."""
    lines = out.read_text().splitlines() if out.exists() else []
    return list({row["job"]: row for row in map(json.loads, lines)}.values())


def sweep(
    pattern: str, out: pathlib.Path, workers: int, seconds: float, float32: bool
) -> list[dict]:
    """Run what is not in `out` yet, and append each result there."""
    rows = [row for row in read(out) if "error" not in row]
    done = {row["job"] for row in rows}
    todo = [
        job
        for job in jobs()
        if job not in done
        and (fnmatch.fnmatch(job, pattern) or fnmatch.fnmatch(job.partition("/")[2], pattern))
    ]
    end = time.monotonic() + seconds

    def timely(job):
        return run(job, float32) if time.monotonic() < end else None

    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file, ThreadPoolExecutor(workers) as pool:
        for row in pool.map(timely, todo):
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
    if "theirs" in row:
        found = f"ours {row['ours']:.1e}, PyTorch's {row['theirs']:.1e}"
        return f"{row['job']}: {'' if row['equal'] else 'NOT '}as near to float64 ({found})"
    worst = {w: max(row.get(m, {}).get(w, 0.0) for m in ("eval", "train")) for w in LIMITS}
    shown = ", ".join(f"{what} {value:.0e}" for what, value in worst.items())
    if "itself" in row:
        own = ", ".join(f"{what} {value:.0e}" for what, value in row["itself"].items())
        shown += f"; PyTorch with the images in the other order: {own}"
    return f"{row['job']}: {'equal' if row['equal'] else 'NOT EQUAL'} ({shown})"


def table(rows: list[dict], rows32: list[dict]) -> str:
    """Markdown: the largest errors of each network, against each reference."""
    lines = [
        "| against | network | parameters | outputs | gradients | input's gradient | statistics "
        "| float32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shorter = {row["job"]: row for row in rows32 if "error" not in row}
    for row in rows:
        library, _, name = row["job"].partition("/")
        if "error" in row:
            lines.append(f"| {library} | {name} | failed: {row['error']} | | | | | |")
            continue
        modes = [row[m] for m in ("eval", "train") if m in row]
        worst = [max(m.get(w, 0.0) for m in modes) for w in LIMITS]
        cells = [f"{v:.0e}" for v in worst[:3]] + [f"{worst[3]:.0e}" if "train" in row else "-"]
        for i, (what, limit) in enumerate(LIMITS.items()):
            if worst[i] > limit and "itself" in row:
                cells[i] += f" ({row['itself'][what]:.0e})"
        cells.append(distances(shorter.get(row["job"])))
        lines.append(f"| {library} | {name} | {row['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def distances(row: dict | None) -> str:
    """Our distance from float64 and PyTorch's, as "ours / theirs"."""
    return "-" if row is None else f"{row['ours']:.1e} / {row['theirs']:.1e}"


def page() -> str:
    """docs/parity.md."""
    rows, rows32 = in_order(read(OUT)), read(OUT32)
    measured = "; ".join(sorted({row["versions"] for row in rows + rows32 if "versions" in row}))
    equal = sum(row["equal"] for row in rows)
    near = sum(row["equal"] for row in rows32)
    return INTRO.format(
        total=len(jobs()),
        done=len(rows),
        equal=equal,
        done32=len(rows32),
        near=near,
        measured=f" Measured with {measured}." if measured else "",
        **LIMITS,
    ) + "".join([table(rows, rows32), *on_gpus(read(OUT_GPU))])


def on_gpus(rows: list[dict]) -> Iterator[str]:
    """The page's last parts, none where nothing was measured."""
    for device, versions in dict.fromkeys((row["device"], row["versions"]) for row in rows):
        own = in_order(
            row for row in rows if (row["device"], row["versions"]) == (device, versions)
        )
        equal = sum(row["equal"] for row in own)
        yield GPU.format(device=device, equal=equal, done=len(own), versions=versions)
        yield table(own, [])


def in_order(rows: Iterable[dict]) -> list[dict]:
    order = {job: i for i, job in enumerate(jobs())}
    return sorted(rows, key=lambda row: order.get(row["job"], len(order)))


GPU = """
## On a GPU

The same on one {device}, PyTorch staying on the CPU: {equal} of {done} within the limits. Measured
with {versions}, and with XLA's own forms,
which float64 no longer takes on a GPU (`design.md` says why).

"""
INTRO = """# Parity, measured

Written by `python -m benchmarks.parity --table` from `benchmarks/results`: run that, and do not
edit this page.

Every variant against its twin in `torch_ref` in eval and in train mode, and every name of
torchvision and timm that is in scope against the installed library, through a checkpoint that torch
saved, in eval mode. All at full depth, float64, on a CPU, with random weights, statistics and
images. An error is max|a - b| / max|b|; of a gradient the denominator is at least 1e-6 of the
network's largest. *gradients* is the worst of all parameters, *outputs* of all outputs and both
modes. At most {outputs:.0e} is allowed for outputs and statistics and {gradients:.0e} for
gradients. Where a deep network is over that in train mode, whose batch norms amplify rounding from
layer to layer, there stands in brackets how far PyTorch is from itself when the same images come in
the other order; that far we may be, too.

*float32* is another measure: how far our float32 output is from what PyTorch computes in float64
from the same float32 numbers (root of the mean square of the difference, over that of the truth),
and beside it how far PyTorch's own float32 output is. A dash: not measured.

{done} of {total} comparisons measured, {equal} of them within the limits; {done32} in float32, and
in {near} of these we are at most 1.5 times as far as PyTorch.{measured}

"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="*", help="a glob pattern of names")
    parser.add_argument("--float32", action="store_true", help="measure float32 instead")
    parser.add_argument("--out", type=pathlib.Path, help="default: a file in benchmarks/results")
    parser.add_argument("--workers", type=int, default=1, help="networks at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after this")
    parser.add_argument("--table", action="store_true", help="write docs/parity.md, run nothing")
    parser.add_argument("--json", action="store_true", help="print the rows")
    args = parser.parse_args()
    if args.table:
        PAGE.write_text(page(), "utf-8")
        return 0
    out = args.out or (OUT32 if args.float32 else OUT)
    rows = sweep(args.only, out, args.workers, args.seconds, args.float32)
    print(json.dumps(rows) if args.json else "\n".join(map(summary, rows)))
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
