"""The geometry that convolutions and poolings share: windows that slide over images."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = int | tuple[int, int]
Padding = Pair | tuple[tuple[int, int], tuple[int, int]]


class Axis(NamedTuple):
    """Windows along one axis of an image.

    Attributes:
      size: of the image, without padding.
      taps: places of the window.
      stride: steps from one window to the next.
      low, high: padding before and after the image; negative numbers crop it.
      dilation: distance between neighbouring taps.
    """

    size: int
    taps: int
    stride: int = 1
    low: int = 0
    high: int = 0
    dilation: int = 1

    @property
    def extent(self) -> int:
        """Rows from the first tap to the last."""
        return (self.taps - 1) * self.dilation + 1

    @property
    def out(self) -> int:
        """The number of windows that fit."""
        return (self.size + self.low + self.high - self.extent) // self.stride + 1

    @property
    def span(self) -> int:
        """Rows from the start of the first window to that of the last."""
        return (self.out - 1) * self.stride + 1

    @property
    def covered(self) -> int:
        """Rows from the first that a window reads to the last, padding included."""
        return self.span - 1 + self.extent

    @property
    def edges(self) -> tuple[int, int]:
        """Rows to add before and after the image, so that it has those that windows read."""
        return self.low, self.covered - self.size - self.low

    @property
    def table(self) -> np.ndarray:
        """[taps, windows]: which row of the framed image a tap of a window reads."""
        rows = np.arange(self.taps)[:, None] * self.dilation
        return rows + np.arange(self.out) * self.stride

    @property
    def tiles(self) -> bool:
        """Whether no row belongs to two windows, or to none between two taps."""
        return self.dilation == 1 and (self.out == 1 or self.stride == self.taps)


class Window(NamedTuple):
    """A window that slides over images [N, H, W, C]."""

    rows: Axis
    columns: Axis

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.rows.out, self.columns.out

    @property
    def taps(self) -> tuple[int, int]:
        """Height and width of the window, in taps."""
        return self.rows.taps, self.columns.taps

    @property
    def stride(self) -> tuple[int, int]:
        return self.rows.stride, self.columns.stride

    @property
    def dilation(self) -> tuple[int, int]:
        return self.rows.dilation, self.columns.dilation

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.rows.low, self.rows.high), (self.columns.low, self.columns.high)


def make(shape: tuple[int, ...], taps: Any, stride: Any, padding: Any, dilation: Any) -> Window:
    """The window over images of `shape` [N, H, W, C], checked.

    Raises:
      ValueError: not four axes, a number out of range, or an image smaller than the window.
    """
    if len(shape) != 4:
        raise ValueError(f"expected images [N, H, W, C] (NHWC, channels last), got shape {shape}")
    sides = (padding, padding) if isinstance(padding, Integral) else tuple(padding)
    if len(sides) != 2:
        raise ValueError(
            f"padding={padding!r}: expected an int, (height, width) or "
            "((top, bottom), (left, right))"
        )
    axes = [
        Axis(size, k, s, low, high, d)
        for size, k, s, (low, high), d in zip(
            shape[1:3],
            pair(taps, "window", 1),
            pair(stride, "stride", 1),
            (pair(side, "padding", 0) for side in sides),
            pair(dilation, "dilation", 1),
            strict=True,
        )
    ]
    if any(axis.size + axis.low + axis.high < axis.extent for axis in axes):
        raise ValueError(
            f"the image is too small: {shape[1]}x{shape[2]} pixels with padding {padding} cannot "
            f"hold a window of {axes[0].extent}x{axes[1].extent} (taps {taps}, dilation "
            f"{dilation}); use larger images, or leave out layers that shrink them"
        )
    return Window(*axes)


def pair(value: Any, name: str, least: int) -> tuple[int, int]:
    """(height, width) of an int or a pair, each at least `least`."""
    both = (value, value) if isinstance(value, Integral) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, Integral) and int(v) >= least for v in both):
        raise ValueError(f"{name}={value!r}: expected an int of at least {least}, or two of them")
    return int(both[0]), int(both[1])


def blank(g: jax.Array, window: Window, channels: int) -> jax.Array:
    """Zeros [N, H, W, channels]: the images of a result `g`, of its type and sharded like it."""
    zero = lax.full_like(g, 0)[:, :1, :1, :1]
    return jnp.broadcast_to(zero, (g.shape[0], window.rows.size, window.columns.size, channels))


def frame(x: jax.Array, window: Window, value: float = 0.0) -> jax.Array:
    """[N, H, W, C] padded with `value`, and cropped to the rows and columns that windows read."""
    edges = [(*axis.edges, 0) for axis in window]
    return lax.pad(x, jnp.asarray(value, x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def frame_rows(x: jax.Array, window: Window) -> jax.Array:
    """The same with zeros, for images that are in memory: the numbers of a row are one axis.

    XLA's CPU backend pads three axes in 0.5 to 0.8 of the time, and compiles that in a third. Where
    it makes the images while it pads them, four axes are faster.
    """
    channels = x.shape[3]
    left, right = (edge * channels for edge in window.columns.edges)
    edges = [(0, 0, 0), (*window.rows.edges, 0), (left, right, 0)]
    x = x.reshape(*x.shape[:2], x.shape[2] * channels)
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    return x.reshape(*x.shape[:2], window.columns.covered, channels)


def views(x: jax.Array, axis: Axis, position: int) -> list[jax.Array]:
    """What each tap sees: the framed `x` at every window, along the array's axis `position`."""
    return [
        lax.slice_in_dim(x, start, start + axis.span, axis.stride, axis=position)
        for start in range(0, axis.taps * axis.dilation, axis.dilation)
    ]


