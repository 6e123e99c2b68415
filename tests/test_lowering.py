"""Convolutions and poolings against PyTorch, in XLA's own form and in the CPU's."""

import functools
import importlib
import re
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from flax_nets import lowering, processor
from flax_nets.layers.norm import _moments, _normalised
from flax_nets.lowering import moments, select
from flax_nets.lowering import window as windows
from flax_nets.lowering.conv import _xla_to_image, _xla_to_kernel
from flax_nets.lowering.pool import (
    _cpu_sum,
    _first_max,
    _from_winners,
    _spread,
    _to_winners,
    _xla_max,
    _xla_sum,
)
from flax_nets.lowering.window import make

FORMS = ("xla", "cpu")
# As an attribute of the package, `conv` is the function.
conv_forms = importlib.import_module("flax_nets.lowering.conv")
few = settings(max_examples=8, deadline=None, derandomize=True)
ones_and_twos = st.tuples(st.integers(1, 3), st.integers(1, 3))


def close(ours, theirs, limit):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= limit * np.abs(theirs).max()


def nchw(x):
    """A float64 leaf tensor [N, C, H, W] of an array [N, H, W, C]."""
    return torch.tensor(np.asarray(x, np.float64).transpose(0, 3, 1, 2), requires_grad=True)


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def check_images(function, reference, x, exact=False):
    """Outputs, and gradients of the images, of both forms against PyTorch's."""
    xt = nchw(x)
    yt = reference(xt)
    g = np.random.default_rng(1).standard_normal(yt.shape)
    yt.backward(torch.tensor(g))
    for form in FORMS:
        with lowering.use(form):
            y, back = jax.jit(lambda x, g: pull(function, g, x))(x, g.transpose(0, 2, 3, 1))
        close(y, nhwc(yt), 0 if exact else 1e-12)
        close(back[0], nhwc(xt.grad), 1e-9)


def pull(function, g, *arrays):
    y, back = jax.vjp(function, *arrays)
    return y, back(g)


def check_conv(rng, shape, taps, outputs, stride, padding, dilation, groups):
    x = rng.standard_normal(shape)
    kernel = rng.standard_normal((*taps, shape[3] // groups, outputs))
    xt = nchw(x)
    kt = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    (top, bottom), (left, right) = padding
    framed = F.pad(xt, (left, right, top, bottom))
    yt = F.conv2d(framed, kt, None, stride, 0, dilation, groups)
    g = rng.standard_normal(yt.shape)
    yt.backward(torch.tensor(g))

    def function(x, kernel):
        return lowering.conv(
            x, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
        )

    for form in FORMS:
        with lowering.use(form):
            y, (to_x, to_kernel) = jax.jit(lambda x, kernel, g: pull(function, g, x, kernel))(
                x, kernel, g.transpose(0, 2, 3, 1)
            )
        close(y, nhwc(yt), 1e-12)
        close(to_x, nhwc(xt.grad), 1e-9)
        close(to_kernel, kt.grad.numpy().transpose(2, 3, 1, 0), 1e-9)


@few
@given(st.data())
def test_conv(data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    taps, stride, dilation = draw(ones_and_twos), draw(ones_and_twos), draw(ones_and_twos)
    side = st.tuples(st.integers(0, 2), st.integers(0, 2))
    padding = (draw(side), draw(side))
    smallest = [
        max((k - 1) * d + 1 - sum(p), 1) for k, d, p in zip(taps, dilation, padding, strict=True)
    ]
    size = [low + draw(st.integers(0, 4)) for low in smallest]
    inputs, outputs = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3)) * groups
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 2)), *size, inputs)
    check_conv(rng, shape, taps, outputs, stride, padding, dilation, groups)


@pytest.mark.parametrize(
    ("size", "channels", "taps", "stride", "padding", "dilation", "groups"),
    [
        pytest.param(8, (3, 5), 3, 1, 1, 1, 1, id="dense"),
        pytest.param(9, (3, 5), 3, 2, 1, 1, 1, id="strided"),
        pytest.param(9, (3, 4), 7, 2, 3, 1, 1, id="stem"),
        pytest.param(7, (3, 5), 1, 2, 0, 1, 1, id="pointwise"),
        pytest.param(9, (3, 5), 4, 4, 0, 1, 1, id="patch embedding"),
        pytest.param(5, (3, 5), 5, 1, 0, 1, 1, id="whole image"),
        pytest.param(2, (3, 5), 3, 1, 1, 1, 1, id="larger than its image"),
        pytest.param(7, (4, 4), 3, 1, 1, 1, 4, id="depthwise"),
        pytest.param(9, (4, 8), 5, 2, 2, 1, 4, id="depthwise with multiplier"),
        pytest.param(9, (4, 4), 3, 3, 3, 2, 4, id="depthwise, strided and dilated"),
        pytest.param(9, (4, 4), 2, 3, 0, 1, 4, id="depthwise, stride beyond the window"),
        pytest.param(5, (6, 9), 1, 1, 0, 1, 3, id="grouped pointwise"),
        pytest.param(5, (18, 27), 1, 2, 0, 1, 9, id="grouped pointwise, many groups"),
        pytest.param(6, (64, 64), 3, 1, 1, 1, 32, id="grouped, merged"),
        pytest.param(6, (48, 24), 3, 2, 1, 1, 3, id="grouped, wide"),
        pytest.param(4, (288, 288), 3, 1, 1, 1, 18, id="grouped, in a loop"),
    ],
)
def test_conv_families(size, channels, taps, stride, padding, dilation, groups):
    both = (padding, padding)
    shape = (2, size, size, channels[0])
    pairs = [(v, v) for v in (taps, stride, dilation)]
    rng = np.random.default_rng(0)
    check_conv(rng, shape, pairs[0], channels[1], pairs[1], (both, both), pairs[2], groups)


@few
@given(st.data())
def test_float32_forms_are_exact(data):
    """On small whole numbers, whose sums float32 holds: the forms that float64 does not take."""
    draw = data.draw
    narrow = draw(st.booleans())  # as so few channels are, which patches alone would see
    wide = draw(st.booleans())
    with (
        mock.patch.object(conv_forms, "WORTH", 0),
        mock.patch.object(conv_forms, "MANY", draw(st.sampled_from([1, 128]))),
        mock.patch.object(conv_forms, "_narrow", lambda kernel: narrow),
        mock.patch.object(
            conv_forms, "_wide", lambda x, k, window: wide and window.stride == (1, 1)
        ),
    ):
        check_float32_drawn(draw)


