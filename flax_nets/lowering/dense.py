"""The matrix product of a dense layer."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from flax_nets.lowering import select
from flax_nets.lowering.product import added, dot, product

# XLA's CPU backend adds up a thousand products of a float32 sum one by one, PyTorch's some tens to
# a few hundred: a dense layer is then 1.3 to 3 times as far from the truth as PyTorch's. Shorter
# sums, added up afterwards, come as near. They cost what it takes to write them: nothing where
# there are few outputs in all, 10% with 8 rows of 4096, 10 to 25% while they fit the cache, and too
# much with more; with 32 rows all bands' products in one take two to three times as long on AVX2.
FEW = 1 << 11  # outputs, too few for any form to take time
BANDS = ((FEW, 32), (1 << 12, 256), (1 << 15, 512), (640 << 10, 256))  # up to so many: products
FEW_ROWS = 16  # for which the kernel, read once, is all that takes time


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O], both of one dtype."""
    if select.current() == "xla":
        return x @ kernel
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    arrays = select.agree(x, kernel)
    return dense_p.bind(*arrays, form=select.current(), precision=precision)


def _in_bands(x, kernel, *, precision):
    bands = _bands(x, kernel)
    if bands == 1:
        return product(x, kernel, precision)
    length, outputs = x.shape[-1] // bands, kernel.shape[1]
    rows = math.prod(x.shape[:-1])
    if rows > FEW_ROWS and rows * outputs > FEW:
        parts = [
            dot(
                lax.slice_in_dim(x, i * length, (i + 1) * length, axis=-1),
                kernel[i * length : (i + 1) * length],
                precision=precision,
            )
            for i in range(bands)
        ]
        return sum(parts[1:], parts[0])
    # no copies of parts of the kernel: [N, band, i] x [band, i, O] -> [band, N, O]
    split = x.reshape(rows, bands, length), kernel.reshape(bands, length, outputs)
    products = lax.dot_general(*split, (((2,), (1,)), ((1,), (0,))), precision=precision)
    return added(products).reshape(*x.shape[:-1], outputs)


def _bands(x, kernel) -> int:
    """The fewest equal bands that are short enough; 1 where there are none, or too many outputs."""
    inputs = x.shape[-1]
    if x.dtype != jnp.float32 or not all(isinstance(size, int) for size in x.shape):
        return 1
    outputs = math.prod(x.shape[:-1]) * kernel.shape[1]
    longest = next((length for most, length in BANDS if outputs <= most), inputs)
    return equal_parts(inputs, longest)


def equal_parts(length: int, longest: int) -> int:
    """The fewest equal parts of `length`, at most `longest` each; 1 where there are none."""
    fewest = -(-length // longest)
    return next((n for n in range(fewest, 4 * fewest) if length % n == 0), 1)


def _batch(arrays, mapped, primitive, **params):
    if not mapped[1]:
        return select.fold(arrays, mapped, primitive, **params)
    x, kernel = select.broadcast(arrays, mapped)
    axes = (((x.ndim - 1,), (1,)), ((0,), (0,)))
    return lax.dot_general(x, kernel, axes, precision=params["precision"])


def _x_gradient(g, x, kernel, precision, **_):
    return dot(g, kernel, precision=precision, back=True)


def _kernel_gradient(g, x, kernel, **params):
    return to_kernel_p.bind(x, g, **params)


def _plain_to_kernel(x, g, *, precision):
    """x [..., I], g [..., O] -> [I, O]; JAX's transpose knows how the result is sharded."""
    kernel = lax.full_like(g, 0, shape=(x.shape[-1], g.shape[-1]))
    return select.transposed(lambda kernel: dot(x, kernel, precision=precision), kernel, g)


def _to_kernel(x, g, *, precision):
    """Of flat rows: with more axes XLA copies `x` into another order first (docs/design.md)."""
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())), precision=precision)


def _to_kernel_batch(arrays, mapped, primitive, *, precision, **_):
    x, g = select.broadcast(arrays, mapped)
    rows = tuple(range(1, x.ndim - 1))
    return lax.dot_general(x, g, ((rows, rows), ((0,), (0,))), precision=precision)


dense_p = select.define("dense", dot, _in_bands, _batch)
# XLA would have the product's operands made in the order in which it reads them, along the columns:
# that took a tenth of the step of a ViT-B/16, most of it for GELUs.
to_kernel_p = select.define(
    "dense_to_kernel",
    _plain_to_kernel,
    functools.partial(select.whole, _to_kernel),
    _to_kernel_batch,
)
ad.defbilinear(dense_p, _x_gradient, _kernel_gradient)
ad.defbilinear(
    to_kernel_p,
    lambda kernel, x, g, **params: _x_gradient(g, x, kernel, **params),
    lambda kernel, x, g, **params: dense_p.bind(x, kernel, **params),
)