def taps(x: jax.Array, window: Window) -> list[jax.Array]:
    """What each tap sees of the framed `x`, [N, H', W', C], in row-major order."""
    bands = views(x, window.rows, 1)
    return [seen for band in bands for seen in views(band, window.columns, 2)]


def view(x: jax.Array, window: Window, row: jax.Array, column: jax.Array) -> jax.Array:
    """What the tap at that place, two int32, sees of the framed `x`."""
    rows, columns = window
    zero = np.int32(0)
    start = zero, row * rows.dilation, column * columns.dilation, zero
    x = lax.dynamic_slice(x, start, (x.shape[0], rows.span, columns.span, x.shape[3]))
    return lax.slice(x, (0, 0, 0, 0), x.shape, (1, rows.stride, columns.stride, 1))


def places(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of each tap, in row-major order."""
    rows, columns = np.indices(window.taps, np.int32).reshape(2, -1)
    return rows, columns


def taken(x: jax.Array, axis: int, places: np.ndarray) -> jax.Array:
    """`jnp.take` of the places in a table with two axes, all of which are there."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(*range(axis), *range(axis + 2, x.ndim + 1)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    places = places[..., None].astype(np.int32)
    return lax.gather(x, places, numbers, sizes, mode="promise_in_bounds")


def beside(x: jax.Array, window: Window) -> jax.Array:
    """What all taps see of the framed `x`, side by side: [N, H', W', taps * C], row-major.

    A window's columns are neighbouring numbers of a row. So this is a gather of such pieces, which
    XLA's CPU backend copies up to five times as fast as it puts slices side by side, and one of
    rows. Its tables of places are short: exported programs hold them.
    """
    if window.dilation != (1, 1):
        return jnp.concatenate(taps(x, window), 3)
    rows, columns = window
    if columns.taps > 1 or columns.stride > 1:
        channels = x.shape[3]
        x = x.reshape(*x.shape[:2], x.shape[2] * channels)
        x = _pieces(x, 2, columns.table[:1].T * channels, columns.taps * channels)
    if rows.taps > 1 or rows.stride > 1:
        x = _pieces(x, 1, rows.table[:1].T, rows.taps).swapaxes(2, 3)
        x = x.reshape(*x.shape[:3], x.shape[3] * x.shape[4])
    return x


def _pieces(x: jax.Array, axis: int, starts: np.ndarray, length: int) -> jax.Array:
    """So long a piece of an axis from each of the starts [pieces, 1]: [..., piece, place, ...]."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(*range(axis), *range(axis + 1, x.ndim + 1)),
        collapsed_slice_dims=(),
        start_index_map=(axis,),
    )
    sizes = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return lax.gather(x, starts.astype(np.int32), numbers, sizes, mode="promise_in_bounds")


def backwards(axis: Axis) -> Axis:
    """The windows that lead from the results, put `stride` apart, back to the image."""
    low = axis.extent - 1 - axis.low
    high = axis.size + axis.extent - 1 - axis.span - low
    return Axis(axis.span, axis.taps, 1, low, high, axis.dilation)


def phases(axis: Axis) -> list[tuple[slice, Axis]]:
    """The rows of the padded image modulo the stride: which taps reach them, by which windows.

    Tap i of window o reads row o * stride + i * dilation of the padded image.
    """
    common = math.gcd(axis.stride, axis.dilation)
    rows = -(-(axis.low + axis.size) // axis.stride)
    found = []
    for phase in range(axis.stride):
        taps = [i for i in range(axis.taps) if i * axis.dilation % axis.stride == phase]
        first, count = (taps[0], len(taps)) if taps else (axis.taps, 1)
        later, dilation = first * axis.dilation // axis.stride, axis.dilation // common
        low = later + (count - 1) * dilation
        windows = Axis(axis.out, count, 1, low, rows - axis.out - later, dilation)
        found.append((slice(first, None, axis.stride // common), windows))
    return found


def around(g: jax.Array, window: Window, value: float = 0.0) -> Callable[[Window], jax.Array]:
    """A result `g`, framed once for all phases of the stride.

    Returns: (the windows of a phase) -> `g` as `frame` would make it for these, or beyond.
    """
    low, high = (
        [max(getattr(windows, side) for _, windows in phases(axis)) for axis in window]
        for side in ("low", "high")
    )
    edges = zip(window, low, high, strict=True)
    g = frame(g, Window(*(Axis(axis.out, 1, 1, *edge) for axis, *edge in edges)), value)

    def seen(windows: Window) -> jax.Array:
        top, left = (most - axis.low for most, axis in zip(low, windows, strict=True))
        return g[:, top:, left:]

    return seen


def by_phases(part: Callable[[tuple[slice, slice], Window], jax.Array], window: Window):
    """The images [N, H, W, C] of a result: put together from the phases of the stride.

    Args:
      part: (the taps that reach a phase, their windows over the result) -> the phase's pixels.
    """
    bands = []
    for high, rows in phases(window.rows):
        cells = [
            part((high, wide), Window(rows, columns)) for wide, columns in phases(window.columns)
        ]
        bands.append(jnp.stack(cells, 3))
    x = jnp.stack(bands, 2)  # [N, rows, row phases, columns, column phases, C]
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], x.shape[5])
    for position, axis in enumerate(window, start=1):
        x = lax.slice_in_dim(x, axis.low, axis.low + axis.size, axis=position)
    return x
