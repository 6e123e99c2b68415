"""Convolutions of NHWC images with HWIO kernels, and the forms that they take on a CPU.

A convolution is linear in the images and linear in the kernel. So it comes with two partners, its
transpose with respect to each, and the derivative of any of the three is again one of the three:

    forward(x, kernel) -> y     to_image(g, kernel) -> like x     to_kernel(x, g) -> like kernel

Derivatives of every order, forward and reverse, and `vmap` over images, kernels or both stay within
these three primitives. Each has XLA's own form, and three families of forms for the CPU, where
XLA's backend is slow for all but plain dense convolutions:

- dense: `lax.conv_general_dilated` in the one order of axes that XLA runs fast (it rearranges the
  others at the top level of a program, but not inside a loop, where they run a hundred times
  slower), in float32 with images side by side or channels along the columns, where it would keep
  one thread busy; or patches and one matrix product, or a product for each tap; or, for 3x3 taps,
  fewer products (`winograd`);
- depthwise: a sum of shifted, scaled images;
- grouped: groups merged into a few wider, block-diagonal dense convolutions; with kernels of 1x1 a
  matrix product for each group.

A TPU takes XLA's own, but for kernels' gradients with few channels and for groups that fill its
matrix unit together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from flax_nets.lowering import select, winograd
from flax_nets.lowering.dense import equal_parts
from flax_nets.lowering.product import added, product, rows_of_a_piece
from flax_nets.lowering.window import (
    Axis,
    Padding,
    Pair,
    Window,
    around,
    backwards,
    beside,
    blank,
    by_phases,
    frame,
    frame_rows,
    make,
    places,
    taken,
    taps,
    view,
    views,
)

LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> jax.Array:
    """`torch.nn.functional.conv2d` without bias: x [N, H, W, I * groups] -> [N, H', W', O].

    Args:
      x: images, channels last.
      kernel: [height, width, I, O], of the same dtype. Output channels come group by group.
      stride: an int or (height, width). Default 1.
      padding: zeros around the image: an int, (height, width) or ((top, bottom), (left, right)).
        Default 0.
      dilation: distance between neighbouring taps. Default 1.
      groups: of channels that do not see each other; divides O. Default 1.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an image smaller than the kernel.
    """
    if kernel.ndim != 4:
        raise ValueError(
            f"expected a kernel [height, width, I, O] (HWIO), got shape {kernel.shape}"
        )
    window = make(x.shape, kernel.shape[:2], stride, padding, dilation)
    if x.shape[3] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"images {x.shape} (NHWC, channels last) have {x.shape[3]} channels, but a kernel "
            f"{kernel.shape} (HWIO) with groups={groups} takes {kernel.shape[2] * groups} and "
            f"gives {kernel.shape[3]}, which groups must divide"
        )
    if x.dtype != kernel.dtype:
        raise ValueError(
            f"the images are {x.dtype}, the kernel is {kernel.dtype}: cast one of them"
        )
    params = {
        "window": window,
        "groups": groups,
        # lowering comes later, perhaps outside a `with jax.default_matmul_precision(...)`
        "precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }
    form = select.current()
    if form == "xla":
        return _xla_forward(x, kernel, **params)
    return forward_p.bind(*select.agree(x, kernel), form=form, **params)


# XLA's own forms


def _xla_forward(x, kernel, *, window, groups, precision):
    return lax.conv_general_dilated(
        x,
        kernel,
        window.stride,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
        precision=precision,
    )


def _xla_to_image(g, kernel, **params):
    x = _image(g, kernel, params["window"], params["groups"])
    return select.transposed(lambda x: _xla_forward(x, kernel, **params), x, g)


def _xla_to_kernel(x, g, **params):
    kernel = _kernel(x, g, params["window"], params["groups"])
    return select.transposed(lambda kernel: _xla_forward(x, kernel, **params), kernel, g)


def _image(g, kernel, window: Window, groups: int = 1, precision=None):
    """Zeros of the images' type."""
    return blank(g, window, kernel.shape[2] * groups)


def _kernel(x, g, window: Window, groups: int = 1, precision=None):
    """Zeros of the kernel's type."""
    return lax.full_like(g, 0, shape=_kernel_shape(x, g, window, groups))


def _result_shape(x, kernel, window: Window, groups: int, precision):
    return x.shape[0], *window.out, kernel.shape[3]


def _image_shape(g, kernel, window: Window, groups: int, precision):
    return g.shape[0], window.rows.size, window.columns.size, kernel.shape[2] * groups


def _kernel_shape(x, g, window: Window, groups: int, precision=None):
    return *window.taps, x.shape[3] // groups, g.shape[3]


# On a TPU: as its compiler plans them (jax 0.10.2, v5e)

LANES = 128  # the side of its matrix unit


def _tpu_forward(x, kernel, *, window: Window, groups, precision):
    return _tpu_blocks(_xla_forward, x, kernel, window, groups, precision)


def _tpu_to_image(g, kernel, *, window: Window, groups, precision):
    return _tpu_blocks(_xla_to_image, g, kernel, window, groups, precision)


