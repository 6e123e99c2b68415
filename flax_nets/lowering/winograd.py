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

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_nets.lowering import select
from flax_nets.lowering.product import added, by_eigen, one_thread
from flax_nets.lowering.window import Axis, Window, frame_rows, taken, view

A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
B = np.array([[1, 0, 0, 0], [0, 1, -1, 1], [-1, 1, 1, 0], [0, 0, 0, -1]])
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
    x = _framed(x, window)
    high, wide = ((size - 2) // 2 for size in x.shape[1:3])
    terms, outputs = x.shape[3], kernel.shape[2 if back else 3]
    one_by_one = one_thread(x.shape[0] * high * wide, outputs, terms)
    if back and one_by_one:
        kernel = kernel.swapaxes(2, 3)
    factors = _both(G[:, ::-1] if back else G, x.dtype) @ kernel.reshape(9, -1)
    factors = factors.reshape(16, *kernel.shape[2:])

    def results(x):
        if one_by_one:
            cells = _one_by_one(x, factors, precision)
        else:
            cells = _products(_cells(B.T, x), factors, 2, 2 if back else 1, precision)
        cells = cells.reshape(4, 4, -1, high, wide, cells.shape[2])
        y = _along(A.T, _along(A.T, cells, 1), 0)  # [2, 1, 2, 1, N, tile, tile, O]
        y = y.transpose(4, 5, 0, 1, 6, 2, 3, 7)
        return y.reshape(-1, 2 * high, 2 * wide, y.shape[7])

    if parts == 1:
        y = results(x)
    else:
        y = lax.map(results, x.reshape(parts, -1, *x.shape[1:]))
        y = y.reshape(-1, *y.shape[2:])
    return y[:, : window.rows.out, : window.columns.out]


def _one_by_one(x, factors, precision):
    """All cells' products [16, tiles, O], in a loop that makes the cell as well.

    All 16 in one would keep one thread busy: 96 channels to 208 of 8 images of 14x14 take 3.4 ms
    then, and one by one 2.0 to 2.4.
    """
    tiles = Window(*(Axis(size, 4, 2) for size in x.shape[1:3]))
    terms, signs = _terms(B.T)
    places = np.indices((4, 4)).reshape(2, -1)

    def cell(_, of):
        *two, factor = of  # the terms of a row and a column, of two places each
        (rows, high), (columns, wide) = two
        seen = sum(
            view(x, tiles, rows[i], columns[j]) * (high[i] * wide[j])
            for i in range(2)
            for j in range(2)
        )
        return None, by_eigen(seen.reshape(-1, x.shape[3]), factor, precision)

    two = [(terms[place].astype(np.int32), signs[place].astype(x.dtype)) for place in places]
    return lax.scan(cell, None, (*two, factors))[1]


def _kernel(x, g, window: Window, precision, parts: int, sums: int):
    edges = [(0, axis.out % 2, 0) for axis in window]
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *edges, (0, 0, 0)])

    def products(x, g):
        left, right = _cells(B.T, x), _cells(A, g)
        left, right = (a.reshape(16 * sums, -1, a.shape[2]) for a in (left, right))
        cells = _products(left, right, 1, 1, precision)
        return added(cells.reshape(16, sums, *cells.shape[1:]), 1)

    cells = select.summed(products, parts, _framed(x, window), g)
    kernel = _both(G, x.dtype).T @ cells.reshape(16, -1)
    return kernel.reshape(3, 3, *cells.shape[1:])


def _framed(x, window: Window):
    """Padded for whole tiles."""
    rows, columns = (axis._replace(high=axis.high + axis.out % 2) for axis in window)
    return frame_rows(x, Window(rows, columns))


def _cells(matrix, x):
    """[N, H, W, C] -> [16, tiles, C], of tiles two pixels apart: the matrix along both axes."""
    cells = _along(matrix, _along(matrix, x, 1), 3)  # [N, 4, tile, 4, tile, C]
    return cells.transpose(1, 3, 0, 2, 4, 5).reshape(16, -1, x.shape[3])


def _along(matrix, x, axis: int):
    """[..., pixels, ...] -> [..., rows, tiles, ...]: the matrix times what each tile sees.

    By tables of places and factors, of as few terms as a row has: a sum for each row, put side by
    side, takes XLA twice as long to compile.
    """
    taps = matrix.shape[1]
    found, factors = _terms(matrix)
    starts = 2 * np.arange((x.shape[axis] - taps) // 2 + 1)
    factors = factors.astype(x.dtype)
    seen = [taken(x, axis, place[:, None] + starts) for place in found.T]
    first, *others = (
        part
        if (factor == 1).all()
        else lax.mul(part, lax.broadcast_in_dim(factor, part.shape, (axis,)))
        for part, factor in zip(seen, factors.T, strict=True)
    )
    return functools.reduce(lax.add, others, first)


def _terms(matrix):
    """Of each row, as many as the longest has: their places, [rows, terms], and their factors."""
    terms = np.count_nonzero(matrix, 1).max()
    places = np.argsort(matrix == 0, 1, kind="stable")[:, :terms]
    return places, np.take_along_axis(matrix, places, 1)


def _products(left, right, over_left: int, over_right: int, precision):
    """Three axes each, which XLA takes as they are: more it would bring into another order."""
    axes = (((over_left,), (over_right,)), ((0,), (0,)))
    return lax.dot_general(left, right, axes, precision=precision)


def _both(matrix, dtype):
    """Along both axes of a kernel or a tile, row-major."""
    return jnp.asarray(np.kron(matrix, matrix), dtype)
