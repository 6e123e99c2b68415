"""Pooling of NHWC images with PyTorch's semantics, and the forms that it takes on a CPU.

XLA's CPU backend slides windows one number at a time, and scatters their gradients so. Its form
here is separable: rows first, then columns of what is left, each a handful of shifted slices. The
maximum of the rows' first maxima, taken in order, is the first maximum in row-major order, so the
gradients go where PyTorch's go, to one number for each window. The gradient's own form takes all
taps of a window in one pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from flax_nets.lowering import select
from flax_nets.lowering.window import (
    Axis,
    Padding,
    Pair,
    Window,
    around,
    backwards,
    blank,
    by_phases,
    frame,
    make,
    taps,
    views,
)

# Maximum


def max_pool(
    x: jax.Array,
    *,
    window: Pair,
    stride: Pair | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    dilation: Pair = 1,
) -> jax.Array:
    """`torch.nn.functional.max_pool2d`: x [N, H, W, C] -> [N, H', W', C].

    At a tie the gradient goes to the first maximum in row-major order. A NaN wins its window.

    Args:
      x: images of a floating type, channels last.
      window: its height and width: an int or a pair.
      stride: likewise. Default: the window's.
      padding: minus infinities around the image, at most half of the window: an int,
        (height, width) or ((top, bottom), (left, right)). Default 0.
      ceil_mode: whether H' and W' round up: a last window may hang over the edge, as long as it
        starts inside the image or the padding before it. Default False.
      dilation: distance between neighbouring taps. Default 1.

    Raises:
      ValueError: numbers out of range, or an image smaller than the window.
    """
    geometry, _ = _geometry(x, window, stride, padding, ceil_mode, dilation)
    form = select.current()
    if form == "xla":
        return _xla_max(x, window=geometry)
    return max_p.bind(x, window=geometry, form=form)


def _xla_max(x, *, window: Window):
    if window.dilation != (1, 1):  # XLA's gradient knows no dilation
        return _first_max(x, window)
    return lax.reduce_window(
        x,
        -np.inf,
        lax.max,
        (1, *window.taps, 1),
        (1, *window.stride, 1),
        ((0, 0), *window.padding, (0, 0)),
    )


def _cpu_max(x, *, window: Window):
    return _separable(lambda parts: functools.reduce(lax.max, parts), x, window, -np.inf)


def _first_max(x, window: Window):
    """The same maximum as a chain of choices, which shows JAX the way of the gradient."""
    return _separable(lambda parts: functools.reduce(_later_if_greater, parts), x, window, -np.inf)


def _later_if_greater(first, second):
    return lax.select(_greater(second, first), second, first)


def _greater(second, first):
    """Or not a number. In functions of `jax.lax`, which trace sooner than operators."""
    return lax.bitwise_or(lax.gt(second, first), lax.ne(second, second))


def _to_winners(x, tangent, *, window: Window, maximum: Callable):
    """The tangent at each window's first maximum: from the images' to the result's."""
    return jax.jvp(lambda x: maximum(x, window=window), (x,), (tangent,))[1]


def _from_winners(x, g, *, window: Window, maximum: Callable):
    """Its transpose: each window's cotangent goes to its first maximum."""
    return jax.vjp(lambda x: maximum(x, window=window), x)[1](g)[0]


TAPS = 25  # of windows whose gradient compiles fast: it looks at each of them by itself


def _cpu_from_winners(x, g, *, window: Window):
    """Which tap won is kept as a number; each place of the image looks for the windows it won.

    Both are in memory: XLA would make either anew for each phase that reads it without its frame.
    """
    if math.prod(window.taps) > TAPS:
        return _from_winners(x, g, window=window, maximum=_xla_max)
    place = select.whole(_place, x, window=window)
    return select.whole(_given, g, place, window=window)


def _place(x, window: Window):
    """The number of the tap that wins each window."""
    return _winners(taps(frame(x, window, -np.inf), window))


