"""What the MobileNets share."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from flax import nnx

from flax_nets.layers import init
from flax_nets.layers.activation import relu6
from flax_nets.layers.container import Sequential
from flax_nets.layers.linear import Conv, Linear
from flax_nets.layers.norm import BatchNorm


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, the next one where that loses over 10%.

    >>> make_divisible(0.35 * 32)  # 8 would be 29% too few
    16
    """
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def conv_norm_act(
    in_channels: int,
    channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[jax.Array], jax.Array] | None = relu6,
    same: bool = False,
    eps: float = 1e-5,
    momentum: float = 0.1,
    *,
    rngs: nnx.Rngs | None,
) -> Sequential:
    """Convolution, batch norm and activation (or none), "0", "1" and "2" of a `Sequential`.

    same: whether it pads as TensorFlow does, or by kernel_size // 2 on every side. Default False.
    """
    padding = "same" if same else kernel_size // 2
    stack = [
        Conv(
            in_channels,
            channels,
            kernel_size,
            stride,
            padding,
            groups=groups,
            bias=False,
            rngs=rngs,
        ),
        BatchNorm(channels, eps=eps, momentum=momentum, rngs=rngs),
    ]
    return Sequential(*stack, *([] if activation is None else [activation]))


def initialise_mobile(model: nnx.Module, library: str, rngs: nnx.Rngs | None) -> None:
    """The initial values of the MobileNets: "torchvision"'s, or "timm"'s, which are Google's.

    Both draw a convolution from a normal distribution by its fan-out; torchvision counts every
    group of a depthwise convolution, timm one. Raises ValueError for another `library`.
    """
    if library not in ("torchvision", "timm"):
        raise ValueError(f'initialise must be "torchvision" or "timm", got {library!r}')
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Conv):
            gain = math.sqrt(2 if library == "torchvision" else 2 * module.groups)
            init.reinit(module.kernel, init.kaiming_normal(module.kernel.shape, gain=gain), rngs)
        elif isinstance(module, Linear) and library == "torchvision":
            init.reinit(module.kernel, init.normal(0.01), rngs)
        elif isinstance(module, Linear):
            init.reinit(module.kernel, init.uniform(1 / math.sqrt(module.out_features)), rngs)
        if isinstance(module, Conv | Linear) and module.bias is not None:
            init.reinit(module.bias, init.zeros, rngs)
