"""Pooling layers: thin modules over `flax_nets.lowering`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import lowering
from flax_nets.layers.linear import Pair, pair
from flax_nets.layers.norm import accumulation_dtype


class MaxPool(nnx.Module):
    """`torch.nn.MaxPool2d`: x [N, H, W, C] -> [N, H', W', C].

    Args:
      kernel_size: an int, or (height, width).
      stride: `kernel_size` by default.
      padding: minus infinities on each side. Default 0.
      ceil_mode: whether sizes round up, the last window hanging over the edge. Default False.

    At a tie the gradient goes to the first maximum in row-major order.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        ceil_mode: bool = False,
    ):
        self.kernel_size, self.padding = pair(kernel_size), pair(padding)
        self.stride = self.kernel_size if stride is None else pair(stride)
        self.ceil_mode = ceil_mode

    def __call__(self, x: jax.Array) -> jax.Array:
        return lowering.max_pool(
            x,
            window=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            ceil_mode=self.ceil_mode,
        )


class AvgPool(nnx.Module):
    """`torch.nn.AvgPool2d`: x [N, H, W, C] -> [N, H', W', C]; arguments as in `MaxPool`.

    count_include_pad: whether the zeros of the padding count in the mean. Default True.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ):
        self.kernel_size, self.padding = pair(kernel_size), pair(padding)
        self.stride = self.kernel_size if stride is None else pair(stride)
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def __call__(self, x: jax.Array) -> jax.Array:
        return lowering.avg_pool(
            x,
            window=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
        )


class AdaptiveAvgPool(nnx.Module):
    """`torch.nn.AdaptiveAvgPool2d`: means over windows that may overlap; any image size."""

    def __init__(self, output_size: Pair):
        self.output_size = pair(output_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return lowering.adaptive_avg_pool(x, self.output_size)


class AdaptiveMaxPool(nnx.Module):
    """`torch.nn.AdaptiveMaxPool2d`; at a tie the gradient goes to the first maximum."""

    def __init__(self, output_size: Pair):
        self.output_size = pair(output_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return lowering.adaptive_max_pool(x, self.output_size)


def global_avg_pool(x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, C]."""
    if x.shape[-1] >= 16:
        return jnp.mean(x, (1, 2))
    # On CPU XLA adds the places of so few channels one after the other, at twice PyTorch's error
    # in float32. Two short sums, kept apart by the barrier, round less.
    rows = jnp.sum(x, 2, dtype=accumulation_dtype(x.dtype))
    total = jnp.sum(jax.lax.optimization_barrier(rows), 1)
    return (total / (x.shape[1] * x.shape[2])).astype(x.dtype)