def check_float32_drawn(draw):
    taps, stride, dilation = draw(ones_and_twos), draw(ones_and_twos), draw(ones_and_twos)
    taps = tuple(k + draw(st.integers(0, 2)) for k in taps)
    side = st.tuples(st.integers(0, 3), st.integers(0, 3))
    padding = (draw(side), draw(side))
    extents = [(k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)]
    size = [max(e, 6) + draw(st.integers(0, 3)) for e in extents]
    size[0] += draw(st.sampled_from([0, 20]))  # enough rows for strips
    inputs = draw(st.integers(1, 3))
    images, outputs = draw(st.sampled_from([1, 2, 6])), draw(st.sampled_from([1, 3]))
    keywords = {"stride": stride, "padding": padding, "dilation": dilation}
    check_float32(draw(st.integers(0, 99)), (images, *size, inputs), taps, outputs, keywords)


@pytest.mark.parametrize(
    ("shape", "taps", "outputs", "stride"),
    [
        pytest.param((2, 36, 36, 256), 1, 512, 1, id="pointwise"),
        pytest.param((8, 64, 64, 64), 1, 128, 1, id="pointwise, few channels"),
        pytest.param((3, 37, 37, 8), 1, 12, 1, id="pointwise, odd places"),
        pytest.param((2, 73, 71, 8), 1, 12, 2, id="strided"),
        pytest.param((2, 60, 60, 3), 2, 6, 2, id="patches"),
        pytest.param((2, 81, 41, 16), 3, 16, 1, id="cotangents side by side"),
        pytest.param((6, 30, 30, 8), 5, 12, 1, id="columns side by side"),
        pytest.param((8, 32, 32, 48), 3, 48, 1, id="products in halves"),
        pytest.param((8, 33, 33, 16), 3, 16, 2, id="phases"),
    ],
)
def test_large_float32_forms_are_exact(shape, taps, outputs, stride):
    check_float32(
        0, shape, (taps, taps), outputs, {"stride": stride, "padding": taps // 2 * (taps % 2)}
    )


@pytest.mark.parametrize(
    ("shape", "taps", "outputs", "stride"),
    [
        pytest.param((2, 36, 36, 64), (1, 1), 96, 1, id="pointwise"),
        pytest.param((2, 67, 67, 128), (3, 3), 130, 2, id="strided"),
    ],
)
def test_products_go_to_eigen(shape, taps, outputs, stride):
    padding = tuple(size // 2 for size in taps)
    check_float32(0, shape, taps, outputs, {"stride": stride, "padding": padding})
    x, kernel = (jnp.ones(shape, np.float32) for shape in (shape, (*taps, shape[3], outputs)))
    function = jax.jit(functools.partial(lowering.conv, stride=stride, padding=padding))
    text = function.lower(x, kernel).compile().as_text()
    assert len(re.findall(r"= f32\S+ dot\(", text)) == 1  # several taps' in a loop
    assert ("while(" in text) == (taps != (1, 1))
    assert "convolution(" not in text and "ynn" not in text


@pytest.mark.parametrize(
    ("shape", "taps", "outputs", "keywords"),
    [
        pytest.param((2, 28, 28, 32), (3, 3), 48, {"padding": 1}, id="few channels"),
        pytest.param((2, 17, 17, 130), (7, 1), 128, {"padding": (3, 0)}, id="a column of taps"),
        pytest.param((2, 28, 30, 24), (3, 3), 96, {"padding": 2, "dilation": 2}, id="dilated"),
        pytest.param((1, 40, 30, 40), (3, 3), 64, {"padding": ((0, 0), (2, 1))}, id="uneven"),
    ],
)
def test_convolutions_go_to_eigen(shape, taps, outputs, keywords):
    """With more rows of zeros than they need: their results are higher than the images."""
    check_float32(0, shape, taps, outputs, keywords)
    x, kernel = (jnp.ones(shape, np.float32) for shape in (shape, (*taps, shape[3], outputs)))
    text = (
        jax.jit(functools.partial(lowering.conv, **keywords)).lower(x, kernel).compile().as_text()
    )
    (result,) = re.findall(r"f32\[\d+,(\d+),.* convolution\(", text)
    assert int(result) > shape[1] and "ynn" not in text


@pytest.mark.parametrize(
    ("shape", "taps", "stride"),
    [
        pytest.param((4, 23, 25, 3), 7, 2, id="first layer"),
        pytest.param((4, 23, 25, 6), 5, 1, id="cotangents side by side"),
        pytest.param((4, 23, 25, 5), 5, 1, id="columns side by side"),
    ],
)
def test_kernels_image_by_image(monkeypatch, shape, taps, stride):
    """What lies side by side takes several times the memory of the images."""
    monkeypatch.setattr(select, "MEMORY", 1 << 16)
    padding = taps // 2
    check_float32(0, shape, (taps, taps), 6, {"stride": stride, "padding": padding})
    kernel = jnp.ones((taps, taps, shape[3], 6), np.float32)

    def loss(kernel):
        return lowering.conv(
            jnp.ones(shape, np.float32), kernel, stride=stride, padding=padding
        ).sum()

    assert "while(" in jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()


def check_float32(seed, shape, taps, outputs, keywords):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, shape).astype(np.float32)
    kernel = rng.integers(-3, 4, (*taps, shape[3], outputs)).astype(np.float32)

    def function(x, kernel):
        return lowering.conv(x, kernel, **keywords)

    found = []  # XLA's own float32 form is wrong where padding is wider than the kernel
    for form, dtype in (("xla", np.float64), ("cpu", np.float32)):
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        with lowering.use(form):
            results = jax.eval_shape(function, x, kernel).shape
            g = np.random.default_rng(0).integers(-3, 4, results).astype(dtype)
            found.append(jax.jit(lambda *a: pull(function, *a))(g, x, kernel))
    for plain, ours in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(plain, ours)


SMALL = [  # x, kernel, keywords: one of each family
    ((2, 5, 5, 2), (3, 3, 2, 3), {"padding": 1}),
    ((2, 5, 6, 2), (3, 2, 2, 3), {"stride": 2, "dilation": (1, 2), "padding": 1}),
    ((2, 5, 5, 3), (3, 3, 1, 6), {"stride": 2, "padding": 1, "groups": 3}),
    ((2, 5, 5, 4), (3, 3, 2, 4), {"padding": 1, "groups": 2}),
]


def small(case):
    shape, taps, keywords = case
    rng = np.random.default_rng(0)
    x, kernel, dx, dkernel = (rng.standard_normal(s) for s in (shape, taps, shape, taps))
    return (lambda x, kernel: lowering.conv(x, kernel, **keywords)), x, kernel, dx, dkernel


@pytest.mark.parametrize("case", SMALL[1:])
def test_conv_derivatives(case):
    """Forward mode, reverse over reverse and forward over reverse agree between the forms."""
    function, x, kernel, dx, dkernel = small(case)

    def everything(x, kernel, dx, dkernel):
        gradients = jax.grad(lambda x, k: jnp.sin(function(x, k)).sum(), (0, 1))
        inner = lambda x, k: sum(jnp.sin(g).sum() for g in gradients(x, k))  # noqa: E731
        return (
            jax.jvp(function, (x, kernel), (dx, dkernel))[1],
            *jax.grad(inner, (0, 1))(x, kernel),
            *jax.jvp(gradients, (x, kernel), (dx, dkernel))[1],
        )

    results = []
    for form in FORMS:
        with lowering.use(form):
            results.append(jax.jit(everything)(x, kernel, dx, dkernel))
    for plain, fast in zip(*results, strict=True):
        close(fast, plain, 1e-9)


@pytest.mark.parametrize("case", SMALL)
def test_plain_partners(case):
    """What other backends run in place of the CPU's forms, gradient by gradient."""
    function, x, kernel, *_ = small(case)
    (equation,) = jax.make_jaxpr(function)(x, kernel).eqns
    params = {key: value for key, value in equation.params.items() if key != "form"}
    with lowering.use("cpu"):
        y, (to_image, to_kernel) = pull(function, jnp.cos(function(x, kernel)), x, kernel)
    close(_xla_to_image(jnp.cos(y), kernel, **params), to_image, 1e-9)
    close(_xla_to_kernel(x, jnp.cos(y), **params), to_kernel, 1e-9)


def test_plain_pools():
    x = np.maximum(np.random.default_rng(0).integers(-3, 3, (2, 7, 8, 3)), 0).astype(np.float64)
    window = make(x.shape, 3, 2, 1, 1)
    g = jnp.cos(jnp.arange(2 * 4 * 4 * 3.0)).reshape(2, 4, 4, 3)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def pulls(maximum, total):
        back = _from_winners(x, g, window=window, maximum=maximum)
        there = _to_winners(x, back, window=window, maximum=maximum)
        return back, there, _spread(g, window=window, total=total)

    for plain, fast in zip(pulls(_xla_max, _xla_sum), pulls(_first_max, _cpu_sum), strict=True):
        close(fast, plain, 1e-12)


@pytest.mark.parametrize(
    ("case", "axes"),
    [
        (SMALL[0], (None, 1)),
        (SMALL[0], (2, 0)),
        (SMALL[2], (0, None)),
        (SMALL[2], (2, 0)),
        (SMALL[3], (None, 1)),
        (SMALL[3], (2, 0)),
    ],
)
def test_conv_vmap(case, axes):
    function, x, kernel, _, _ = small(case)
    arrays = [
        a if axis is None else np.stack([a, 2 * a + 1, a * a], axis)
        for a, axis in zip((x, kernel), axes, strict=True)
    ]
    loss = jax.value_and_grad(lambda x, k: jnp.sin(function(x, k)).sum(), (0, 1))

    def take(i):
        return [
            a if axis is None else np.take(a, i, axis) for a, axis in zip(arrays, axes, strict=True)
        ]

    with lowering.use("cpu"):
        together = jax.jit(jax.vmap(loss, axes))(*arrays)
    with lowering.use("xla"):
        alone = jax.jit(loss)
        for i in range(3):
            jax.tree.map(lambda a, b, i=i: close(a[i], b, 1e-9), together, alone(*take(i)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "taps", "keywords"),
    [
        pytest.param((8, 28, 28, 16), (3, 3, 16, 16), {"padding": 1}, id="dense"),
        pytest.param((10, 37, 37, 4), (3, 3, 4, 8), {"padding": 1, "stride": 2}, id="strided"),
        pytest.param((2, 9, 9, 16), (1, 1, 16, 16), {"stride": 2}, id="pointwise"),
        pytest.param(
            (2, 17, 17, 16),
            (3, 3, 1, 16),
            {"padding": 1, "stride": 2, "groups": 16},
            id="depthwise",
        ),
        pytest.param((8, 28, 28, 32), (3, 3, 4, 32), {"padding": 1, "groups": 8}, id="grouped"),
        pytest.param((4, 31, 31, 3), (3, 3, 3, 24), {"padding": 1, "stride": 2}, id="few channels"),
        pytest.param((4, 31, 31, 256), (3, 3, 256, 256), {"padding": 1}, id="many channels"),
        pytest.param((4, 31, 31, 240), (1, 1, 80, 60), {"groups": 3}, id="grouped pointwise"),
    ],
)
def test_conv_precision(shape, taps, keywords, dtype):
    """At most 1.5 times PyTorch's distance from the truth."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, taps))

    def function(x, kernel):
        return lowering.conv(x, kernel, **keywords)

    g = jnp.asarray(rng.standard_normal(jax.eval_shape(function, x, kernel).shape), dtype)
    with lowering.use("cpu"):
        y, grads = pull(function, g, x, kernel)

    def torch_pull(kind):
        xt, gt = nchw(x).detach().to(kind).requires_grad_(), nchw(g).to(kind)
        kt = torch.tensor(np.asarray(kernel, np.float64).transpose(3, 2, 0, 1)).to(kind)
        yt = F.conv2d(xt, kt.requires_grad_(), None, **keywords)
        yt.backward(gt)
        back = kt.grad.double().numpy().transpose(2, 3, 1, 0)
        return nhwc(yt.double()), nhwc(xt.grad.double()), back

    truths, theirs = torch_pull(torch.float64), torch_pull(getattr(torch, dtype))
    for truth, their, our in zip(truths, theirs, (y, *grads), strict=True):
        assert our.dtype == dtype
        error, limit = (np.abs(np.asarray(v, np.float64) - truth).max() for v in (our, their))
        assert error <= 1.5 * limit


def test_few_places():
    """In float32 the smallest, deepest maps take the matrix product, whatever the stride."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((1, 4, 4, 256)), rng.standard_normal((3, 3, 256, 256))
    g = rng.standard_normal((1, 2, 2, 256))

    def function(x, kernel):
        return lowering.conv(x, kernel, stride=2, padding=1)

    with lowering.use("cpu"):
        y, grads = pull(function, *(a.astype(np.float32) for a in (g, *arrays)))
    for ours, truth in zip((y, *grads), jax.tree.leaves(pull(function, g, *arrays)), strict=True):
        close(ours, truth, 1e-6)


def pooling(draw):
    window, dilation = draw(ones_and_twos), draw(st.sampled_from([(1, 1), (1, 1), (2, 3)]))
    stride = draw(ones_and_twos)
    padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    size = [
        max((k - 1) * d + 1 - 2 * p, 1) + draw(st.integers(0, 6))
        for k, d, p in zip(window, dilation, padding, strict=True)
    ]
    return window, dilation, stride, padding, size


@few
@given(st.data())
def test_max_pool(data):
    """On integers above zero, full of ties: the gradient goes to the first maximum."""
    window, dilation, stride, padding, size = pooling(data.draw)
    ceil_mode = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = np.maximum(rng.integers(-3, 3, (2, *size, 2)), 0).astype(np.float64)
    check_images(
        lambda x: lowering.max_pool(
            x, window=window, stride=stride, padding=padding, ceil_mode=ceil_mode, dilation=dilation
        ),
        lambda x: F.max_pool2d(x, window, stride, padding, dilation, ceil_mode),
        x,
        exact=True,
    )


def test_max_pool_gradient_reads_from_memory():
    """What leads to winners and cotangents would be made anew for each phase that reads them."""

    def loss(x):
        return jnp.sin(lowering.max_pool(jnp.sin(x), window=3, stride=2)).sum()

    x = np.zeros((2, 9, 9, 4), np.float32)
    text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    assert all(re.search(rf"%jit__{name}_\S* = .* call\(", text) for name in ("place", "given"))


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "halves"),
    [
        ("AuthenticAMD", 25, "avx2 avx512f", True),  # Zen 4
        ("AuthenticAMD", 25, "avx2", False),  # Zen 3
        ("AuthenticAMD", 26, "avx2 avx512f", False),
        ("GenuineIntel", 6, "avx2 avx512f", False),
    ],
)
def test_processors(monkeypatch, vendor, family, flags, halves):
    told = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: fpu {flags}\n"
    monkeypatch.setattr(processor, "_cpuinfo", lambda: told)
    for asked in ("features", "halves"):
        monkeypatch.setattr(processor, asked, getattr(processor, asked).__wrapped__)
    assert processor.halves() == halves
    assert select.wide_vectors() == ("avx512f" in flags)
    assert select.full_width() == ("avx512f" in flags and not halves)


