"""Normalisation layers with PyTorch's semantics."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_nets.layers import init
from flax_nets.layers.container import along_last
from flax_nets.lowering.moments import along, average, covariation, moved, scaled, times, variance

Moments = Sequence[jax.Array]  # mean and variance, [channels] each


def accumulation_dtype(dtype: Any) -> Any:
    """Statistics are taken in float32 at least, whatever the network computes in."""
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    return dtype if wide else jnp.dtype(jnp.float32)


def inverse_root(x: jax.Array) -> jax.Array:
    """1 / sqrt(x).

    On CPU XLA's float32 `rsqrt`, which it also makes of 1 / sqrt(x), errs to one side, by 1e-8 in
    the mean. Over the layers of a ResNet that adds up to twice PyTorch's distance from float64.
    """
    return lax.sqrt(lax.div(lax.full_like(x, 1), x)) if x.dtype == jnp.float32 else lax.rsqrt(x)


class BatchNorm(nnx.Module):
    """`torch.nn.BatchNorm1d/2d`: per channel over all other axes; x [..., channels].

    In train mode (`use_running_average=False`) it normalises by the batch, and keeps a running
    mean, a running *unbiased* variance and a count of batches. The variance is the mean of
    squared deviations, so that it is never negative, however large the mean.

    Args:
      eps: added to the variance. Default 1e-5.
      momentum: PyTorch's: the share of the *new* batch, 0.1 by default; None for the plain mean
        of all batches so far.
      affine: whether a scale and a bias per channel are trained. Default True.
      rngs, dtype, param_dtype: as in `Conv`.

    Call: x, and in train mode the batch's own moments where they are known (`batch_moments`).

    Raises ValueError in train mode where there is only one value per channel.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.channels, self.eps, self.momentum, self.dtype = channels, eps, momentum, dtype
        self.use_running_average = False
        self.scale = init.param((channels,), init.ones, rngs, param_dtype) if affine else None
        self.bias = init.param((channels,), init.zeros, rngs, param_dtype) if affine else None
        self.mean = init.stat((channels,), 0, rngs, param_dtype)
        self.var = init.stat((channels,), 1, rngs, param_dtype)
        self.count = init.stat((), 0, rngs, jnp.int32)

    def __call__(self, x: jax.Array, moments: Moments | None = None) -> jax.Array:
        if x.shape[-1] != self.channels:
            raise ValueError(f"expected {self.channels} channels on the last axis, got {x.shape}")
        wide = accumulation_dtype(x.dtype)
        dtype = self.dtype or self.mean.dtype
        x = x.astype(wide)
        if not self.use_running_average and math.prod(x.shape[:-1]) < 2:
            raise ValueError(
                f"batch norm needs more than one value per channel in train mode, got {x.shape}: "
                "use a larger batch or image, or eval mode"
            )
        shape = (self.channels,)
        scale = jnp.ones(shape, wide) if self.scale is None else self.scale[...].astype(wide)
        bias = jnp.zeros(shape, wide) if self.bias is None else self.bias[...].astype(wide)
        eps = lax.full(shape, self.eps, wide)
        if self.use_running_average:  # as PyTorch rounds it, and one pass less
            mean, var = self.mean[...].astype(wide), self.var[...].astype(wide)
            factor = inverse_root(var + eps) * scale
            y = x * along_last(factor, x.ndim) + along_last(bias - mean * factor, x.ndim)
        else:
            variables = (self.mean, self.var, self.count)
            kept = [variable[...] for variable in variables]
            y, *kept = _in_training(x, moments, scale, bias, eps, *kept, momentum=self.momentum)
            for variable, value in zip(variables, kept, strict=True):
                # `variable[...] = value` asks for shardings: a third of the time of tracing
                variable.set_value(value)
        return y.astype(dtype)