def _given(g, place, window: Window):
    """What each place of the image won."""
    numbers = np.arange(math.prod(window.taps), dtype=np.int8).reshape(window.taps)
    framed = around(g, window), around(place, window, -1)

    def phase(reaching, windows: Window):
        seen = (taps(a(windows), windows) for a in framed)
        wanted = numbers[reaching][::-1, ::-1].ravel()  # none, where no tap reaches the phase
        zeros = jnp.zeros((g.shape[0], *windows.out, g.shape[3]), g.dtype)
        won = (
            lax.select(lax.eq(where, lax.full_like(where, n)), part, zeros)
            for n, part, where in zip(wanted, *seen, strict=False)
        )
        return functools.reduce(lax.add, won, zeros)

    return by_phases(phase, window)


def _winners(parts) -> jax.Array:
    """Whose the first maximum of arrays is, element by element."""
    best, place = parts[0], jnp.zeros(parts[0].shape, np.int8)
    for number, part in enumerate(parts[1:], start=1):
        later = _greater(part, best)
        best = lax.select(later, part, best)
        place = lax.select(later, lax.full_like(place, number), place)
    return place


def _separable(reduce: Callable, x, window: Window, value: float):
    """[N, H, W, C] -> [N, H', W', C]: `reduce` what the columns see, then what the rows see."""
    x = reduce(views(frame(x, window, value), window.columns, 2))
    return reduce(views(x, window.rows, 1))


def _fold(arrays, mapped, primitive, **params):
    arrays = select.broadcast(arrays, mapped)
    return select.fold(arrays, [True] * len(arrays), primitive, **params)


def _result_shape(x, *_, window: Window):
    return x.shape[0], *window.out, x.shape[3]


def _image_shape(x, *_, window: Window):
    return x.shape[0], window.rows.size, window.columns.size, x.shape[3]


_define = functools.partial(select.define, batch=_fold)

max_p = _define("max_pool", _xla_max, _cpu_max, shape=_result_shape)
to_winners_p, from_winners_p = (
    _define(f"max_pool{way.__name__}", functools.partial(way, maximum=_xla_max), fast, shape=shape)
    for way, fast, shape in (
        (_to_winners, functools.partial(_to_winners, maximum=_first_max), _result_shape),
        (_from_winners, _cpu_from_winners, _image_shape),
    )
)


def _transposed(inverse) -> Callable:
    def rule(g, x, linear, **params):
        if type(g) is ad.Zero:
            return [None, ad.Zero(linear.aval)]
        return [None, inverse.bind(x, g, **params)]

    return rule


ad.defjvp(max_p, lambda tangent, x, **params: to_winners_p.bind(x, tangent, **params))
for _way, _back in ((to_winners_p, from_winners_p), (from_winners_p, to_winners_p)):
    # linear in the second operand; which number wins does not change under small changes of x
    ad.defjvp(_way, None, lambda t, x, _, way=_way, **params: way.bind(x, t, **params))
    ad.primitive_transposes[_way] = _transposed(_back)


# Mean


