"""What the Inception networks share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets.layers.activation import relu
from flax_nets.layers.container import Identity, along_last
from flax_nets.layers.linear import Conv, Pair
from flax_nets.layers.norm import BatchNorm, accumulation_dtype

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


class BasicConv2d(nnx.Module):
    """Convolution, batch norm (epsilon 1e-3), ReLU: the unit of the Inception networks.

    Without batch norm the convolution has a bias. Call: x [N, H, W, in_channels] ->
    [N, H', W', channels].
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        batch_norm: bool = True,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.conv = Conv(
            in_channels, channels, kernel_size, stride, padding, bias=not batch_norm, rngs=rngs
        )
        self.bn = BatchNorm(channels, eps=1e-3, rngs=rngs) if batch_norm else Identity()

    def __call__(self, x: jax.Array) -> jax.Array:
        return relu(self.bn(self.conv(x)))


def transform_input(x: jax.Array) -> jax.Array:
    """Images normalised by ImageNet's mean and deviation -> images normalised to [-1, 1].

    Google's weights of GoogLeNet and Inception-v3 expect the latter, torchvision feeds the former.
    x [N, H, W, 3] -> the same shape, in float32 at least.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    scale = jnp.asarray([std / 0.5 for std in STD], x.dtype)
    shift = jnp.asarray([(mean - 0.5) / 0.5 for mean in MEAN], x.dtype)
    return x * along_last(scale, x.ndim) + along_last(shift, x.ndim)
