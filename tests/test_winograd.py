"""Winograd's form of convolutions with 3x3 taps."""

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
from hypothesis import assume, given, settings

from flax_nets import lowering, processor
from flax_nets.lowering import select, winograd
from flax_nets.lowering.window import Window, backwards, make

conv_forms = importlib.import_module("flax_nets.lowering.conv")
few = settings(max_examples=12, deadline=None, derandomize=True)
edges = st.tuples(st.integers(0, 2), st.integers(0, 2))


def distance(ours, truth):
    return np.sqrt(np.mean((np.asarray(ours, np.float64) - truth) ** 2))


def arrays(images=4, size=9, channels=64, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((images, size, size, channels)), 0)
    kernel = rng.standard_normal((3, 3, channels, channels)) / (3 * channels**0.5)
    g = rng.standard_normal(x.shape)
    return [a.astype(dtype) for a in (x, kernel, g)]


def conv(x, kernel):
    return lowering.conv(x, kernel, padding=1)


def pull(x, kernel, g):
    y, back = jax.vjp(conv, x, kernel)
    return y, *back(g)


@few
@given(
    st.tuples(*[st.integers(2, 9)] * 2), st.tuples(edges, edges), st.integers(1, 3), st.booleans()
)
def test_all_three_against_xla(size, padding, images, one_by_one):
    with mock.patch.object(winograd, "one_thread", lambda *_: one_by_one):
        against_xla(size, padding, images)


def against_xla(size, padding, images):
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((images, *size, 3)), rng.standard_normal((3, 3, 3, 2))
    assume(all(side + sum(edge) >= 3 for side, edge in zip(size, padding, strict=True)))
    window = make(x.shape, 3, 1, padding, 1)
    g = rng.standard_normal((images, *window.out, 2))
    params = {"window": window, "groups": 1, "precision": None}
    back = Window(*map(backwards, window))
    pairs = {
        "forward": (
            winograd.forward(x, kernel, window, None),
            conv_forms._xla_forward(x, kernel, **params),
        ),
        "to_image": (
            winograd.to_image(g, kernel, back, None),
            conv_forms._xla_to_image(g, kernel, **params),
        ),
        "to_kernel": (
            winograd.to_kernel(x, g, window, None),
            conv_forms._xla_to_kernel(x, g, **params),
        ),
    }
    for name, (ours, plain) in pairs.items():
        assert ours.shape == plain.shape
        assert np.abs(ours - plain).max() <= 1e-13 * max(np.abs(plain).max(), 1), name


def near(ours, arrays):
    """Whether each is at most 1.5 times as far from the truth as PyTorch's."""
    x, kernel, g = arrays
    theirs = []
    for dtype in (torch.float64, torch.float32):
        tx, tg = (torch.tensor(a.transpose(0, 3, 1, 2)).to(dtype) for a in (x, g))
        tk = torch.tensor(kernel.transpose(3, 2, 0, 1)).to(dtype)
        tx.requires_grad_()
        tk.requires_grad_()
        y = F.conv2d(tx, tk, padding=1)
        y.backward(tg)
        images = [t.detach().numpy().transpose(0, 2, 3, 1) for t in (y, tx.grad)]
        theirs.append([*images, tk.grad.numpy().transpose(2, 3, 1, 0)])
    return [
        distance(mine, truth) <= 1.5 * distance(other, truth)
        for mine, truth, other in zip(ours, *theirs, strict=True)
    ]


@pytest.mark.parametrize(
    ("memory", "one_by_one"), [(select.MEMORY, False), (select.MEMORY, True), (1 << 18, False)]
)
def test_chosen_and_near(monkeypatch, narrow_vectors, memory, one_by_one):
    """In one piece, product by product and image by image.

    On a machine with AVX-512 such a kernel's gradient is farther from the truth, and takes another
    form.
    """
    monkeypatch.setattr(select, "MEMORY", memory)
    images = 4 if one_by_one else 48  # whose tiles are too many for one thread
    x, kernel, g = arrays(images)
    compiled = jax.jit(pull).lower(x, kernel, g).compile()
    text = compiled.as_text()
    assert len(re.findall(r"%jit_\S+ = .* call\(", text)) == 3  # each is a function of its own
    cells = images * winograd.cell_bytes(make(x.shape, 3, 1, 1, 1), 128)
    assert ("while(" in text) == (one_by_one or memory < cells)
    found = near(compiled(x, kernel, g), (x, kernel, g))
    assert found[:2] == [True, True]
    assert found[2] or "avx512f" in processor.features()