@pytest.mark.parametrize(("shape", "halves"), [((8, 14, 14), 2), ((8, 13, 13), 1)])
def test_kernel_gradient_in_halves(shape, halves):
    """Of many places; what reads the gradient adds them."""
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((*shape, 96), np.float32) for _ in range(2))
    pull = jax.jit(
        lambda x, g: jax.vjp(lambda k: lowering.conv(x, k), jnp.ones((1, 1, 96, 96), "f"))[1](g)[0]
    )
    text = pull.lower(x, g).compile().as_text()
    assert re.search(rf"%jit__in_parts_\S* = f32\[{halves},96,96\]", text)
    flat = (a.astype(np.float64).reshape(-1, 96) for a in (x, g))
    close(pull(x, g)[0, 0], np.einsum("pi,po->io", *flat), 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_max_pool_nan(form):
    x = np.random.default_rng(0).standard_normal((1, 7, 7, 2))
    x[0, 3, 3, 0] = np.nan
    with lowering.use(form):
        y = lowering.max_pool(x, window=3, stride=2, padding=1)
    np.testing.assert_array_equal(y, nhwc(F.max_pool2d(nchw(x), 3, 2, 1)))


@few
@given(st.data())
def test_avg_pool(data):
    window, _, stride, padding, size = pooling(data.draw)
    ceil_mode, count_include_pad = data.draw(st.booleans()), data.draw(st.booleans())
    x = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((2, *size, 2))
    check_images(
        lambda x: lowering.avg_pool(
            x,
            window=window,
            stride=stride,
            padding=padding,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
        ),
        lambda x: F.avg_pool2d(x, window, stride, padding, ceil_mode, count_include_pad),
        x,
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: lowering.max_pool(x, window=3, stride=2, padding=1),
        lambda x: lowering.avg_pool(x, window=3, stride=2, padding=1, count_include_pad=False),
    ],
)
def test_pool_derivatives(function):
    rng = np.random.default_rng(0)
    x, dx = np.maximum(rng.integers(-3, 3, (2, 2, 7, 8, 3)), 0).astype(np.float64)[:, None]

    def everything(x, dx):
        def gradient(x):
            return jax.grad(lambda x: jnp.sin(x * jax.vmap(function)(x).mean()).sum())(x)

        return (
            jax.jvp(jax.vmap(function), (x,), (dx,))[1],
            jax.grad(lambda x: jnp.sin(gradient(x)).sum())(x),
            jax.jvp(gradient, (x,), (dx,))[1],
            jax.vmap(lambda d: jax.jvp(function, (x[0],), (d,))[1])(dx),
        )

    results = []
    for form in FORMS:
        with lowering.use(form):
            results.append(jax.jit(everything)(x, dx))
    for plain, fast in zip(*results, strict=True):
        close(fast, plain, 1e-9)


