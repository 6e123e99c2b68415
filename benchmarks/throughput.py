"""Images per second and the share of the device's peak, against all that PyTorch offers.

    python -m benchmarks.throughput                        # on the GPU that is there, else the CPU
    python -m benchmarks.throughput --only resnet50 vit_b_16 --rounds 20
    JAX_PLATFORMS=cpu python -m benchmarks.throughput      # on the CPU in any case

Inference and training step of the networks of `benchmarks.networks`, each with the same numbers and
the same batch on both sides, in turns in one process: ours, and PyTorch eager, eager in
channels_last and under `torch.compile`. On a GPU all of them in float32 (products in TF32, as JAX
takes them there) and in bfloat16, which is autocast for PyTorch; on the CPU in float32.

The share of the peak is that of the chip's arithmetic in bfloat16, with dense numbers, after the
maker's data sheet; operations are those of the plain form of the step, as XLA counts them.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from benchmarks import networks, timing
from benchmarks.networks import MODES
from benchmarks.timing import Row

BATCH = {"cpu": 8, "cuda": 128}  # images in a step
PEAKS = {  # part of the name of a GPU -> operations per second in bfloat16, by NVIDIA's data sheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
TORCH = ("eager", "channels_last", "compile")


def jobs() -> list[str]:
    return [name for name in networks.jobs() if name != networks.TRANSFORMER]


def measure(job: str, rounds: int) -> Row:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # of a GPU; the rest for PyTorch
    import jax
    import torch

    import convert
    from flax_nets.inspect.bench import in_turns, operations, step_of

    gpu = jax.devices()[0].platform == "gpu"
    if gpu and not torch.cuda.is_available():
        raise ValueError("JAX sees a GPU and PyTorch does not: install a PyTorch for CUDA")
    device = "cuda" if gpu else "cpu"
    timing.torch_threads()
    torch.set_float32_matmul_precision("high")  # TF32, where there is a GPU
    torch.backends.cudnn.benchmark = True  # as XLA does, it tries what is fastest
    model, batch = networks.ours(job, BATCH[device])
    against, network = networks.theirs(job, model)
    networks.settle(network.to(device), batch)
    convert.load(model, {k: v.cpu() for k, v in network.state_dict().items()})

    row: Row = {"against": against, "device": named(device), "images": BATCH[device]}
    for mode in MODES:
        train = mode == "train"
        function, arguments = step_of(model, batch, train)
        counted = operations(function, *arguments)
        sides: dict[str, Callable[[], Any]] = {}
        for dtype in ("float32", "bfloat16") if gpu else ("float32",):
            sides[f"ours {dtype}"] = our_side(model, batch, train, dtype)
            for form in TORCH:
                sides[f"{form} {dtype}"] = torch_side(network, batch, train, form, dtype, device)
        found = in_turns(sides, rounds)
        seconds = {side: statistics.median(values) for side, values in found.items()}
        row[mode] = {"seconds": seconds, "operations": counted}
    return row


def named(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def our_side(model: Any, batch: Any, train: bool, dtype: str) -> Callable[[], Any]:
    """One step of a copy of the network that computes in `dtype`."""
    from flax import nnx

    from flax_nets.create import set_dtype
    from flax_nets.inspect.bench import prepare

    model = nnx.clone(model)
    set_dtype(model, jnp.dtype(dtype))
    return prepare(model, {**batch, "image": jnp.asarray(batch["image"], dtype)}, train).run


def torch_side(
    network: Any, batch: Any, train: bool, form: str, dtype: str, device: str
) -> Callable[[], Any]:
    """One step in one of PyTorch's ways, and the wait for it."""
    import torch

    layout = "NCHW" if form == "eager" else "channels_last"
    more: dict[str, Any] = {"compiled": torch.compile} if form == "compile" else {}
    if dtype == "bfloat16":
        more["around"] = functools.partial(torch.autocast, device, torch.bfloat16)
    step = networks.torch_side(network, batch, train, layout, device, **more)

    def run() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def table(rows: Sequence[Row]) -> str:
    """Markdown. The ratio is one of times: here too, one below 1 says that ours is faster."""
    ways = " / ".join(("ours", *TORCH))
    header = ["network (against), images", "device", "step", "of", f"images/s: {ways}"]
    header += ["ours : PyTorch's best", "share of peak"]
    lines = ["| " + " | ".join(header) + " |", "| --- | --- | --- | --- |" + " ---: |" * 3]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['job']} | failed: {row['error']} |")
            continue
        peak = next((p for name, p in PEAKS.items() if name in row["device"]), None)
        for mode, title in MODES.items():
            took = row[mode]["seconds"]
            for dtype in dict.fromkeys(side.split()[1] for side in took):
                ours, *others = (took[f"{way} {dtype}"] for way in ("ours", *TORCH))
                cells = [f"{row['job']} ({row['against']}), {row['images']}", row["device"]]
                cells += [title, dtype]
                cells += [" / ".join(f"{row['images'] / t:.4g}" for t in (ours, *others))]
                cells += [f"**{ours / min(others):.2f}**"]
                cells += [f"{row[mode]['operations'] / ours / peak:.0%}" if peak else "-"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


BENCHMARK = timing.Benchmark("throughput", __doc__, jobs, measure, table, platform=None)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