@pytest.mark.parametrize(("channels", "size", "forms"), [(64, 9, 0), (65, 9, 2), (128, 14, 3)])
def test_wide_vectors(wide_vectors, channels, size, forms):
    """With AVX-512: results and images of more than 64 channels, kernels of more tiles besides."""
    takes_forms(channels, size, forms)


@pytest.mark.parametrize(("channels", "size", "forms"), [(63, 9, 0), (64, 9, 2), (64, 32, 3)])
def test_halved_vectors(halved_vectors, channels, size, forms):
    """In halves: from 64 channels on."""
    takes_forms(channels, size, forms)


def takes_forms(channels, size, forms):
    """So many of a convolution's three are Winograd's, and all are as near as PyTorch's."""
    inputs = arrays(8, size, channels)
    compiled = jax.jit(pull).lower(*inputs).compile()
    text = compiled.as_text()
    assert len(re.findall(r"%jit__(?:results|kernel)_\S* = .* call\(", text)) == forms
    assert ("jit__in_parts_" in text) == (forms < 3)
    assert near(compiled(*inputs), inputs) == [True, True, True]


@pytest.mark.parametrize(("memory", "products"), [(1 << 28, 64), (1 << 22, 32), (1 << 20, 16)])
def test_kernel_of_four_sums(monkeypatch, wide_vectors, memory, products):
    """Those of 16 cells, in one piece, or fewer of them for each part of the images."""
    monkeypatch.setattr(select, "MEMORY", memory)
    inputs = arrays(8, 14, 128)
    compiled = jax.jit(pull).lower(*inputs).compile()
    text = jax.jit(lambda *inputs: pull(*inputs)[2]).lower(*inputs).compile().as_text()
    assert re.search(rf"f32\[{products},128,128\]\S* (?:dot|fusion)\(", text)
    assert ("while(" in text) == (products < 64)
    assert near(compiled(*inputs), inputs) == [True, True, True]


def test_derivatives_and_vmap(narrow_vectors):
    """Forward mode, twice, and images mapped: as in float64, which takes another form."""
    x, kernel, _ = arrays(size=6)

    def everything(x, kernel):
        gradient = jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), (0, 1))
        twice = jax.grad(lambda x, k: sum(jnp.sin(g).sum() for g in gradient(x, k)), (0, 1))
        return (
            jax.jvp(conv, (x, kernel), (x * x, kernel))[1],
            *twice(x, kernel),
            jax.vmap(conv, (0, None))(jnp.stack([x, 2 * x]), kernel),
        )

    ours = jax.jit(everything)(x, kernel)
    truth = jax.jit(everything)(x.astype(np.float64), kernel.astype(np.float64))
    for mine, wide in zip(ours, truth, strict=True):
        assert mine.dtype == np.float32
        assert np.abs(np.asarray(mine, np.float64) - wide).max() <= 2e-5 * np.abs(wide).max()


def test_bfloat16_and_export(narrow_vectors):
    x, kernel, _ = arrays(size=6)
    function = jax.jit(conv)
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n,6,6,64"), np.float32)
    exported = jax.export.export(function)(images, kernel)
    want = function(x, kernel)
    assert np.abs(exported.call(x, kernel) - want).max() <= 1e-5 * np.abs(want).max()
    half = function(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - want).max() <= 2e-2 * np.abs(want).max()


def test_sharded_without_moving_images():
    """Two devices: each has its own images, and only the kernel's gradient is added up."""
    program = """
        import jax
        import numpy as np
        jax.config.update("jax_num_cpu_devices", 2)
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from flax_nets.lowering import select
        from test_winograd import arrays, pull
        select.wide_vectors = lambda: False
        x, kernel, g = arrays()
        want = jax.jit(pull)(x, kernel, g)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
                args = [jax.device_put(a, s) for a, s in zip((x, kernel, g), (split, whole, split))]
                compiled = jax.jit(pull).lower(*args).compile()
                text = compiled.as_text()
                assert "all-gather" not in text and "all-to-all" not in text
                assert "all-reduce" in text and "convolution" not in text
                for a, b in zip(compiled(*args), want):
                    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    """
    programs.run(program)
