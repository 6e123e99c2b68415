"""Matrix products of images or rows with a kernel, and the faster routine for them on a CPU.

XLA hands a float32 product of a program to YNNPACK. A convolution of one tap along one axis is the
same product, but XLA makes it one only after that, so it goes to Eigen, whose kernels are mostly
faster: 728 channels to 728 at 19x19 take 19 ms in place of 25 on two cores with AVX2, and 20 in
place of 25 with AVX-512 (8 images, jax 0.10.2).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from flax_nets.lowering import select

ROWS = 1 << 10  # below as many, and
WEIGHTS = 1 << 20  # with kernels above as many numbers, YNNPACK is as fast without AVX-512

# Back, Eigen needs the kernel turned first: with AVX-512 that costs what it gains, and the program
# is longer by what turns it. With more terms YNNPACK is up to 1.4 times as far from the truth as
# Eigen and PyTorch.
TERMS = 256


def dot(x, kernel, *, precision, back=False):
    """x [..., I] @ kernel [I, O] -> [..., O], as XLA has it; `back`: x [..., O] @ kernel.T."""
    axes = (((x.ndim - 1,), (int(back),)), ((), ()))
    return lax.dot_general(x, kernel, axes, precision=precision)


def product(x, kernel, precision, back=False):
    """The same, by the faster routine; `back`: x [..., O] @ kernel.T -> [..., I]."""
    if _eigen_is_faster(x, kernel, back):
        return by_eigen(x, kernel, precision, back)
    return dot(x, kernel, precision=precision, back=back)


def by_eigen(x, kernel, precision, back=False):
    """The same by Eigen's routine."""
    y = lax.conv_general_dilated(
        x.reshape(1, -1, x.shape[-1]),
        kernel[None],
        (1,),
        "VALID",
        dimension_numbers=("NWC", "WOI" if back else "WIO", "NWC"),
        precision=precision,
    )
    return y.reshape(*x.shape[:-1], -1)


def added(x, axis: int = 0):
    """The sum of a few large parts along an axis, one by one.

    As a reduction of two parts it takes XLA's CPU backend up to three times as long as the product
    that made them.
    """
    first, *others = (lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis]))
    return sum(others, first)


# YNNPACK shares a product among the threads in pieces of whole rows. Their number doubles from 64
# on, until it and the columns', times the terms of a sum, reach this cost, or a piece this size.
PIECE_ROWS, PIECE_COST, PIECE = 1 << 6, 1 << 16, 1 << 16
PIECE_TERMS = 1 << 10  # as many terms count


def rows_of_a_piece(columns: int, terms: int) -> int:
    """How many rows of a product [rows, columns] YNNPACK gives to a thread at a time."""
    rows, terms = PIECE_ROWS, min(terms, PIECE_TERMS)
    while (rows + columns) * terms < PIECE_COST and rows * columns < PIECE:
        rows *= 2
    return rows


def one_thread(rows, columns: int, terms: int) -> bool:
    """Whether a product is one piece, so that the products of a batch keep one thread busy."""
    known = isinstance(rows, int) and select.alone()
    return known and rows <= rows_of_a_piece(columns, terms)


def _eigen_is_faster(x, kernel, back: bool) -> bool:
    rows, wide = math.prod(x.shape[:-1]), select.wide_vectors()
    if back and wide and kernel.shape[1] <= TERMS:
        return False
    known = isinstance(rows, int) and select.alone()
    many = known and rows >= ROWS and (kernel.size <= WEIGHTS or wide)
    return x.dtype == jnp.float32 and many