def _tpu_blocks(plain: Callable, images, kernel, window: Window, groups, precision):
    blocks = _lane_blocks(groups, kernel.shape)
    if not blocks:
        return plain(images, kernel, window=window, groups=groups, precision=precision)
    parts = zip(jnp.split(images, blocks, 3), _merged(kernel, groups, blocks), strict=True)
    dense = functools.partial(plain, window=window, groups=1, precision=precision)
    return jnp.concatenate([dense(*part) for part in parts], 3)


def _tpu_to_kernel(x, g, *, window: Window, groups, precision):
    """As patches and a product for images of one channel, and for few channels to few.

    As a convolution of images with windows of their own size, which is XLA's form, LeNet's first
    layer and CBAM's attention to places each keep the compiler busy for more than five minutes.
    """
    inputs, outputs = x.shape[3], g.shape[3]
    dense = functools.partial(_xla_to_kernel, window=window, groups=1, precision=precision)
    if groups > 1:
        kernel = _kernel(x, g, window, groups)
        blocks = _lane_blocks(groups, kernel.shape)
        if not blocks:
            return _xla_to_kernel(x, g, window=window, groups=groups, precision=precision)
        parts = zip(jnp.split(x, blocks, 3), jnp.split(g, blocks, 3), strict=True)
        merged = jnp.stack([dense(*part) for part in parts])
        return select.transposed(lambda kernel: _merged(kernel, groups, blocks), kernel, merged)
    if inputs > 1 and inputs * outputs > 16:
        return dense(x, g)
    places = ((0, 1, 2), (0, 1, 2))
    patches = _sliced_patches(x, window)
    product = lax.dot_general(patches, g, (places, ((), ())), precision=precision)
    return product.reshape(*window.taps, inputs, outputs)


def _lane_blocks(groups: int, shape: tuple[int, ...]) -> int:
    """How many dense blocks, each as wide as the matrix unit, the groups merge into; 0 if none.

    Such a block costs that unit no more than one narrow group does, and XLA's grouped form copies
    images of several blocks into another layout and back: two blocks of a ResNeXt's third stage
    read and write 8.0 GB in place of 9.8. More than eight would take long to compile.
    """
    blocks = shape[3] // LANES
    whole = shape[2] * groups == shape[3] == blocks * LANES
    merging = 1 <= blocks <= 8 and groups > blocks and groups % blocks == 0
    return blocks if whole and merging and shape[2] > 1 else 0


# Dense, on CPU


def _dense_forward(x, kernel, window: Window, precision, groups=1):
    if _winograd(x, window, *kernel.shape[2:]):
        return winograd.forward(x, kernel, window, precision)
    if _flat(window):
        return _patch_product(x, kernel, window, precision)
    if _outside(window) or _few_places(x, kernel, window) or _narrow(kernel):
        return select.whole(_patch_product, x, kernel, window=window, precision=precision)
    return _direct(x, kernel, window, precision)


def _direct(x, kernel, window: Window, precision):
    if _wide(x, kernel, window):
        return _taller(x, kernel, window, precision)
    if not _many_channels(kernel, window):
        return _side_by_side(x, kernel, window, precision)
    parts = select.parts(x.shape[0], _patch_bytes(window, x.shape[3]))
    if window.rows.taps == 1 and parts == 1:
        return select.whole(_patch_product, x, kernel, window=window, precision=precision)
    if not select.alone():
        return _xla_forward(x, kernel, window=window, groups=1, precision=precision)
    return _tap_products(x, kernel, window, precision)


def _dense_to_image(g, kernel, window: Window, precision, groups=1):
    back = Window(*map(backwards, window))
    if window.stride == (1, 1) and _winograd(g, back, *kernel.shape[2:]):
        return winograd.to_image(g, kernel, back, precision)
    if window.taps == window.stride == (1, 1) and window.padding == ((0, 0), (0, 0)):
        return product(g, kernel[0, 0], precision, back=True)
    slow = _outside(back) or _naive_stride(g, window)
    if _flat(window) or slow or _few_places(g, kernel, window):
        x = _image(g, kernel, window)
        seen = product(g, kernel.reshape(-1, kernel.shape[3]), precision, back=True)
        return select.transposed(lambda x: _sliced_patches(x, window), x, seen)
    if window.stride == (1, 1):
        return _direct(g, _turned(kernel), back, precision)
    if g.dtype == jnp.float32 and kernel.shape[2] >= 16:
        return _by_phases(
            lambda part, window: _dense_forward(g, part.swapaxes(2, 3), window, precision),
            kernel.shape[2],
            g,
            kernel,
            window,
        )
    return lax.conv_general_dilated(
        g,
        _turned(kernel),
        (1, 1),
        back.padding,
        lhs_dilation=window.stride,
        rhs_dilation=window.dilation,
        dimension_numbers=LAYOUT,
        precision=precision,
    )


def _turned(kernel):
    """By half a turn, outputs first: [h, w, I, O] -> [h, w, O, I].

    With all taps as one axis, which XLA compiles in half of the time.
    """
    taps = kernel.reshape(-1, *kernel.shape[2:])[::-1].swapaxes(1, 2)
    return taps.reshape(*kernel.shape[:2], *taps.shape[1:])


