"""Single convolutions and poolings: ours, XLA's own, and PyTorch's, forward and backward.

    python -m benchmarks.operations
    python -m benchmarks.operations --only 'depthwise*' '*pool*'

Float32, 8 images, on the CPU, in turns. Backward means with respect to the images and the kernel,
after the forward pass that it needs. PyTorch's better layout counts. `python -m benchmarks.networks
--write docs` puts the results into docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.timing import Row

BATCH = 8
MODES = {"forward": "forward", "both": "forward and backward"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """On images of `side` x `side` pixels; without `out` a pooling of that `kind`."""

    channels: int
    side: int
    size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    out: int = 0
    kind: str = "conv"


def _depthwise(channels: int, side: int, size: int, stride: int = 1) -> Operation:
    return Operation(channels, side, size, stride, size // 2, channels, channels)


OPERATIONS = {
    "depthwise 3x3, 384 channels at 14": _depthwise(384, 14, 3),
    "depthwise 3x3 stride 2, 96 channels at 112": _depthwise(96, 112, 3, 2),
    "depthwise 5x5, 120 channels at 28": _depthwise(120, 28, 5),
    "grouped 3x3 in 32, 128 channels at 56": Operation(128, 56, 3, 1, 1, 32, 128),
    "grouped 3x3 in 32, 512 channels at 14": Operation(512, 14, 3, 1, 1, 32, 512),
    "grouped 1x1 in 3, 240 channels at 28": Operation(240, 28, 1, groups=3, out=240),
    "dense 3x3, 64 channels at 56": Operation(64, 56, 3, 1, 1, out=64),
    "dense 3x3, 256 channels at 14": Operation(256, 14, 3, 1, 1, out=256),
    "dense 3x3, 512 channels at 7": Operation(512, 7, 3, 1, 1, out=512),
    "dense 3x3 stride 2, 128 channels at 56": Operation(128, 56, 3, 2, 1, out=128),
    "dense 1x1, 256 to 64 channels at 56": Operation(256, 56, 1, out=64),
    "dense 1x1 stride 2, 256 to 512 channels at 56": Operation(256, 56, 1, 2, out=512),
    "dense 7x7 stride 2, 3 to 64 channels at 224": Operation(3, 224, 7, 2, 3, out=64),
    "max pool 3x3 stride 2, 64 channels at 112": Operation(64, 112, 3, 2, 1, kind="max"),
    "max pool 2x2 stride 2, 128 channels at 112": Operation(128, 112, 2, 2, kind="max"),
    "average pool 3x3, 256 channels at 28": Operation(256, 28, 3, 1, 1, kind="avg"),
}


def jobs() -> list[str]:
    return list(OPERATIONS)


def measure(job: str, rounds: int) -> Row:
    from benchmarks.compare import error, nchw

    timing.torch_threads()
    operation, rng = OPERATIONS[job], np.random.default_rng(0)
    x = rng.normal(size=(BATCH, operation.side, operation.side, operation.channels))
    inputs = [x.astype(np.float32)]
    if operation.out:
        shape = (operation.size, operation.size, operation.channels // operation.groups)
        inputs += [rng.normal(size=(*shape, operation.out)).astype(np.float32)]
    row = {}
    for mode in MODES:
        sides = {
            "ours": jax_side(operation, inputs, mode, "auto"),
            "plain": jax_side(operation, inputs, mode, "xla"),
            **{layout: torch_side(operation, inputs, mode, layout) for layout in timing.LAYOUTS},
        }
        if mode == "forward":
            difference = error(nchw(sides["ours"]()), sides["NCHW"]())
            if not difference < 1e-4:
                raise ValueError(f"not the same operation: {difference:.1e} off")
        row[mode] = timing.compare(sides, rounds)
    return row


def jax_side(
    operation: Operation, inputs: list[np.ndarray], mode: str, form: str
) -> Callable[[], Any]:
    import jax

    from flax_nets import lowering

    o = operation
    window = dict(stride=o.stride, padding=o.padding)

    def forward(x, kernel=None):
        if o.kind == "conv":
            return lowering.conv(x, kernel, groups=o.groups, **window)
        pool = lowering.max_pool if o.kind == "max" else lowering.avg_pool
        return pool(x, window=o.size, **window)

    def both(g, *inputs):
        y, back = jax.vjp(forward, *inputs)
        return y, back(g)

    arrays = [jax.numpy.asarray(a) for a in inputs]
    function: Callable[..., Any] = forward
    if mode == "both":
        function, arrays = both, [jax.numpy.ones_like(forward(*arrays)), *arrays]
    with lowering.use(form):
        compiled = jax.jit(function).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def torch_side(
    operation: Operation, inputs: list[np.ndarray], mode: str, layout: str
) -> Callable[[], Any]:
    import torch
    from torch.nn import functional as F

    o = operation
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    axes = ((0, 3, 1, 2), (3, 2, 0, 1))
    tensors = [
        torch.tensor(a.transpose(to)).contiguous(memory_format=order)
        for a, to in zip(inputs, axes, strict=False)
    ]

    def forward():
        if o.kind == "conv":
            return F.conv2d(*tensors, stride=o.stride, padding=o.padding, groups=o.groups)
        pool = F.max_pool2d if o.kind == "max" else F.avg_pool2d
        return pool(tensors[0], o.size, o.stride, o.padding)

    def infer():
        with torch.inference_mode():
            return forward()

    if mode == "forward":
        return infer
    ones = torch.ones_like(forward())
    for tensor in tensors:
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(forward(), tensors, ones)


def table(rows: list[Row]) -> str:
    return timing.ratios(rows, MODES, "operation")


BENCHMARK = timing.Benchmark("operations", __doc__, jobs, measure, table)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