@few
@given(
    st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.sampled_from([1, 2, 3, 5, 7, None])] * 2)
)
def test_adaptive_pools(size, output_size):
    x = np.random.default_rng(0).integers(0, 4, (2, *size, 2)).astype(np.float64)
    check_images(
        lambda x: lowering.adaptive_avg_pool(x, output_size),
        lambda x: F.adaptive_avg_pool2d(x, output_size),
        x,
    )
    check_images(
        lambda x: lowering.adaptive_max_pool(x, output_size),
        lambda x: F.adaptive_max_pool2d(x, output_size),
        x,
        exact=True,
    )


def test_global_max():
    x = np.random.default_rng(0).integers(0, 3, (2, 4, 5, 3)).astype(np.float64)
    check_images(
        lambda x: lowering.global_max(x, (1, 2), keepdims=True),
        lambda x: F.adaptive_max_pool2d(x, 1),
        x,
        exact=True,
    )
    check_images(
        lambda x: lowering.global_max(x, axis=-1)[..., None],
        lambda x: x.max(1, keepdim=True).values,
        x,
        exact=True,
    )
    wide = np.random.default_rng(0).integers(0, 9, (2, 3, 2, 128)).astype(np.float64)
    check_images(
        lambda x: lowering.global_max(x, axis=-1)[..., None],
        lambda x: x.max(1, keepdim=True).values,
        wide,
        exact=True,
    )
    x[0, 1, 1] = np.nan
    spread = jax.grad(lambda x: lowering.global_max(x, (1, 2)).sum())(x)
    assert (np.asarray(spread[0]) == (np.arange(20) == 6).reshape(4, 5, 1)).all()