def _dense_to_kernel(x, g, window: Window, precision, groups=1):
    if _winograd(x, window, x.shape[3], g.shape[3]) and (sums := _winograd_sums(x, g, window)):
        return winograd.to_kernel(x, g, window, precision, sums)
    inputs, outputs = x.shape[3], g.shape[3]
    many = min(inputs, outputs) >= MANY
    if _both(x, g, window):
        form, size = _both_to_kernel, _both_bytes(window, inputs, outputs)
    elif _flat(window) or _few_channels(x, g) or (many and window.rows.taps == 1):
        form, size = _patches_to_kernel, _patch_bytes(window, inputs)
    elif not _small(window):
        places = g.shape[0] * window.out[0] * window.out[1]
        known = isinstance(places, int) and places > 0 and select.alone()
        banded = x.dtype == jnp.float32 and known
        return _kernel_by_bands(x, g, window, precision, -(-places // BAND) if banded else 1)
    elif many and select.alone():
        form, size = _taps_to_kernel, 0
    else:
        form, size = _rows_to_kernel, _beside_bytes(window, inputs, outputs)
    parts = select.parts(x.shape[0], size)
    kernel = select.whole(
        _in_parts, x, g, form=form, window=window, precision=precision, parts=parts
    )
    kernel = added(kernel, kernel.ndim - 3)  # out here it is part of what reads it
    if form is _both_to_kernel:
        return _by_strides(kernel, window, outputs)
    if form is _rows_to_kernel and _cotangents_beside(window, inputs, outputs):
        kernel = _upright(kernel, window.columns.taps * outputs)
        kernel = kernel.reshape(*kernel.shape[:2], -1, outputs)[:, :, ::-1].swapaxes(1, 2)
    return _upright(kernel, outputs).reshape(*window.taps, inputs, outputs)


def _kernel_conv(x, g, window: Window, precision):
    """A convolution of the images with the cotangent, images and channels having traded places.

    In float32 the images' channels stand along its columns, so that its result is wide:
    tap by tap, and channel by channel within a tap.
    """
    if x.dtype == jnp.float32 and window.columns.dilation == 1:
        channels = x.shape[3]
        kernel = lax.conv_general_dilated(
            x.transpose(1, 2, 3, 0).reshape(1, x.shape[1], -1, x.shape[0]),  # [1, H, W * I, N]
            g.transpose(1, 2, 0, 3),  # [H', W', N, O]
            (window.rows.dilation, 1),
            [window.rows.edges, tuple(edge * channels for edge in window.columns.edges)],
            rhs_dilation=(window.rows.stride, window.columns.stride * channels),
            dimension_numbers=LAYOUT,
            precision=precision,
        )
        return kernel.reshape(*window.taps, channels, -1)
    kernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),  # [I, H, W, N]
        g.transpose(1, 2, 0, 3),  # [H', W', N, O]
        window.dilation,
        [axis.edges for axis in window],
        rhs_dilation=window.stride,
        dimension_numbers=LAYOUT,
        precision=precision,
    )
    return kernel.transpose(1, 2, 0, 3)


def _in_parts(x, g, form: Callable, window: Window, precision, parts: int):
    """The sum of what a form makes of so many parts of the images."""
    return select.summed(lambda x, g: form(x, g, window, precision), parts, x, g)


def _both_to_kernel(x, g, window: Window, precision):
    """One product, with the taps of a row side by side in the images and rows in the cotangent.

    Where there is a stride, the rows of a stride stand beside each other in the images.
    """
    rows, columns = window
    strides, step = _strides(rows), rows.stride
    places = rows.out + strides - 1
    high = places * step - rows.size - rows.low
    blocks = Window(Axis(rows.size, step, step, rows.low, high), columns)
    apart = Window(Axis(rows.out, strides, 1, strides - 1, strides - 1), Axis(columns.out, 1))
    x, g = (beside(frame_rows(a, seen), seen) for a, seen in ((x, blocks), (g, apart)))
    return _product(x, g, precision)


def _by_strides(kernel, window: Window, outputs: int):
    """What `_both_to_kernel` makes, [taps of a stride * I, strides * O], as a kernel."""
    strides = _strides(window.rows)
    kernel = _upright(kernel, strides * outputs)
    kernel = kernel.reshape(window.rows.stride, -1, strides, outputs)[:, :, ::-1]
    kernel = kernel.transpose(2, 0, 1, 3).reshape(strides * window.rows.stride, -1, outputs)
    return kernel[: window.rows.taps].reshape(*window.taps, -1, outputs)


def _both_bytes(window: Window, inputs: int, outputs: int) -> int:
    """Of what lies side by side for an image, in float32."""
    rows, columns = window
    strides = _strides(rows)
    beside = rows.stride * columns.taps * inputs + strides * outputs
    return 4 * (rows.out + strides - 1) * columns.out * beside


