"""Convolution and dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import lowering
from flax_nets.layers import init
from flax_nets.layers.container import along_last, watched

Pair = int | Sequence[int]


def pair(value: Pair) -> tuple[int, int]:
    """3 -> (3, 3); (1, 7) -> (1, 7)."""
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


class Conv(nnx.Module):
    """`torch.nn.Conv2d` on NHWC arrays, with the same arguments and the same initial values.

    Call: x [N, H, W, in_channels] -> [N, H', W', out_channels].

    Args:
      in_channels, out_channels: both multiples of `groups`.
      kernel_size, stride, dilation: an int, or (height, width). Defaults: stride 1, dilation 1.
      padding: zeros on each side: an int, (height, width), or "same": TensorFlow's padding,
        which depends on the input's size and puts the odd zero below and to the right. Default 0.
      groups: 1 by default; `in_channels` makes the convolution depthwise.
      bias: whether an offset per output channel is added. Default True.
      rngs: where the initial values are drawn from; None for shapes alone.
      dtype: what it computes in; None (default) for the kernel's own.
      param_dtype: what the parameters are kept in. Default float32.

    Raises ValueError where `groups` divides not both numbers of channels, and, when called,
    where the channels of `x` differ from `in_channels` or the image is too small.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels} and "
                f"out_channels={out_channels}"
            )
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f'padding must be numbers or "same", got {padding!r}')
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = (
            pair(kernel_size),
            pair(stride),
            pair(dilation),
        )
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.groups, self.dtype = groups, dtype
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        distribution = init.kaiming_uniform(shape)
        self.kernel = init.param(shape, distribution, rngs, param_dtype)
        self.bias = init.param((out_channels,), distribution, rngs, param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._with(x, self.kernel[...], None if self.bias is None else self.bias[...])

    def _with(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"expected images [N, H, W, {self.in_channels}] (channels last), got {x.shape}"
            )
        dtype = self.dtype or kernel.dtype
        y = lowering.conv(
            x.astype(dtype),
            kernel.astype(dtype),
            stride=self.stride,
            padding=self._padding(x.shape),
            dilation=self.dilation,
            groups=self.groups,
        )
        if bias is not None:
            y = y + along_last(bias.astype(dtype), 4)
        return y

    def _padding(self, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        if not isinstance(self.padding, str):
            top, left = self.padding
            return (top, top), (left, left)
        sides = []
        for size, kernel, stride, dilation in zip(
            shape[1:3], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            sides.append((total // 2, total - total // 2))
        return sides[0], sides[1]


def side_by_side(x: jax.Array, *convs: Any) -> list[jax.Array]:
    """[conv(x) for conv in convs]: as one wider convolution, where all are alike.

    It reads the images once, and wider products take less time for each channel. Those who watch
    the calls (features, summaries, folding) see each of them.
    """
    settings = {_settings(conv) for conv in convs}
    if len(settings) > 1 or None in settings or watched():
        return [conv(x) for conv in convs]
    kernel = jnp.concatenate([conv.kernel[...] for conv in convs], 3)
    bias = None if convs[0].bias is None else jnp.concatenate([conv.bias[...] for conv in convs])
    return jnp.split(convs[0]._with(x, kernel, bias), len(convs), 3)


def _settings(conv: Any) -> tuple[Any, ...] | None:
    """What is alike of convolutions that may stand side by side; None for other modules."""
    if type(conv) is not Conv or conv.groups > 1:
        return None
    kept = conv.kernel.shape, conv.kernel.dtype, conv.bias is None
    return *kept, conv.stride, conv.padding, conv.dilation, conv.dtype


class Linear(nnx.Module):
    """`torch.nn.Linear`: x [..., in_features] -> [..., out_features].

    Arguments as in `Conv`. The kernel is [in_features, out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        distribution = init.kaiming_uniform((in_features, out_features))
        self.kernel = init.param((in_features, out_features), distribution, rngs, param_dtype)
        self.bias = init.param((out_features,), distribution, rngs, param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected {self.in_features} features on the last axis, got {x.shape}: for a "
                "dense layer after a flatten, the image has another size than the network takes"
            )
        kernel = self.kernel[...]
        dtype = self.dtype or kernel.dtype
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        y = lowering.dense(x, kernel)
        if self.bias is not None:
            y = y + along_last(self.bias[...].astype(dtype), y.ndim)
        return y