MOMENTS = (moments.covariation, 4), (moments.scaled, 1)  # and the axes of the last operand


@pytest.mark.parametrize(("function", "axes"), MOMENTS)
def test_moment_derivatives(function, axes):
    """Forward mode, reverse over reverse, forward over reverse and `vmap` agree between forms."""
    rng = np.random.default_rng(0)
    shapes = (2, 5, 4, 3), (3,), (2, 5, 4, 3)[4 - axes :]
    arrays, moved = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))

    def everything(arrays, moved):
        gradients = jax.grad(lambda *a: jnp.sin(function(*a)).sum(), (0, 1, 2))

        def inner(*arrays):
            return sum(jnp.sin(g).sum() for g in gradients(*arrays))

        both = [jnp.stack(pair) for pair in zip(arrays, moved, strict=True)]
        return (
            jax.jvp(function, arrays, moved),
            jax.jvp(lambda mean: function(arrays[0], mean, arrays[2]), arrays[1:2], moved[1:2]),
            jax.jvp(gradients, arrays, moved),
            jax.grad(inner, (0, 1, 2))(*arrays),
            jax.vmap(gradients)(*both),
            jax.vmap(gradients, (None, 0, None))(arrays[0], both[1], arrays[2]),
        )

    results = []
    for form in FORMS:
        with lowering.use(form):
            results.append(jax.tree.leaves(jax.jit(everything)(arrays, moved)))
    for plain, fast in zip(*results, strict=True):
        close(fast, plain, 1e-12)


def test_averages_and_products_of_vectors():
    """In every form, with derivatives of both modes and orders, and mapped."""
    rng = np.random.default_rng(0)
    x, a, b = rng.standard_normal((2, 5, 4, 3)), *rng.standard_normal((2, 3))

    def bent(x, a, b):
        return jnp.sin(moments.times(jnp.cos(moments.average(x)), moments.times(a, b))).sum()

    def plainly(x, a, b):
        return jnp.sin(jnp.cos(x.mean((0, 1, 2))) * a * b).sum()

    def everything(function):
        slopes = jax.grad(function, (0, 1, 2))
        twice = jax.grad(lambda *args: sum(jnp.sin(g).sum() for g in slopes(*args)), (0, 1, 2))
        pairs = [jnp.stack([array, 2 * array]) for array in (x, a, b)]
        return (
            function(x, a, b),
            twice(x, a, b),
            jax.jvp(slopes, (x, a, b), (2 * x, b, a)),
            jax.vmap(slopes)(*pairs),
            jax.vmap(slopes, (None, 0, None))(x, pairs[1], b),
        )

    want = jax.tree.leaves(everything(plainly))
    for form in FORMS:
        with lowering.use(form):
            got = jax.tree.leaves(jax.jit(everything, static_argnums=0)(bent))
        for one, exact in zip(got, want, strict=True):
            close(one, exact, 1e-12)


def test_shared_kernels():
    """Batch norm's means of so many places and of others are one function of XLA's program."""

    @jax.jit
    def means(*images):
        return [moments.average(x) for x in images]

    images = [jnp.ones((2, size, size, 16), jnp.float32) for size in (5, 7, 9)]
    text = means.lower(*images).as_text()
    assert text.count("func.func private @_share(") == 1
    assert text.count("call @_share(") == len(images)
    compiled = means.lower(*images).compile().as_text()
    assert compiled.count("to_apply=%_share") == len(images)


def test_variance():
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 4, 7)) + 1000
    for form in FORMS:
        with lowering.use(form):
            got = moments.variance(x[0], x[0].mean((0, 1, 2)))
            close(got, x[0].var((0, 1, 2)), 1e-12)
            got = jax.vmap(moments.variance)(x, x.mean((1, 2, 3)))
            close(got, x.var((1, 2, 3)), 1e-12)


def test_running_moments():
    """In every form, mapped, and with derivatives; new ones of another type than the old."""
    old, new, kept, share = np.arange(3.0), np.array([1.0, -2.0, 4.0]), 0.75, 0.5

    def everything(*arguments):
        mapped = jax.vmap(moments.moved, (0, 0, None, 0))
        two = [jnp.stack([a, a]) for a in map(jnp.asarray, (old, new, share))]
        return (
            moments.moved(*arguments),
            jax.jacrev(moments.moved, (0, 1, 2, 3))(*arguments),
            jax.jacfwd(moments.moved, (0, 1, 2, 3))(*arguments),
            mapped(*two[:2], kept, two[2]),
        )

    want = kept * old + share * new
    slopes = kept * np.eye(3), share * np.eye(3), old, new
    for form in FORMS:
        with lowering.use(form):
            got = jax.jit(everything)(old, new, kept, share)
            for one, exact in zip(
                jax.tree.leaves(got), [want, *slopes, *slopes, [want, want]], strict=True
            ):
                close(one, exact, 1e-12)
            assert moments.moved(jnp.float32(old), new, kept, share).dtype == np.float64