@functools.partial(jax.jit, static_argnames="momentum")  # traced once for all layers of one shape
def _in_training(
    x: jax.Array,
    batch: Moments | None,
    scale: jax.Array,
    bias: jax.Array,
    eps: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    count: jax.Array,
    momentum: float | None,
) -> tuple:
    """x [..., channels] normalised by its own moments, and the running ones that follow them.

    What this calls is written in functions of `jax.lax`, which trace in a fraction of the time of
    operators: a network has many batch norms.
    """
    batch = batch or _moments(x)
    y = _normalised(x, *batch, scale, bias, eps)
    count = count + 1
    share: Any = momentum
    if share is None:
        share = 1 / count.astype(batch[0].dtype)
    values = math.prod(x.shape[:-1])
    kept = []
    for old, new, weight in zip((mean, var), batch, (1, values / (values - 1)), strict=True):
        new = moved(old, lax.stop_gradient(new), 1 - share, share * weight)
        kept.append(new.astype(old.dtype))
    return y, *kept, count


def batch_moments(x: jax.Array) -> Moments:
    """Mean and variance of x [..., channels] over all other axes, [channels] each.

    For `BatchNorm`, where several layers normalise the same maps: they are taken once, and so is
    their share of the gradient.
    """
    return _moments(x.astype(accumulation_dtype(x.dtype)))


@jax.custom_jvp
def _moments(x: jax.Array) -> Moments:
    mean = average(x)
    return mean, variance(x, mean)


@_moments.defjvp
def _moments_slope(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    mean, var = _moments(x)
    dvar = covariation(x, mean, dx) * (2 / math.prod(x.shape[:-1]))
    return (mean, var), (average(dx), dvar)


@jax.custom_jvp
def _normalised(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    y = scaled(x, mean, times(inverse_root(lax.add(var, eps)), scale))
    return lax.add(y, along(bias, x))


@_normalised.defjvp
def _normalised_slope(primals: tuple, tangents: tuple) -> tuple:
    """With all that is one number per channel multiplied out before it meets the images.

    So the way back reads them twice, for the two sums per channel that it needs, and for the
    gradient. What JAX derives from the function reads and writes them more often.
    """
    x, mean, var, scale, _, eps = primals
    dx, dmean, dvar, dscale, dbias, _ = tangents
    inverse = inverse_root(lax.add(var, eps))
    factor = times(inverse, scale)
    bent = lax.mul(lax.mul(factor, lax.square(inverse)), dvar / 2)
    turn = lax.sub(times(inverse, dscale), bent)
    shift = lax.sub(dbias, lax.mul(factor, dmean))
    dy = lax.add(lax.mul(dx, along(factor, x)), along(shift, x))
    return _normalised(*primals), lax.add(dy, scaled(x, mean, turn))


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` over the last axis: x [..., features].

    `eps` is 1e-5 by default, as there; vision transformers use 1e-6.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.features, self.eps, self.dtype = features, eps, dtype
        self.scale = init.param((features,), init.ones, rngs, param_dtype)
        self.bias = init.param((features,), init.zeros, rngs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.features:
            raise ValueError(f"expected {self.features} features on the last axis, got {x.shape}")
        wide = accumulation_dtype(x.dtype)
        dtype = self.dtype or self.scale.dtype
        x = x.astype(wide)
        centred = x - jnp.mean(x, -1, keepdims=True)
        var = jnp.mean(jnp.square(centred), -1, keepdims=True)
        y = centred * inverse_root(var + jnp.asarray(self.eps, wide))
        y = y * along_last(self.scale[...].astype(wide), x.ndim)
        return (y + along_last(self.bias[...].astype(wide), x.ndim)).astype(dtype)


class LocalResponseNorm(nnx.Module):
    """`torch.nn.LocalResponseNorm`: x / (k + alpha * mean of squares of `size` channels)^beta.

    The mean divides by `size` at the edges too, where fewer channels stand; papers write a sum,
    so that a paper's alpha is this one's divided by `size`. x [N, H, W, C].
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0):
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def __call__(self, x: jax.Array) -> jax.Array:
        before, after = self.size // 2, (self.size - 1) // 2
        square = jnp.pad(jnp.square(x), [(0, 0)] * (x.ndim - 1) + [(before, after)])
        channels = x.shape[-1]
        total = sum(square[..., i : i + channels] for i in range(self.size))
        return x * (self.k + self.alpha / self.size * total) ** (-self.beta)
