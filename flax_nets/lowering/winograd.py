"""Convolutions of 3x3 taps with 4 products for each pixel in place of 9.

Winograd's F(2x2, 3x3) after Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks"
(arXiv:1509.09308, section 4.1). With the paper's matrices A, B and G, a tile Y of 2x2 pixels comes
from the 4x4 pixels X that its windows see, and the kernel K sums its own gradient over the tiles:

    Y = A' [(G K G') * (B' X B)] A        dK = G' [(A dY A') * (B' X B)] G

A and B hold 0, 1 and -1 alone and G a half besides, so these sums cost a few roundings, and the
products add up fewer terms: in float32 the result is nearer to the truth than that of 9 products.
Each of the 16 places of a tile (a cell) is a matrix product over all tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_nets.lowering import select
from flax_nets.lowering.window import Axis, Window, frame, views

G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def forward(x, kernel, window: Window, precision):
    """x [N, H, W, I], kernel [3, 3, I, O] -> [N, H', W', O], with a stride of 1."""
    parts = select.parts(x.shape[0], cell_bytes(window, sum(kernel.shape[2:])))
    return select.whole(
        _results, x, kernel, window=window, precision=precision, parts=parts, back=False
    )


def to_image(g, kernel, window: Window, precision):
    """g [N, H', W', O], kernel [3, 3, I, O] -> [N, H, W, I]; `window` leads back from g."""
    parts = select.parts(g.shape[0], cell_bytes(window, sum(kernel.shape[2:])))
    return select.whole(
        _results, g, kernel, window=window, precision=precision, parts=parts, back=True
    )


def to_kernel(x, g, window: Window, precision, sums: int = 1):
    """x [N, H, W, I], g [N, H', W', O] -> the kernel [3, 3, I, O] that x and g make.

    Args:
      sums: of how many equal sums over the tiles each product is made, at least. A power of two
        that divides the number of tiles. Default 1.
    """
    parts = select.parts(x.shape[0], cell_bytes(window, x.shape[3] + g.shape[3]))
    sums = -(-sums // parts)
    return select.whole(_kernel, x, g, window=window, precision=precision, parts=parts, sums=sums)


def tiles(window: Window) -> int:
    """Of an image."""
    return math.prod(-(-out // 2) for out in window.out)


def cell_bytes(window: Window, channels: int) -> int:
    """Of an image's cells in float32."""
    return 16 * 4 * channels * tiles(window)


def _results(x, kernel, window: Window, precision, parts: int, back: bool):
    """Back from a result to its images: the kernel is turned by half, its outputs are `x`'s."""
    factors = _both(G[:, ::-1] if back else G, x.dtype) @ kernel.reshape(9, -1)
    factors = factors.reshape(16, *kernel.shape[2:])
    x = _framed(x, window)
    high, wide = ((size - 2) // 2 for size in x.shape[1:3])

    def results(x):
        cells = _products(_cells(x, 4, _b), factors, 2, 2 if back else 1, precision)
        cells = cells.reshape(4, 4, -1, high, wide, cells.shape[2])
        columns = [_a_transposed(*row) for row in cells]
        rows = [_a_transposed(*column) for column in zip(*columns, strict=True)]
        y = jnp.stack([jnp.stack(row, 2) for row in rows], 4)  # [N, tile, 2, tile, 2, O]
        return y.reshape(-1, 2 * high, 2 * wide, y.shape[5])

    if parts == 1:
        y = results(x)
    else:
        y = lax.map(results, x.reshape(parts, -1, *x.shape[1:]))
        y = y.reshape(-1, *y.shape[2:])
    return y[:, : window.rows.out, : window.columns.out]


def _kernel(x, g, window: Window, precision, parts: int, sums: int):
    edges = [(0, axis.out % 2, 0) for axis in window]
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *edges, (0, 0, 0)])

    def products(x, g):
        left, right = _cells(x, 4, _b), _cells(g, 2, _a)
        left, right = (a.reshape(16 * sums, -1, a.shape[2]) for a in (left, right))
        cells = _products(left, right, 1, 1, precision)
        return cells.reshape(16, sums, *cells.shape[1:]).sum(1)

    cells = select.summed(products, parts, _framed(x, window), g)
    kernel = _both(G, x.dtype).T @ cells.reshape(16, -1)
    return kernel.reshape(3, 3, *cells.shape[1:])


def _framed(x, window: Window):
    """Padded for whole tiles."""
    rows, columns = (axis._replace(high=axis.high + axis.out % 2) for axis in window)
    return frame(x, Window(rows, columns))


def _cells(x, taps: int, transform: Callable):
    """[N, H, W, C] -> [16, tiles, C], of tiles two pixels apart."""
    rows = jnp.stack(transform(*views(x, Axis(x.shape[1], taps, 2), 1)))
    cells = jnp.stack(transform(*views(rows, Axis(rows.shape[3], taps, 2), 3)), 1)
    return cells.reshape(16, -1, x.shape[3])


def _products(left, right, over_left: int, over_right: int, precision):
    """Three axes each, which XLA takes as they are: more it would bring into another order."""
    axes = (((over_left,), (over_right,)), ((0,), (0,)))
    return lax.dot_general(left, right, axes, precision=precision)


def _both(matrix, dtype):
    """Along both axes of a kernel or a tile, row-major."""
    return jnp.asarray(np.kron(matrix, matrix), dtype)


def _a(p, q):
    return p, p + q, p - q, -q


def _a_transposed(p, q, r, s):
    return p + q + r, q - r - s


def _b(p, q, r, s):
    return p - r, q + r, r - q, q - s