@pytest.mark.parametrize("edges", [(1, 1, 1, 1), (0, 2, 3, 0), (-1, 1, 2, -2), (-1, 0, 0, -1)])
def test_frames_of_rows_are_frames(edges):
    """Zeros, cropping, and rows that no window reads because of the stride."""
    top, bottom, left, right = edges
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 9, 3)))
    rows, columns = windows.Axis(7, 2, 2, top, bottom), windows.Axis(9, 3, 2, left, right)
    both = windows.Window(rows, columns)
    np.testing.assert_array_equal(windows.frame_rows(x, both), windows.frame(x, both))


def test_sixteen_bits():
    """Means are summed in float32, and everything keeps its type."""
    x = np.random.default_rng(0).uniform(1, 2, (2, 32, 32, 3))
    half = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(half, np.float64)
    for form in FORMS:
        with lowering.use(form):
            mean = lowering.avg_pool(half, window=32)
            top = lowering.max_pool(half, window=32)
    for got, want in (
        (mean, exact.mean((1, 2), keepdims=True)),
        (lowering.adaptive_avg_pool(half, [1, 1]), exact.mean((1, 2), keepdims=True)),
        (top, exact.max((1, 2), keepdims=True)),
        (lowering.adaptive_max_pool(half, 1), exact.max((1, 2), keepdims=True)),
    ):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, jnp.asarray(want, jnp.bfloat16))


def network(x, kernels):
    """Each operation once; [N, 8, 8, 4] -> [N]."""
    x = lowering.conv(x, kernels["dense"], padding=1)
    x = lowering.max_pool(x, window=3, stride=2, padding=1)
    x = lowering.conv(x, kernels["depthwise"], padding=1, groups=4)
    x = lowering.conv(x, kernels["grouped"], padding=1, groups=2)
    x = lowering.avg_pool(x, window=2, padding=1)
    x = lowering.conv(x, kernels["pointwise"])
    return jnp.sin(lowering.dense(x, kernels["last"])).sum((1, 2, 3))


def normalised(x, scale):
    """[N, 8, 8, 4] normalised by the batch, in one number."""
    return jnp.sin(_normalised(x, *_moments(x), scale, scale, jnp.asarray(1e-5))).sum()


def network_arguments(n=2):
    rng = np.random.default_rng(0)
    shapes = {
        "dense": (3, 3, 4, 4),
        "depthwise": (3, 3, 1, 4),
        "grouped": (3, 3, 2, 4),
        "pointwise": (1, 1, 4, 5),
        "last": (5, 3),
    }
    return rng.standard_normal((n, 8, 8, 4)), {
        name: rng.standard_normal(shape) for name, shape in shapes.items()
    }


def test_scan_and_checkpoint():
    x, kernels = network_arguments()

    def loss(x, kernels):
        return network(x, kernels).sum()

    def steps(kernels, x):
        def step(kernels, _):
            gradients = jax.grad(jax.checkpoint(loss), 1)(x, kernels)
            return jax.tree.map(lambda k, g: k - 0.01 * g, kernels, gradients), None

        return jax.lax.scan(step, kernels, length=2)[0]

    with lowering.use("xla"):
        want = kernels
        for _ in range(2):
            gradients = jax.jit(jax.grad(loss, 1))(x, want)
            want = jax.tree.map(lambda k, g: k - 0.01 * g, want, gradients)
    got = jax.jit(steps)(kernels, x)
    jax.tree.map(lambda a, b: close(a, b, 1e-9), got, want)


@pytest.mark.parametrize("form", FORMS)
def test_no_images_at_all(form):
    x, kernel = jnp.zeros((0, 8, 8, 3), jnp.float32), jnp.ones((3, 3, 3, 4), jnp.float32)
    with lowering.use(form):
        gradient = jax.grad(lambda kernel: lowering.conv(x, kernel, padding=1).sum())(kernel)
    np.testing.assert_array_equal(gradient, np.zeros(kernel.shape))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 6), (2, 1), (4, 4)])
def test_few_channels_on_a_tpu(inputs, outputs):
    """The kernel's gradient is a product there: as a convolution it would compile for minutes."""
    rng = np.random.default_rng(0)
    shapes = (4, 9, 8, inputs), (4, 5, 4, outputs)
    x, g = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    window = make(x.shape, (3, 3), 2, ((1, 2), (1, 1)), 1)
    params = {"window": window, "groups": 1, "precision": None}
    close(conv_forms._tpu_to_kernel(x, g, **params), _xla_to_kernel(x, g, **params), 1e-14)