def avg_pool(
    x: jax.Array,
    *,
    window: Pair,
    stride: Pair | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> jax.Array:
    """`torch.nn.functional.avg_pool2d`: x [N, H, W, C] -> [N, H', W', C]; arguments of `max_pool`.

    Args:
      count_include_pad: whether the zeros of the padding count in the mean. Rows beyond the
        padding, which `ceil_mode` adds, never do. Default True.
    """
    geometry, high = _geometry(x, window, stride, padding, ceil_mode, 1)
    counts = [
        _counts(axis, end if count_include_pad else None)
        for axis, end in zip(geometry, high, strict=True)
    ]
    form = select.current()
    wide = _widened(x)
    if form == "xla":
        total = _xla_sum(wide, window=geometry)
    else:
        total = sum_p.bind(wide, window=geometry, form=form)
    divisor = np.multiply.outer(*counts).reshape(1, *geometry.out, 1)
    return (total / jnp.asarray(divisor, total.dtype)).astype(x.dtype)


def _counts(axis: Axis, high: int | None) -> np.ndarray:
    """Numbers that each window averages; padding counts up to `high`, or not at all (None)."""
    starts = np.arange(axis.out) * axis.stride - axis.low
    if high is None:
        return np.minimum(starts + axis.taps, axis.size) - np.maximum(starts, 0)
    return np.minimum(starts + axis.taps, axis.size + high) - starts


def _xla_sum(x, *, window: Window):
    return lax.reduce_window(
        x,
        0.0,
        lax.add,
        (1, *window.taps, 1),
        (1, *window.stride, 1),
        ((0, 0), *window.padding, (0, 0)),
    )


def _cpu_sum(x, *, window: Window):
    return _separable(sum, x, window, 0.0)


def _spread(g, *, window: Window, total: Callable):
    """The transpose: each window's cotangent goes to all that it sees."""
    return select.transposed(lambda x: total(x, window=window), blank(g, window, g.shape[3]), g)


def _cpu_spread(g, *, window: Window):
    if window.stride == (1, 1):
        return _cpu_sum(g, window=Window(*map(backwards, window)))
    return _spread(g, window=window, total=_cpu_sum)


sum_p = _define("sum_pool", _xla_sum, _cpu_sum, shape=_result_shape)
spread_p = _define(
    "sum_pool_spread",
    functools.partial(_spread, total=_xla_sum),
    functools.partial(select.whole, _cpu_spread),
    shape=_image_shape,
)
ad.deflinear2(sum_p, lambda g, x, **params: [spread_p.bind(g, **params)])
ad.deflinear2(spread_p, lambda x, g, **params: [sum_p.bind(x, **params)])


# Windows that follow from the output's size, and whole axes


Size = int | Sequence[int | None] | None


def adaptive_avg_pool(x: jax.Array, output_size: Size) -> jax.Array:
    """`torch.nn.functional.adaptive_avg_pool2d`: x [N, H, W, C] -> [N, H', W', C].

    Window i of an axis runs from floor(i * H / H') to ceil((i + 1) * H / H'): windows overlap where
    H' does not divide H.

    Args:
      x: images, channels last.
      output_size: H' and W', an int or a pair; None keeps the image's size.

    Raises:
      ValueError: an output size that is not positive, or not two of them.
    """
    return _adapted(jnp.mean, _widened(x), _sizes(x, output_size)).astype(x.dtype)


def adaptive_max_pool(x: jax.Array, output_size: Size) -> jax.Array:
    """`torch.nn.functional.adaptive_max_pool2d`; arguments and windows of `adaptive_avg_pool`.

    At a tie the gradient goes to the first maximum in row-major order.
    """
    return _adapted(_max_along, x, _sizes(x, output_size))


def _max_along(x, axis: int):
    return _maximum(x, (axis,))


def _sizes(x, output_size: Size) -> tuple[int, int]:
    if x.ndim != 4:
        raise ValueError(f"expected images [N, H, W, C] (NHWC, channels last), got shape {x.shape}")
    whole = output_size is None or isinstance(output_size, Integral)
    sizes: Any = (output_size, output_size) if whole else output_size
    if len(sizes) != 2 or any(size is not None and size < 1 for size in sizes):
        raise ValueError(
            f"output_size={output_size!r}: expected a positive int, None, or two of them"
        )
    height, width = (
        size if out is None else int(out) for size, out in zip(x.shape[1:3], sizes, strict=True)
    )
    return height, width


@functools.partial(jax.jit, static_argnums=(0, 2))
def _adapted(reduce: Callable, x, sizes: tuple[int, int]):
    for axis in (2, 1):  # so the first maximum in row-major order is the first of each
        size, out = x.shape[axis], sizes[axis - 1]
        if out == size:
            continue
        if size % out == 0:
            x = x.reshape(*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
            x = reduce(x, axis + 1)
            continue
        bins = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
        parts = [lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in bins]
        x = jnp.stack([reduce(part, axis) for part in parts], axis)
    return x


def global_max(x: jax.Array, axis: int | Sequence[int], keepdims: bool = False) -> jax.Array:
    """`jnp.max` whose gradient goes to the first maximum, where `jnp.max` shares it at a tie.

    Args:
      x: any shape, of a floating type.
      axis: one axis or several; among several, first means first in row-major order.
      keepdims: whether the axes stay, with length 1. Default False.
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(sorted(range(x.ndim)[axis] for axis in axes))
    out = _maximum(x, axes)
    return jnp.expand_dims(out, axes) if keepdims else out


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _maximum(x, axes: tuple[int, ...]):
    return jnp.max(x, axes)


@_maximum.defjvp
def _(axes: tuple[int, ...], primals, tangents):
    (x,), (tangent,) = primals, tangents
    first = first_p.bind(lax.stop_gradient(x), along=axes, form=select.current())
    won = _places(x, axes) == jnp.expand_dims(first, axes)
    return _maximum(x, axes), jnp.sum(jnp.where(won, tangent, jnp.zeros_like(tangent)), axes)


def _places(x, axes: tuple[int, ...]):
    """Each number's place along the axes, in row-major order."""
    place = lax.full_like(x, 0, np.int32)
    for axis in axes:
        place = place * x.shape[axis] + lax.broadcasted_iota(np.int32, x.shape, axis)
    return place


def _first_place(x, *, along: tuple[int, ...]):
    """Of the maximum, from one reduction of numbers and places together.

    Not that of the number which equals the maximum: a compiler may make `x` anew for a comparison,
    and round it otherwise. Then no number is equal, and the gradient is lost.
    """
    place = _places(x, along)
    for axis in reversed(along):
        x, place = _first_of(x, place, axis)
    return place


PLACES = 1 << 24  # which float32 tells apart


def _cpu_first_place(x, *, along: tuple[int, ...]):
    """By comparison with `x` in memory: two plain reductions, in a sixth of the time or less."""
    if select.alone() and math.prod(x.shape[axis] for axis in along) <= PLACES:
        return select.whole(_first_equal, x, along=along)
    return _first_place(x, along=along)


def _first_equal(x, along: tuple[int, ...]):
    """Places are floating, since XLA's CPU backend is slow to reduce integers."""
    x = _widened(x)
    most = jnp.max(x, along, keepdims=True)
    found = (x == most) | ((x != x) & (most != most))
    place = jnp.where(found, _places(x, along).astype(x.dtype), np.inf)
    return jnp.min(place, along).astype(np.int32)


def _first_of(x, place, axis: int):
    """The maximum along an axis, a NaN if there is one, and its place, the lowest at a tie."""

    def later(one, other):
        (a, i), (b, j) = one, other
        before = (j < i) & ((a == b) | ((a != a) & (b != b)))
        wins = (b > a) | ((b != b) & (a == a)) | before
        return lax.select(wins, b, a), lax.select(wins, j, i)

    least = np.array(-np.inf, x.dtype), np.array(np.iinfo(np.int32).max, np.int32)
    return lax.reduce((x, place), least, later, (axis,))


def _deeper(arrays, mapped, primitive, *, along, **params):
    return primitive.bind(*arrays, along=tuple(axis + 1 for axis in along), **params)


first_p = select.define("first_maximum", _first_place, _cpu_first_place, _deeper)


# Checks


def _geometry(x, window, stride, padding, ceil_mode: bool, dilation):
    """The window, its padding after the image as `ceil_mode` needs it, and as it was given."""
    given = make(x.shape, window, window if stride is None else stride, padding, dilation)
    if any(2 * max(axis.low, axis.high) > axis.extent for axis in given):
        raise ValueError(
            f"padding={padding!r} is more than half of the window {window!r} "
            f"(dilation {dilation!r})"
        )
    high = [axis.high for axis in given]
    if not ceil_mode:
        return given, high
    axes = []
    for axis in given:
        out = -(-(axis.size + axis.low + axis.high - axis.extent) // axis.stride) + 1
        if (out - 1) * axis.stride >= axis.size + axis.low:
            out -= 1
        covered = (out - 1) * axis.stride + axis.extent
        axes.append(axis._replace(high=max(covered - axis.size - axis.low, 0)))
    return Window(*axes), high


def _widened(x):
    """Sums of 16-bit numbers are taken in float32, as PyTorch takes them."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
