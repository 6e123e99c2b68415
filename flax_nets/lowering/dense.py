"""The matrix product of a dense layer after a flatten or a pooling: few rows, long sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from flax_nets.lowering import select

# XLA's CPU backend adds up the products of a float32 sum one by one, which puts a dense layer of
# 1024 inputs 1.6 to 2 times as far from the truth as PyTorch's. Sums of at most so many, added up
# afterwards, come as near as PyTorch's. They cost what it takes to write the partial sums: nothing
# where there are few outputs in all, 10% with 8 rows of 4096, and too much with more.
BANDS = ((1 << 12, 256), (1 << 15, 512))  # at most so many outputs: sums of at most so many


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [N, I] @ kernel [I, O] -> [N, O], both of one dtype."""
    if select.current() == "xla":
        return x @ kernel
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    arrays = select.agree(x, kernel)
    return dense_p.bind(*arrays, form=select.current(), precision=precision)


def _plain(x, kernel, *, precision):
    return lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), precision=precision)


def _in_bands(x, kernel, *, precision):
    bands = _bands(x, kernel)
    if bands == 1:
        return _plain(x, kernel, precision=precision)
    length = x.shape[1] // bands
    parts = x.reshape(-1, bands, length), kernel.reshape(bands, length, -1)
    # [N, band, i] x [band, i, O] -> [band, N, O]
    return lax.dot_general(*parts, (((2,), (1,)), ((1,), (0,))), precision=precision).sum(0)


def _bands(x, kernel) -> int:
    """The fewest equal bands that are short enough; 1 where there are none, or too many outputs."""
    rows, inputs = x.shape
    if x.dtype != jnp.float32 or not isinstance(rows, int):
        return 1
    longest = next((length for most, length in BANDS if rows * kernel.shape[1] <= most), inputs)
    fewest = -(-inputs // longest)
    return next((n for n in range(fewest, 4 * fewest) if inputs % n == 0), 1)


def _batch(arrays, mapped, primitive, **params):
    if not mapped[1]:
        return select.fold(arrays, mapped, primitive, **params)
    x, kernel = select.broadcast(arrays, mapped)
    return lax.dot_general(x, kernel, (((2,), (1,)), ((0,), (0,))), precision=params["precision"])


dense_p = select.define("dense", _plain, _in_bands, _batch)
ad.defbilinear(
    dense_p,
    lambda g, x, kernel, precision, **_: lax.dot_general(
        g, kernel, (((1,), (1,)), ((), ())), precision=precision
    ),
    lambda g, x, kernel, precision, **_: lax.dot_general(
        x, g, (((0,), (0,)), ((), ())), precision=precision
    ),
)