@pytest.mark.parametrize("groups", [32, 64])
def test_groups_on_a_tpu(groups):
    """Merged into dense blocks of 128 channels, they are the plain form, and so is what follows."""
    rng = np.random.default_rng(0)
    shapes = (2, 7, 6, 256), (3, 3, 256 // groups, 256), (2, 4, 3, 256)
    x, kernel, g = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    window = make(x.shape, (3, 3), 2, 1, 1)
    assert conv_forms._lane_blocks(groups, kernel.shape) == 2
    params = {"window": window, "groups": groups, "precision": None}
    for name, arrays in {
        "forward": (x, kernel),
        "to_image": (g, kernel),
        "to_kernel": (x, g),
    }.items():
        ours, plain = (getattr(conv_forms, f"_{form}_{name}") for form in ("tpu", "xla"))
        close(ours(*arrays, **params), plain(*arrays, **params), 1e-13)


@pytest.mark.parametrize(
    ("inputs", "groups", "outputs", "convolutions"),
    [(1, 1, 64, 0), (2, 1, 1, 0), (2, 1, 64, 1), (4, 2, 4, 1), (4, 4, 4, 1), (256, 32, 256, 2)],
)
def test_where_a_tpu_takes_a_product(inputs, groups, outputs, convolutions):
    def learn(x, kernel):
        return jax.grad(lambda k: lowering.conv(x, k, padding=1, groups=groups).sum())(kernel)

    x, kernel = jnp.ones((2, 8, 8, inputs)), jnp.ones((3, 3, inputs // groups, outputs))
    text = jax.export.export(jax.jit(learn), platforms=["tpu"])(x, kernel).mlir_module()
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize(("dtype", "windows"), [(np.float32, 1), (np.float64, 0)])
def test_float64_on_a_gpu_is_exact(dtype, windows):
    """XLA's own poolings are not, so what stands there is the CPU's form."""
    pool = functools.partial(lowering.avg_pool, window=3, stride=1, padding=1)
    x = jnp.ones((2, 8, 8, 4), dtype)
    text = jax.export.export(jax.jit(pool), platforms=["cuda"])(x).mlir_module()
    assert text.count("stablehlo.reduce_window") == windows


def test_export():
    """One exported function holds the plain form for a TPU and the CPU's form for a CPU."""
    x, kernels = network_arguments(3)
    step = jax.jit(jax.value_and_grad(lambda x, k: network(x, k).sum(), 1))
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n,8,8,4"), jnp.float64)
    both = jax.export.export(step, platforms=["cpu", "tpu"])(images, kernels)
    jax.tree.map(lambda a, b: close(a, b, 1e-9), both.call(x, kernels), step(x, kernels))
    per_platform = [
        jax.export.export(step, platforms=[name])(x, kernels).mlir_module()
        for name in ("tpu", "cpu")
    ]
    counts = [text.count("feature_group_count = 4") for text in per_platform]
    assert counts[0] > 0 and counts[1] == 0


def test_no_exchange_inside_of_loops():
    """Devices that exchange sums inside of a loop and others outside may wait without end."""
    program = """
        import jax
        import jax.numpy as jnp
        import numpy as np
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_enable_x64", True)
        from jax.sharding import NamedSharding, PartitionSpec as P
        from flax_nets import lowering
        from test_lowering import close
        mesh = jax.make_mesh((2,), ("data",))
        rng = np.random.default_rng(0)
        some = (  # kernel, further arguments
            ((3, 3, 128, 128), dict(stride=2, padding=1)),
            ((7, 1, 128, 128), dict(padding=(3, 0))),
            ((7, 7, 8, 8), dict(padding=3)),
            ((3, 3, 4, 128), dict(padding=1, groups=32)),
            ((3, 3, 16, 512), dict(padding=1, groups=32)),
        )
        for shape, more in some:
            channels = shape[2] * more.get("groups", 1)
            for dtype in ("float64", "float32"):
                x = jnp.asarray(rng.standard_normal((4, 32, 32, channels)), dtype)
                kernel = jnp.asarray(rng.standard_normal(shape), dtype)
                loss = lambda x, kernel: jnp.sin(lowering.conv(x, kernel, **more)).sum()
                step = jax.jit(jax.grad(loss, (0, 1)))
                spread = jax.device_put(x, NamedSharding(mesh, P("data")))
                whole = jax.device_put(kernel, NamedSharding(mesh, P()))
                compiled = step.lower(spread, whole).compile()
                sums = [line for line in compiled.as_text().splitlines() if " all-reduce" in line]
                assert sums, shape
                assert not any("while/body" in line for line in sums), shape
                if dtype == "float64":
                    for got, want in zip(compiled(spread, whole), step(x, kernel)):
                        close(got, want, 1e-12)
    """
    programs.run(program)


def test_sharded():
    """Images over two devices: compiler-sharded, with explicit types, and in `shard_map`."""
    program = """
        import jax, sys
        import numpy as np
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_enable_x64", True)
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from test_lowering import close, network, network_arguments
        x, kernels = network_arguments(4)
        loss = lambda x, kernels: network(x, kernels).sum()
        want = jax.jit(jax.value_and_grad(loss, 1))(x, kernels)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                images = jax.device_put(x, NamedSharding(mesh, P("data")))
                weights = jax.device_put(kernels, NamedSharding(mesh, P()))
                got = jax.jit(jax.value_and_grad(loss, 1))(images, weights)
                jax.tree.map(lambda a, b: close(a, b, 1e-9), got, want)
        with jax.set_mesh(mesh):
            assert jax.jit(network)(images, weights).sharding.spec == P("data")
            mapped = jax.shard_map(
                lambda x, k: jax.lax.psum(loss(x, k), "data"),
                in_specs=(P("data"), P()), out_specs=P(),
            )
            got = jax.jit(jax.value_and_grad(mapped, 1))(images, weights)
            jax.tree.map(lambda a, b: close(a, b, 1e-9), got, want)

        # a batch is normalised as a whole by the compiler, and piece by piece in `shard_map`
        from test_lowering import normalised
        scale = np.arange(1.0, 5)
        learn = jax.jit(jax.value_and_grad(normalised, (0, 1)))
        want, (dx, dscale) = learn(x, scale)
        pieces = [learn(piece, scale) for piece in (x[:2], x[2:])]
        pieces = jax.tree.map(lambda a, b: a + b, *pieces)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                images = jax.device_put(x, NamedSharding(mesh, P("data")))
                weights = jax.device_put(scale, NamedSharding(mesh, P()))
                got, gradients = learn(images, weights)
                jax.tree.map(lambda a, b: close(a, b, 1e-9), (got, *gradients), (want, dx, dscale))
        with jax.set_mesh(mesh):
            mapped = jax.shard_map(
                lambda x, scale: jax.lax.psum(normalised(x, scale), "data"),
                in_specs=(P("data"), P()), out_specs=P(),
            )
            got, (_, dscale) = jax.jit(jax.value_and_grad(mapped, (0, 1)))(images, weights)
            close(got, pieces[0], 1e-9)
            close(dscale, pieces[1][1], 1e-9)

        # float32 puts images side by side, unless the compiler has split them between devices
        from flax_nets import lowering
        from test_lowering import conv_forms
        conv_forms.WORTH = 0
        side_by_side = []
        arrangement = conv_forms._arrangement
        def arranged(*arguments):
            side_by_side.append(arrangement(*arguments) != (1, 1))
            return arrangement(*arguments)
        conv_forms._arrangement = arranged
        x = np.random.default_rng(0).integers(-3, 4, (4, 9, 9, 5)).astype(np.float32)
        kernel = x[0, :3, :3, :, None] * np.ones(20, np.float32)
        conv = lambda x, kernel: lowering.conv(x, kernel, padding=1)
        want = jax.jit(conv)(x, kernel)
        with jax.set_mesh(mesh):
            images = jax.device_put(x, NamedSharding(mesh, P("data")))
            weights = jax.device_put(kernel, NamedSharding(mesh, P()))
            split = jax.shard_map(conv, in_specs=(P("data"), P()), out_specs=P("data"))
            for function in (conv, split):
                compiled = jax.jit(function).lower(images, weights).compile()
                assert "collective" not in compiled.as_text()
                close(compiled(images, weights), want, 0)
        assert side_by_side == [True, False, True], side_by_side
    """
    programs.run(program)


def test_choice(monkeypatch):
    """The form is part of what jit remembers; the innermost choice counts."""

    @jax.jit
    def function(x):
        seen.append(lowering.current())
        return lowering.max_pool(x, window=2)

    seen, x = [], np.zeros((1, 4, 4, 1))
    monkeypatch.setenv("FLAX_NETS_LOWERING", "cpu")
    function(x)
    with lowering.use("xla"):
        function(x)
        function(x)
        assert "reduce_window" in str(jax.make_jaxpr(function)(x))
    lowering.set_lowering("xla")
    function(x)
    lowering.set_lowering("auto")
    with lowering.use("cpu"):
        assert lowering.current() == "cpu"
    assert "max_pool" in str(jax.make_jaxpr(function)(x))
    assert seen[:3] == ["cpu", "xla", "xla"] and seen[-1] == "auto"
    monkeypatch.setattr("flax_nets.lowering.select._default", None)
    monkeypatch.setenv("FLAX_NETS_LOWERING", "gpu")
    with pytest.raises(ValueError, match="FLAX_NETS_LOWERING='gpu': expected one of 'auto'"):
        function(np.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match="form='fast'"):
        lowering.use("fast")


X = np.zeros((1, 4, 4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lowering.conv(X, np.zeros((5, 5, 4, 1))), "the image is too small: 4x4 pixels"),
        (lambda: lowering.conv(X, np.zeros((3, 3, 3, 1))), "NHWC.* have 4 channels.*takes 3"),
        (lambda: lowering.conv(X, np.zeros((3, 3, 2, 3)), groups=2), "gives 3, which groups must"),
        (lambda: lowering.conv(X, np.zeros((3, 4, 1))), "kernel .height, width, I, O."),
        (lambda: lowering.conv(X[0], np.zeros((3, 3, 4, 1))), r"\[N, H, W, C\] .NHWC"),
        (lambda: lowering.conv(X, np.zeros((3, 3, 4, 1), np.float32)), "the kernel is float32"),
        (lambda: lowering.conv(X, np.zeros((3, 3, 4, 1)), stride=0), "stride=0: expected an int"),
        (lambda: lowering.conv(X, np.zeros((3, 3, 4, 1)), padding=(1, 1, 1)), "padding=.1, 1, 1."),
        (lambda: lowering.max_pool(X, window=5), "the image is too small"),
        (lambda: lowering.max_pool(X, window=3, padding=2), "padding=2 is more than half"),
        (lambda: lowering.avg_pool(X, window=(9, 1)), "the image is too small"),
        (lambda: lowering.adaptive_avg_pool(X, (1, 0)), r"output_size=\(1, 0\): expected a pos"),
        (lambda: lowering.adaptive_max_pool(X[0], 1), "NHWC"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rows", [(1,), (8,), (2, 50)])
def test_dense_sums(rows):
    """Long float32 sums: at most 1.5 times PyTorch's distance; XLA's own are at 1.6 to 2."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*rows, 2048)).astype(np.float32)
    kernel = rng.standard_normal((2048, 100)).astype(np.float32)
    truth = x.astype(np.float64) @ kernel.astype(np.float64)

    def distance(y):
        return np.sqrt(np.mean((np.asarray(y, np.float64) - truth) ** 2))

    theirs = F.linear(torch.tensor(x), torch.tensor(kernel.T.copy()))
    assert distance(jax.jit(lowering.dense)(x, kernel)) <= 1.5 * distance(theirs)
    for form in FORMS:
        with lowering.use(form):
            wide = jax.jit(lambda x, k: pull(lowering.dense, jnp.ones((*rows, 100)), x, k))
            y, (to_x, to_kernel) = wide(x.astype(np.float64), kernel.astype(np.float64))
            close(y, truth, 1e-12)
            close(to_x, np.broadcast_to(kernel.astype(np.float64).sum(1), x.shape), 1e-9)
            per_input = x.astype(np.float64).reshape(-1, 2048).sum(0)
            close(to_kernel, np.broadcast_to(per_input[:, None], (2048, 100)), 1e-9)


def test_dense_composes():
    rng = np.random.default_rng(0)
    xs, kernels = rng.standard_normal((3, 2, 1030)), rng.standard_normal((3, 1030, 4))
    for axes, expected in [
        ((0, None), xs @ kernels[0]),
        ((None, 0), xs[0] @ kernels),
        ((0, 0), xs @ kernels),
    ]:
        arrays = [a if axis == 0 else a[0] for a, axis in zip((xs, kernels), axes, strict=True)]
        for form in FORMS:
            with lowering.use(form):
                close(jax.jit(jax.vmap(lowering.dense, axes))(*arrays), expected, 1e-12)
    hessian = jax.hessian(lambda x: jnp.sum(lowering.dense(x, kernels[0]) ** 2))(xs[0, :1, :1030])
    close(hessian[0, :, 0], 2 * kernels[0] @ kernels[0].T, 1e-9)

    def twice(dense):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(dense(x, kernel)))

        def slope(x, kernel):
            return sum(jnp.sum(jnp.sin(a)) for a in jax.grad(loss, (0, 1))(x, kernel))

        return jax.jit(jax.vmap(jax.grad(slope, (0, 1))))(xs, kernels)

    for ours, plain in zip(twice(lowering.dense), twice(jnp.matmul), strict=True):
        close(ours, plain, 1e-9)