def _strides(rows: Axis) -> int:
    """How many strides hold the taps."""
    return -(-rows.taps // rows.stride)


def _rows_to_kernel(x, g, window: Window, precision):
    """A product for each row of taps, in which its taps lie side by side.

    Either the images' columns do, or the cotangent's, a column apart: whichever copies less.
    """
    taps, x = window.columns.taps, frame_rows(x, window)
    if _cotangents_beside(window, x.shape[3], g.shape[3]):
        columns = Axis(window.columns.out, taps, 1, taps - 1, taps - 1)
        apart = Window(Axis(window.rows.out, 1), columns)
        g = beside(frame_rows(g, apart), apart)
    else:
        x = _columns_beside(x, window)
    return jnp.stack([_product(row, g, precision) for row in views(x, window.rows, 1)])


def _columns_beside(x, window: Window):
    """The framed `x` with the taps of a row side by side: [N, H, W', columns of taps * C]."""
    return beside(x, Window(Axis(x.shape[1], 1), window.columns))


def _taps_to_kernel(x, g, window: Window, precision):
    """A product for each tap, in a loop: with many channels rows of taps gain nothing."""
    x = frame_rows(x, window)
    return lax.map(lambda place: _product(view(x, window, *place), g, precision), places(window))


def _patches_to_kernel(x, g, window: Window, precision):
    """One product with patches."""
    return _product(_patches(x, window), g, precision)


def _cotangents_beside(window: Window, inputs: int, outputs: int) -> bool:
    return outputs <= inputs and window.stride == window.dilation == (1, 1)


def _beside_bytes(window: Window, inputs: int, outputs: int) -> int:
    """Of what lies side by side for an image, in float32."""
    least = outputs if _cotangents_beside(window, inputs, outputs) else inputs
    return 4 * window.rows.covered * window.columns.out * window.columns.taps * least


# XLA adds up the products of a float32 sum one by one. With 64 channels of 8 images of 56x56 that
# puts a kernel's gradient 7 times as far from the truth as PyTorch's; sums of this many at a time
# bring it as near, and cost no time.
BAND = 3200
# From so many places and numbers of the result on, and up to so many numbers for each place, a
# product is made of two halves.
HALVED_PLACES, HALVED, HALVED_SHARE = 1500, 6000, 32
GROUP_BAND = 512  # for the groups of a 1x1 kernel, whose sums are small


def _kernel_by_bands(x, g, window: Window, precision, bands: int):
    """The sum of `_kernel_conv` over so many bands of rows."""
    if bands <= 1:
        return _kernel_conv(x, g, window, precision)
    rows, columns = window
    height = -(-rows.out // _divisor(rows.out, bands))
    bands = -(-rows.out // height)
    missing = bands * height - rows.out
    g = jnp.pad(g, ((0, 0), (0, missing), (0, 0), (0, 0)))
    x = jnp.pad(frame(x, window), ((0, 0), (0, missing * rows.stride), (0, 0), (0, 0)))
    band = Window(
        rows._replace(size=(height - 1) * rows.stride + rows.extent, low=0, high=0),
        columns._replace(size=columns.covered, low=0, high=0),
    )

    def add(total, row):
        seen = lax.dynamic_slice_in_dim(x, row * rows.stride, band.rows.size, axis=1)
        part = lax.dynamic_slice_in_dim(g, row, height, axis=1)
        return total + _kernel_conv(seen, part, band, precision), None

    starts = np.arange(bands, dtype=np.int32) * height
    return lax.scan(add, _kernel(x, g, window), starts)[0]


def _product(x, g, precision):
    """[..., I], [..., O] of the same places -> [1, I, O], or [1, O, I] where that has fewer rows.

    Then XLA's product takes 0.5 to 0.9 of the time. In two halves of many places it takes 0.7 to
    0.95 of that (jax 0.10.2, two cores with AVX-512): [2, I, O], for the caller to add.
    """
    few, many = sorted((a.reshape(-1, a.shape[-1]) for a in (x, g)), key=lambda a: a.shape[1])
    places, size = few.shape[0], few.shape[1] * many.shape[1]
    known = isinstance(places, int) and places % 2 == 0 and select.alone()
    halved = known and places >= HALVED_PLACES and HALVED <= size < HALVED_SHARE * places
    if not halved:
        return lax.dot_general(few, many, (((0,), (0,)), ((), ())), precision=precision)[None]
    few, many = (a.reshape(2, -1, a.shape[1]) for a in (few, many))
    return lax.dot_general(few, many, (((1,), (1,)), ((0,), (0,))), precision=precision)


def _upright(kernel, outputs: int):
    """Of `_product`, outside the function that made it: inside XLA would turn the product back."""
    return kernel if kernel.shape[-1] == outputs else kernel.swapaxes(-1, -2)


def _patch_bytes(window: Window, channels: int) -> int:
    """Of an image's patches in float32; none where they are the image's own numbers."""
    return 0 if _flat(window) else 4 * math.prod(window.out + window.taps) * channels


def _divisor_up_to(length: int, most: int) -> int:
    """The largest number that divides `length` and is not larger than `most`; at least 1."""
    return next((n for n in range(min(most, length), 1, -1) if length % n == 0), 1)


def _divisor(length: int, wanted: int) -> int:
    """A number of parts that `length` divides into, at least `wanted`; else `wanted`."""
    fitting = [n for n in range(wanted, min(2 * wanted, length) + 1) if length % n == 0]
    return min(fitting, default=min(wanted, length))


# XLA hands a float32 convolution to YNNPACK, which shares each row of an image among the threads;
# rows and images come one after the other. So one thread makes 64 channels of images that are 56
# wide, while the others wait, unless several images stand side by side.
PIECES = 12  # of a row, at least: the last one is rarely full
STRIP = 7  # rows at least: those that two strips need are copied
COLUMNS = 1024  # as many are always enough for images that don't all stand side by side
WORTH = 1 << 26  # products


def _side_by_side(x, kernel, window: Window, precision):
    """XLA's convolution of wide rows made of several images', with zeros between these."""
    x, window = _cropped(x, window)
    together, strips = _arrangement(x, kernel, window)
    if together * strips == 1:
        return _xla_forward(x, kernel, window=window, groups=1, precision=precision)
    rows, columns = window
    # No window sees two images, and none starts in the middle of an image's padding.
    seen = min(columns.low + columns.size, columns.covered)
    out = max(columns.out, -(-max(seen, columns.covered - columns.low) // columns.stride))
    slot = out * columns.stride
    height = -(-rows.out // strips)
    rows = rows._replace(high=rows.high + (strips * height - rows.out) * rows.stride)
    band = Axis(
        (height - 1) * rows.stride + rows.extent, rows.taps, rows.stride, 0, 0, rows.dilation
    )
    if strips == 1:
        band = rows
    else:
        x = lax.pad(
            x, jnp.zeros((), x.dtype), [(0, 0, 0), (rows.low, rows.high, 0), *[(0, 0, 0)] * 2]
        )
        starts = range(0, strips * height * rows.stride, height * rows.stride)
        parts = [lax.slice_in_dim(x, start, start + band.size, axis=1) for start in starts]
        x = jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])
    edges = (columns.low, slot - columns.size - columns.low, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), edges, (0, 0, 0)])
    x = x.reshape(-1, together * strips, band.size, slot, x.shape[3]).swapaxes(1, 2)
    row = columns._replace(
        size=together * strips * slot, low=0, high=columns.extent - columns.stride
    )
    y = _xla_forward(
        x.reshape(-1, band.size, row.size, x.shape[4]),
        kernel,
        window=Window(band, row),
        groups=1,
        precision=precision,
    )
    y = y.reshape(-1, height, together * strips, out, y.shape[3]).swapaxes(1, 2)
    y = y.reshape(-1, strips * height, out, y.shape[4])
    return y[:, : window.rows.out, : columns.out]


def _cropped(x, window: Window):
    """Without negative padding, at which XLA's float32 convolution reads beyond the images."""
    edges = [(min(axis.low, 0), min(axis.high, 0), 0) for axis in window]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    axes = (
        axis._replace(size=size, low=max(axis.low, 0), high=max(axis.high, 0))
        for axis, size in zip(window, x.shape[1:3], strict=True)
    )
    return x, Window(*axes)


def _arrangement(x, kernel, window: Window) -> tuple[int, int]:
    """How many images stand side by side, a divisor of their number, each in how many strips."""
    rows, columns = window
    images, terms = x.shape[0], x.shape[3] * rows.taps * columns.taps
    if x.dtype != jnp.float32 or not isinstance(images, int) or not select.alone():
        return 1, 1
    products = images * rows.out * columns.out * terms * kernel.shape[3]
    piece, wide = rows_of_a_piece(kernel.shape[3], terms), -(-kernel.shape[3] // 64)
    # Rows of 71 or 17 columns leave vectors half empty, and with a stride all pieces are slow.
    uneven = columns.stride > 1 or (columns.out % 4 and wide < 4)
    if products < WORTH or (not uneven and wide * -(-columns.out // piece) >= 4):
        return 1, 1
    wanted = PIECES * piece
    most = max(COLUMNS, wanted) // columns.out
    together = max(number for number in range(1, max(most, 1) + 1) if images % number == 0)
    if together < images:
        return together, 1
    return together, max(min(-(-wanted // (images * columns.out)), rows.out // STRIP), 1)


def _by_phases(conv: Callable, channels: int, g, kernel, window: Window):
    """The images [N, H, W, channels] of a result, phase by phase of the stride.

    Args:
      conv: (the taps of a phase, rotated by half a turn, and their window over `g`) -> its pixels.
    """

    def part(taps, windows: Window):
        reaching = lax.rev(kernel[taps], (0, 1))
        if reaching.size:
            return conv(reaching, windows)
        return jnp.zeros((g.shape[0], *windows.out, channels), g.dtype)

    return by_phases(part, window)


def _taller(x, kernel, window: Window, precision):
    """XLA's convolution with zeros below the images, so that its result is higher than these.

    Such a one XLA hands to Eigen, which shares images and rows among the threads as well.
    """
    x, window = _cropped(x, window)
    rows = window.rows._replace(high=window.rows.high + _rows_more(window))
    taller = window._replace(rows=rows)
    y = _xla_forward(x, kernel, window=taller, groups=1, precision=precision)
    return y[:, : window.rows.out]


def _rows_more(window: Window) -> int:
    """So that the result is higher than the images, with a stride of 1."""
    return max(window.rows.size + 1 - window.rows.out, 0)


def _patch_product(x, kernel, window: Window, precision):
    return product(_patches(x, window), kernel.reshape(-1, kernel.shape[3]), precision)


def _tap_products(x, kernel, window: Window, precision):
    """The sum of a product for each tap, of as large images as the result's.

    In a loop, which compiles once and keeps one product at a time in the cache.
    """
    x = frame_rows(x, window)
    zeros = jnp.zeros((x.shape[0], *window.out, kernel.shape[3]), x.dtype)

    def add(total, tap):
        *place, matrix = tap
        return total + product(view(x, window, *place), matrix, precision), None

    return lax.scan(add, zeros, (*places(window), kernel.reshape(-1, *kernel.shape[2:])))[0]


def _patches(x, window: Window):
    """[N, H, W, C] -> [N, H', W', taps * C], the taps in row-major order."""
    if _flat(window):
        return _sliced_patches(x, window)
    x = _columns_beside(frame_rows(x, window), window)
    if window.rows.taps <= 3:
        return jnp.concatenate(views(x, window.rows, 1), 3)
    x = select.whole(_stacked, x, axis=window.rows)
    return x.reshape(*x.shape[:3], -1)


def _stacked(x, axis: Axis):
    """[N, H', W', taps of a column, ...]: XLA writes more than three sooner than side by side."""
    return jnp.stack(views(x, axis, 1), 3)


def _sliced_patches(x, window: Window):
    """The same as slices, whose transpose is fast: that of a gather adds up number by number."""
    if window.taps == (1, 1) or not _flat(window):
        return jnp.concatenate(taps(frame(x, window), window), 3)
    (up, left), (high, wide), channels = window.out, window.taps, x.shape[3]
    x = frame(x, window).reshape(-1, up, high, left, wide, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, up, left, high * wide * channels)


# Which dense form is faster: measured with jax 0.10.2 on two AVX-512 cores.


MANY = 128  # channels, for which each tap's product is as fast as wider ones


def _flat(window: Window) -> bool:
    """Pointwise, patch embedding, whole image: the patches are the image's own numbers."""
    return window.taps == (1, 1) or (window.rows.tiles and window.columns.tiles)


def _small(window: Window) -> bool:
    """Patches are one slice for each tap: beyond this, compiling costs more than they gain."""
    return window.taps[0] * window.taps[1] <= 25


def _outside(window: Window) -> bool:
    """A window larger than its image without padding, for which XLA has a naive loop only."""
    return _small(window) and any(axis.extent > axis.size for axis in window)


def _winograd(x, window: Window, inputs: int, outputs: int) -> bool:
    """With full-width AVX-512, where additions weigh more, from more than 64 channels on."""
    return (
        x.dtype == jnp.float32
        and window.taps == (3, 3)
        and window.stride == window.dilation == (1, 1)
        and min(inputs, outputs) >= (65 if select.full_width() else 64)
        and min(window.out) >= 4
        and winograd.cell_bytes(window, inputs + outputs) <= select.MEMORY
    )


def _winograd_sums(x, g, window: Window) -> int:
    """Of how many sums each product of a kernel's gradient is made; 0 for another form.

    With AVX-512 XLA's products add up more terms one by one, and one sum puts the kernel 1.3 to 2.1
    times as far from the truth as PyTorch's. Four sums put it 0.6 to 1.46 times as far, where there
    are enough tiles for the kernel: of fewer they cost what they gain, and with 96 channels at
    28x28 they still put it 1.9 times as far.
    """
    if not select.wide_vectors():
        return 1
    images, least = x.shape[0], min(x.shape[3], g.shape[3])
    if not isinstance(images, int) or not select.alone():
        return 0
    found = images * winograd.tiles(window)
    return 4 if found % 4 == 0 and found >= (392 if least >= 128 else 2048) else 0


def _few_places(y, kernel, window: Window) -> bool:
    """Deep in a network: XLA's float32 convolution spends its time on packing the kernel."""
    places = y.shape[0] * window.out[0] * window.out[1]
    return (
        y.dtype == jnp.float32
        and _small(window)
        and min(kernel.shape[2:]) >= 256
        and isinstance(places, int)  # not with a symbolic number of images
        and places <= 512
    )


def _wide(x, kernel, window: Window) -> bool:
    """To 32 channels and more, where Eigen's form is as fast as any other or faster.

    But for sums of many terms to few channels of large images. Small ones are not worth the rows
    that it makes in vain, nor what it takes to leave these out.
    """
    high, wide = window.out
    few = kernel.shape[3] < 48 and math.prod(kernel.shape[:3]) > 640 and high * wide > 1600
    return (
        x.dtype == jnp.float32
        and window.stride == (1, 1)
        and kernel.shape[3] >= 32
        and not few
        and high * wide * kernel.size >= 1 << 21
        and 6 * _rows_more(window) <= high
    )


def _many_channels(kernel, window: Window) -> bool:
    """With a stride: most others are Winograd's or Eigen's."""
    many = min(kernel.shape[2:]) >= MANY and _small(window)
    return kernel.dtype == jnp.float32 and many


def _narrow(kernel) -> bool:
    """A layer of few channels, first ones mostly: XLA's form takes 1.2 to 5 times as long."""
    high, wide, inputs, outputs = kernel.shape
    first = high * wide <= 9 and inputs <= 4 and outputs <= 64
    small = high * wide <= 25 and inputs <= 12 and outputs <= 16
    return kernel.dtype == jnp.float32 and (first or small)


def _few_channels(x, g) -> bool:
    """The images of a first layer. To a single channel XLA's product adds up one by one."""
    return x.shape[3] <= 4 < g.shape[3]


def _both(x, g, window: Window) -> bool:
    """Many rows of few channels, or a first layer of more than seven rows of taps.

    The rows that a window hangs over are zeros to be multiplied: with 14 rows and 3x3 taps they
    cost what the form gains.
    """
    if window.dilation != (1, 1) or _flat(window):
        return False
    if _few_channels(x, g):
        return window.rows.taps > 7
    narrow = min(x.shape[3], g.shape[3]) in range(32, MANY)
    tall = window.rows.out >= 8 * (window.rows.taps - 1)
    return narrow and tall and _small(window) and window.stride == (1, 1)


def _naive_stride(g, window: Window) -> bool:
    """A stride puts zeros between the rows of `g`, for which XLA has a naive loop in float64."""
    return g.dtype == jnp.float64 and window.stride != (1, 1)


# Depthwise, on CPU: every output channel sees one input channel


def _depthwise_forward(x, kernel, window: Window, precision=None, groups=1):
    x = jnp.repeat(x, kernel.shape[3] // x.shape[3], axis=3)
    return _weighted(frame(x, window), kernel, window)


def _weighted(x, kernel, window: Window):
    """The sum of what the taps see of the framed images, each times its weights."""
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[3])
    return sum(seen * weight for seen, weight in zip(taps(x, window), weights, strict=True))


def _depthwise_to_image(g, kernel, window: Window, precision, groups):
    seen = around(g, window)
    x = _by_phases(
        lambda part, windows: _weighted(seen(windows), part, windows),
        g.shape[3],
        g,
        kernel,
        window,
    )
    return x.reshape(*x.shape[:3], groups, -1).sum(4)


def _depthwise_to_kernel(x, g, window: Window, precision, groups):
    x = jnp.repeat(x, g.shape[3] // x.shape[3], axis=3)
    high, wide = window.out
    size = 4 * window.taps[0] * window.taps[1] * high * wide * g.shape[3] // TERMS
    parts = select.parts(g.shape[0], size)
    return select.whole(_tap_sums, frame(x, window), g, window=window, parts=parts)


TERMS = 8  # images at most that vectors add up


def _tap_sums(x, g, window: Window, parts: int):
    """The framed images times g: for each tap the sum of several images, then of all places.

    The first is shared out among vectors, the second is a product with ones. One reduction of all
    taps' products takes up to six times as long, and one for each tap ten times as long as that.
    """

    def sums(x, g):
        known = select.alone() and isinstance(g.shape[0], int)
        terms = _divisor_up_to(g.shape[0], TERMS) if known else 1
        seen = taken(taken(x, 1, window.rows.table), 3, window.columns.table)
        first, *others = jnp.split(seen * g[:, None, :, None], terms)
        total = sum(others, first).transpose(1, 3, 0, 2, 4, 5)  # [tap, tap, N, H', W', C]
        total = total.reshape(window.taps[0] * window.taps[1], -1, g.shape[3])
        ones = jnp.ones((total.shape[0], 1, total.shape[1]), total.dtype)
        return lax.dot_general(ones, total, (((2,), (1,)), ((0,), (0,))))

    return select.summed(sums, parts, x, g).reshape(*window.taps, 1, g.shape[3])


# Grouped, on CPU: a few groups merged into one block, whose kernel is zero between the groups


def _grouped_forward(x, kernel, window: Window, precision, groups):
    if window.taps == (1, 1):
        (x,) = taps(frame(x, window), window)
        return _group_product(x, kernel[0, 0], precision, groups)
    blocks = _blocks(groups, kernel.shape)
    parts = _apart(x, blocks), _merged(kernel, groups, blocks)
    return _together(_each(_dense_forward, *parts, window, precision))


def _grouped_to_image(g, kernel, window: Window, precision, groups):
    if window.taps == (1, 1):
        back = kernel.reshape(kernel.shape[2], groups, -1).transpose(2, 1, 0)
        seen = _group_product(g, back.reshape(back.shape[0], -1), precision, groups)
        x = _image(g, kernel, window, groups)
        return select.transposed(lambda x: taps(frame(x, window), window)[0], x, seen)
    blocks = _blocks(groups, kernel.shape)
    parts = _apart(g, blocks), _merged(kernel, groups, blocks)
    return _together(_each(_dense_to_image, *parts, window, precision))


def _grouped_to_kernel(x, g, window: Window, precision, groups):
    if window.taps == (1, 1):
        (x,) = taps(frame(x, window), window)
        banded = x.dtype == jnp.float32 and isinstance(x.shape[0], int)
        bands = equal_parts(x.size // x.shape[3], GROUP_BAND) if banded else 1
        x, g = (a.reshape(bands, -1, groups, a.shape[3] // groups) for a in (x, g))
        kernel = added(jnp.einsum("bpgi,bpgo->bigo", x, g, precision=precision))
        return kernel.reshape(1, 1, kernel.shape[0], -1)
    kernel = _kernel(x, g, window, groups)
    blocks = _blocks(groups, kernel.shape)
    parts = _apart(x, blocks), _apart(g, blocks)
    many = lax.map if select.alone() else _at_once  # no sums over a shared batch in a loop
    merged = _each(_dense_to_kernel, *parts, window, precision, many)
    return select.transposed(lambda kernel: _merged(kernel, groups, blocks), kernel, merged)


def _group_product(x, kernel, precision, groups):
    """Kernels of 1x1: [N, H, W, groups * I], [I, groups * O] -> [N, H, W, groups * O]."""
    if groups <= 8:  # a product for each group, which needs no other order of axes
        parts = zip(jnp.split(x, groups, 3), jnp.split(kernel, groups, 1), strict=True)
        return jnp.concatenate([product(*part, precision) for part in parts], 3)
    x = x.reshape(*x.shape[:3], groups, -1)
    kernel = kernel.reshape(kernel.shape[0], groups, -1)
    y = jnp.einsum("nhwgi,igo->nhwgo", x, kernel, precision=precision)
    return y.reshape(*y.shape[:3], -1)


def _blocks(groups: int, shape: tuple[int, ...]) -> int:
    """The fewest blocks of groups that stay within 32 channels each, or one for each group.

    Within 16 without full-width AVX-512: 512 channels in 32 groups at 14x14 take 6 ms then and 12
    in blocks of 32 channels; forward and backward 23 and 38.
    """
    width = max(shape[2], shape[3] // groups)
    most = 32 if select.full_width() else 16
    fitting = [b for b in range(1, groups) if groups % b == 0 and groups // b * width <= most]
    return min(fitting, default=groups)


def _merged(kernel, groups: int, blocks: int):
    """[h, w, I, O] -> [blocks, h, w, groups / blocks * I, O / blocks]."""
    high, wide, inputs, outputs = kernel.shape
    inside = groups // blocks
    kernel = kernel.reshape(high, wide, inputs, blocks, 1, inside, outputs // groups)
    own = jnp.eye(inside, dtype=bool).reshape(1, 1, 1, 1, inside, inside, 1)
    kernel = jnp.where(own, kernel, jnp.zeros((), kernel.dtype))
    # [h, w, I, block, from group, to group, o] -> [block, h, w, from group, I, to group, o]
    return kernel.transpose(3, 0, 1, 4, 2, 5, 6).reshape(
        blocks, high, wide, inside * inputs, outputs // blocks
    )


def _apart(a, parts: int):
    """[..., parts * channels] with four axes -> [parts, ..., channels] with five."""
    return jnp.moveaxis(a.reshape(*a.shape[:3], parts, -1), 3, 0)


def _together(a):
    """The inverse of `_apart`."""
    a = jnp.moveaxis(a, 0, 3)
    return a.reshape(*a.shape[:3], -1)


def _each(dense: Callable, left, right, window: Window, precision, many: Callable = lax.map):
    """`dense` for every block: unrolled while that compiles fast, else by `many`."""
    if left.shape[0] <= 8:
        pairs = zip(left, right, strict=True)
        return jnp.stack([dense(*pair, window, precision) for pair in pairs])
    return many(lambda pair: dense(*pair, window, precision), (left, right))


def _at_once(function: Callable, pairs):
    return jax.vmap(function)(pairs)


# The three primitives


def _define(
    name: str,
    plain: Callable,
    dense: Callable,
    depthwise: Callable,
    grouped: Callable,
    tpu: Callable,
    shape: Callable,
    like: Callable | None = None,
):
    def fast(a, b, *, window, groups, precision):
        inputs = a.shape[3] // groups if plain is _xla_to_kernel else b.shape[2]
        family = dense if groups == 1 else depthwise if inputs == 1 else grouped
        if a.dtype.itemsize >= 4:
            return family(a, b, window, precision, groups)
        # XLA's CPU backend would round every partial sum to 16 bits
        wide = family(a.astype(jnp.float32), b.astype(jnp.float32), window, precision, groups)
        return wide.astype(a.dtype)

    def batch(arrays, mapped, primitive, *, groups, **params):
        """Images that share a kernel are more images; otherwise the mapped axis is more groups."""
        if plain is not _xla_to_kernel and not mapped[1]:
            return select.fold(arrays, mapped, primitive, groups=groups, **params)
        size = select.mapped_size(arrays, mapped)
        arrays = [_together(a) for a in select.broadcast(arrays, mapped)]
        return _apart(primitive.bind(*arrays, groups=groups * size, **params), size)

    return select.define(name, plain, fast, batch, tpu, shape, like)


forward_p = _define(
    "conv",
    _xla_forward,
    _dense_forward,
    _depthwise_forward,
    _grouped_forward,
    _tpu_forward,
    _result_shape,
)
to_image_p = _define(
    "conv_to_image",
    _xla_to_image,
    _dense_to_image,
    _depthwise_to_image,
    _grouped_to_image,
    _tpu_to_image,
    _image_shape,
    _image,
)
to_kernel_p = _define(
    "conv_to_kernel",
    _xla_to_kernel,
    _dense_to_kernel,
    _depthwise_to_kernel,
    _grouped_to_kernel,
    _tpu_to_kernel,
    _kernel_shape,
    _kernel,
)
ad.defbilinear(
    forward_p,
    lambda g, x, kernel, **params: to_image_p.bind(g, kernel, **params),
    lambda g, x, kernel, **params: to_kernel_p.bind(x, g, **params),
)
ad.defbilinear(
    to_image_p,
    lambda x, g, kernel, **params: forward_p.bind(x, kernel, **params),
    lambda x, g, kernel, **params: to_kernel_p.bind(x, g, **params),
)
ad.defbilinear(
    to_kernel_p,
    lambda kernel, x, g, **params: to_image_p.bind(g, kernel, **params),
    lambda kernel, x, g, **params: forward_p.bind(x, kernel, **params),
)
