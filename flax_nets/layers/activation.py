"""Activations whose gradients at the kinks are PyTorch's.

At a kink a subgradient is a choice: PyTorch's ReLU6 and hard-sigmoid give 0 there, while a
minimum of a maximum shares the gradient. Quantised and ReLU'd inputs do sit on kinks.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_nets.layers.norm import accumulation_dtype

sigmoid = jax.nn.sigmoid
tanh = jnp.tanh
silu = jax.nn.silu

SIXTH = float(np.float32(1 / 6))
ROOT_HALF = math.sqrt(0.5)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), gradient 0 at 0 (`torch.nn.ReLU`).

    A choice between two arrays is computed once. `jnp.maximum(x, 0)` has one array to read, and
    XLA's CPU backend computes such an operation, and what leads to it, anew for each of its
    readers: down a stage of a ResNet, the sums of all blocks before.

    In functions of `jax.lax`, which trace sooner than operators: a network has many of these.
    """
    zeros = lax.full_like(x, 0)
    return lax.select(lax.le(x, zeros), zeros, x)


@relu.defjvp
def _relu_slope(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y, zeros = relu(x), lax.full_like(tangent, 0)
    return y, lax.select(lax.le(y, zeros), zeros, tangent)


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), exact: the tanh approximation is another function.

    By the error function, as `torch.nn.GELU` has it. `jax.nn.gelu` takes its complement, for which
    XLA's CPU backend needs three times as long.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    return (wide * _phi(wide)).astype(x.dtype)


@jax.custom_jvp
def _phi(x: jax.Array) -> jax.Array:
    """The distribution function of the normal distribution."""
    return 0.5 * (1 + lax.erf(x * ROOT_HALF))


@_phi.defjvp
def _phi_slope(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The density. JAX 0.12 has `lax.erf` without a derivative inside `jax.shard_map`."""
    (x,), (tangent,) = primals, tangents
    return _phi(x), tangent * (jnp.exp(-0.5 * jnp.square(x)) * (ROOT_HALF / math.sqrt(math.pi)))


@jax.custom_jvp
def relu6(x: jax.Array) -> jax.Array:
    """min(max(x, 0), 6), gradient 0 at both ends (`torch.nn.ReLU6`)."""
    zeros = lax.full_like(x, 0)
    return lax.select(lax.le(x, zeros), zeros, lax.min(x, lax.full_like(x, 6)))  # as in `relu`


@relu6.defjvp
def _relu6_slope(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y, zeros = relu6(x), lax.full_like(tangent, 0)
    outside = lax.bitwise_or(lax.le(y, zeros), lax.ge(y, lax.full_like(y, 6)))
    return y, lax.select(outside, zeros, tangent)


@jax.custom_jvp
def hard_sigmoid(x: jax.Array) -> jax.Array:
    """relu6(x + 3) / 6 (`torch.nn.Hardsigmoid`).

    Its slope is 1/6 rounded to float32, as PyTorch's is in every dtype: 3e-8 from 1/6.
    """
    return relu6(x + 3) / 6


@hard_sigmoid.defjvp
def _hard_sigmoid_slope(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    inside = (x > -3) & (x < 3)
    return hard_sigmoid(x), jnp.where(inside, SIXTH * tangent, jnp.zeros_like(tangent))


def hard_swish(x: jax.Array) -> jax.Array:
    """x * relu6(x + 3) / 6 (`torch.nn.Hardswish`)."""
    return x * (relu6(x + 3) / 6)  # last a product of two arrays, as in `relu`
