"""Each layer alone against its torch counterpart: float64, outputs, gradients, statistics."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convert
import flax_nets
from benchmarks.compare import GRADIENT, OUTPUT, error, nchw, randomise, state_dict
from flax_nets import layers
from flax_nets.layers import container

few = settings(max_examples=12, deadline=None, derandomize=True)
sizes = st.integers(1, 9)
pairs = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))


def compare(ours, theirs, x, train=False, x_floor=1e-6):
    """Outputs, gradients by input and parameters, and statistics of one layer in both."""
    theirs = randomise(theirs.double()).train(train)
    if isinstance(ours, nnx.Module):
        convert.load(ours, {k: v.copy() for k, v in state_dict(theirs).items()})
        apply, params, state = flax_nets.functional(ours)
    else:
        params, state = {}, {}
    inputs = torch.tensor(nchw(x), requires_grad=True)
    wanted = theirs(inputs)
    weights = np.random.default_rng(1).normal(size=tuple(wanted.shape))
    (wanted * torch.tensor(weights)).sum().backward()

    def loss(params, x):
        y, new = apply(params, state, x, train=train) if params or state else (ours(x), {})
        return jnp.sum(y * (weights.transpose(0, 2, 3, 1) if y.ndim == 4 else weights)), (y, new)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y, new)), (gradients, by_input) = run(params, jnp.asarray(x))
    assert error(nchw(y), wanted) <= OUTPUT
    assert error(nchw(by_input), inputs.grad, x_floor) <= GRADIENT
    for key, gradient in convert.export(gradients).items():
        assert error(gradient, theirs.get_parameter(key).grad, x_floor) <= GRADIENT, key
    for key, value in convert.export(new).items():
        assert error(value, theirs.get_buffer(key)) <= OUTPUT, key


def images(n, h, w, c, seed=0):
    return np.random.default_rng(seed).normal(size=(n, h, w, c))


@few
@given(
    n=st.integers(1, 3),
    h=sizes,
    w=sizes,
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=pairs,
    stride=pairs,
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
def test_conv(n, h, w, groups, per_group, kernel, stride, padding, dilation, bias):
    reach = max(kernel if isinstance(kernel, tuple) else (kernel,)) * dilation
    h, w = max(h, reach - 2 * padding), max(w, reach - 2 * padding)
    channels = [groups * c for c in per_group]
    args = (*channels, kernel, stride, padding, dilation, groups, bias)
    ours = layers.Conv(*args, rngs=nnx.Rngs(0))
    compare(ours, nn.Conv2d(*args), images(n, h, w, channels[0]))


@few
@given(n=st.integers(1, 4), inputs=sizes, outputs=sizes, bias=st.booleans())
def test_linear(n, inputs, outputs, bias):
    x = np.random.default_rng(0).normal(size=(n, inputs))
    ours = layers.Linear(inputs, outputs, bias, rngs=nnx.Rngs(0))
    compare(ours, nn.Linear(inputs, outputs, bias), x)


@few
@given(
    shape=st.tuples(st.integers(1, 4), sizes, sizes, st.integers(1, 5)),
    train=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3]),
    momentum=st.sampled_from([0.1, 0.01, None]),
)
def test_batch_norm(shape, train, eps, momentum):
    n, h, w, c = shape
    h = h + 5 if n * h * w < 6 else h  # of two values the normalised ones are +1 and -1: no slope
    ours = layers.BatchNorm(c, eps, momentum, rngs=nnx.Rngs(0))
    compare(ours, nn.BatchNorm2d(c, eps, momentum), images(n, h, w, c), train)


def test_batch_norm_with_a_batch_of_one_image():
    ours = layers.BatchNorm(3, rngs=nnx.Rngs(0))
    compare(ours, nn.BatchNorm2d(3), images(1, 4, 4, 3), train=True)
    with pytest.raises(ValueError, match="more than one value per channel"):
        flax_nets.functional(ours)[0](*flax_nets.functional(ours)[1:], jnp.ones((1, 1, 1, 3)), True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_norm_has_no_negative_variance_under_a_large_mean(dtype):
    x = images(4, 8, 8, 3) * 1e-3 + 1e4
    norm = layers.BatchNorm(3, momentum=1.0, rngs=nnx.Rngs(0), param_dtype=dtype)
    apply, params, state = flax_nets.functional(norm)
    y, new = apply(params, state, jnp.asarray(x, dtype), train=True)
    assert np.isfinite(np.asarray(y)).all()
    assert (np.asarray(new["var"]) >= 0).all()
    if dtype == np.float64:
        np.testing.assert_allclose(new["var"], x.var((0, 1, 2), ddof=1), rtol=1e-9)


@few
@given(
    n=st.integers(1, 3), length=sizes, width=st.integers(2, 9), eps=st.sampled_from([1e-6, 1e-5])
)
def test_layer_norm(n, length, width, eps):
    x = np.random.default_rng(0).normal(size=(n, length, width))
    compare(layers.LayerNorm(width, eps, rngs=nnx.Rngs(0)), nn.LayerNorm(width, eps), x)


@few
@given(
    c=sizes,
    size=st.integers(1, 6),
    alpha=st.floats(1e-4, 1),
    beta=st.floats(0.5, 1),
    k=st.floats(1, 2),
)
def test_local_response_norm(c, size, alpha, beta, k):
    args = (size, alpha, beta, k)
    compare(layers.LocalResponseNorm(*args), nn.LocalResponseNorm(*args), images(2, 3, 3, c))


@few
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(4, 9), st.integers(4, 9), st.integers(1, 3)),
    kernel=pairs,
    stride=pairs,
    padding=st.integers(0, 1),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
)
def test_pooling(shape, kernel, stride, padding, ceil_mode, count_include_pad):
    padding = padding if min(np.broadcast_to(kernel, 2)) > 1 else 0
    x = images(*shape)
    ties = np.maximum(np.round(x), 0)  # many equal zeros: the gradient goes to the first
    args = (kernel, stride, padding)
    for values in (x, ties):
        compare(layers.MaxPool(*args, ceil_mode), nn.MaxPool2d(*args, ceil_mode=ceil_mode), values)
    tail = (ceil_mode, count_include_pad)
    compare(layers.AvgPool(*args, *tail), nn.AvgPool2d(*args, *tail), x)


@few
@given(
    shape=st.tuples(st.integers(1, 2), sizes, sizes, st.integers(1, 3)),
    output=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_adaptive_pooling_to_sizes_that_do_not_divide(shape, output):
    x = images(*shape)
    compare(layers.AdaptiveAvgPool(output), nn.AdaptiveAvgPool2d(output), x)
    ties = np.maximum(np.round(x), 0)
    compare(layers.AdaptiveMaxPool(output), nn.AdaptiveMaxPool2d(output), ties)


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hard_swish": F.hardswish,
    "hard_sigmoid": F.hardsigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_their_kinks_too(name):
    x = np.concatenate([np.arange(-7.0, 8.0), np.linspace(-8, 8, 50)])[:, None]
    inputs = torch.tensor(x, requires_grad=True)
    wanted = ACTIVATIONS[name](inputs)
    wanted.sum().backward()
    function = getattr(layers, name)
    assert error(function(jnp.asarray(x)), wanted) <= OUTPUT
    assert error(jax.grad(lambda x: function(x).sum())(jnp.asarray(x)), inputs.grad) <= OUTPUT


def test_gelu_in_16_bits_and_its_second_derivative():
    x = np.linspace(-5, 5, 101)
    for dtype, ours in ((torch.bfloat16, jnp.bfloat16), (torch.float16, jnp.float16)):
        wanted = F.gelu(torch.tensor(x).to(dtype)).float().numpy()
        found = layers.gelu(jnp.asarray(x, ours))
        assert found.dtype == ours
        # both round float32, once; there 1 + erf(x) cancels on the left, and x multiplies its error
        rounding, cancelling = float(jnp.finfo(ours).eps), 5 * np.finfo(np.float32).eps
        found = np.asarray(found, np.float32)
        np.testing.assert_allclose(found, wanted, rtol=rounding, atol=cancelling)
    inputs = torch.tensor(x, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(inputs).sum(), inputs, create_graph=True)
    (wanted,) = torch.autograd.grad(slope.sum(), inputs)
    assert error(jax.vmap(jax.grad(jax.grad(layers.gelu)))(jnp.asarray(x)), wanted) <= OUTPUT


def test_flatten_keeps_pytorch_order():
    x = images(2, 3, 4, 5)
    np.testing.assert_array_equal(layers.flatten(jnp.asarray(x)), nchw(x).reshape(2, -1))


@pytest.mark.parametrize("cls", [layers.Dropout, layers.StochasticDepth])
def test_dropout_keeps_the_mean_and_takes_its_stream_at_construction(cls):
    x = jnp.ones((4000, 3, 3, 1))
    one, same, other = (cls(0.25, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    y = one(x)
    assert set(np.unique(y)) == {0.0, np.float64(1 / 0.75)}
    assert abs(float(y.mean()) - 1) < 0.05
    np.testing.assert_array_equal(y, same(x))
    assert not np.array_equal(y, other(x))
    assert not np.array_equal(y, one(x)), "the stream goes on"
    if cls is layers.StochasticDepth:
        assert (y == y[:, :1, :1]).all(), "whole examples"
    one.eval()
    np.testing.assert_array_equal(one(x), x)


def test_dropout_over_devices():
    """What two devices drop is what one drops, by the compiler and with explicit types."""
    program = """
        import jax
        import jax.numpy as jnp
        import numpy as np
        jax.config.update("jax_num_cpu_devices", 2)
        from flax import nnx
        from flax_nets import layers
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        x = np.ones((8, 4, 4, 2), np.float32)
        for cls in (layers.Dropout, layers.StochasticDepth):
            dropped = lambda x: jnp.sin(cls(0.5, rngs=nnx.Rngs(0))(x))
            want = jax.jit(dropped)(x)
            assert 0 < np.count_nonzero(want) < want.size
            for kind in (AxisType.Auto, AxisType.Explicit):
                mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
                with jax.set_mesh(mesh):
                    images = jax.device_put(x, NamedSharding(mesh, P("data")))
                    for function in (dropped, jax.jit(dropped)):
                        found = function(images)
                        assert np.array_equal(found, want), (cls, kind)
                        assert found.sharding.spec[0] == "data", found.sharding
    """
    programs.run(program)


@few
@given(size=st.integers(3, 9), kernel=st.integers(1, 5), stride=st.integers(1, 3))
def test_same_padding_is_tensorflow_s(size, kernel, stride):
    """Output ceil(size / stride); the odd zero goes below and to the right."""
    conv = layers.Conv(1, 1, kernel, stride, padding="same", rngs=nnx.Rngs(0))
    x = jnp.asarray(images(1, size, size, 1))
    y = conv(x)
    assert y.shape[1] == -(-size // stride)
    wanted = jax.lax.conv_general_dilated(
        x.astype(jnp.float32),
        conv.kernel[...],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(y - conv.bias[...][None, None, None], wanted, atol=1e-5)


# Blocks that are alike


class Counted(nnx.Module):
    """A block that keeps statistics, draws random numbers, and counts how often it is traced."""

    traced = 0

    def __init__(self, stack, *, rngs):
        self.stack = stack  # so that no trace of another stack serves
        self.dense = layers.Linear(4, 4, rngs=rngs, param_dtype=jnp.float64)
        self.norm = layers.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64)
        self.dropout = layers.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *inputs):
        Counted.traced += 1
        return x + self.dropout(self.norm(self.dense(x))) + sum(inputs)


stacks = itertools.count()


def stack(depth, train=True):
    this = next(stacks)
    model = layers.Sequential(*(Counted(this, rngs=nnx.Rngs(i)) for i in range(depth)))
    model.train() if train else model.eval()
    return model


@pytest.mark.parametrize("train", [True, False])
def test_blocks_that_are_alike_are_traced_once_and_compute_the_same(train):
    model, same = stack(5, train), stack(5, train)
    x = jax.random.normal(jax.random.key(0), (8, 4))

    def loss(model, x):
        return jnp.sum(model(x) ** 2)

    counts, results = [], []
    for network, around in ((model, contextlib.nullcontext()), (same, container.each())):
        Counted.traced = 0
        with around:
            found = nnx.jit(nnx.value_and_grad(loss))(network, x)
        random, kept = nnx.state(network, nnx.RngState, ...)
        keys = jax.tree.map(
            lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a,
            random,
        )
        results.append((found, keys, kept))
        counts.append(Counted.traced)
    assert counts == [1, 5]
    jax.tree.map(np.testing.assert_array_equal, *results)  # the program is the same
    assert [int(block.norm.count[...]) for block in model] == [int(train)] * 5


def test_a_closed_over_network_answers_in_jit():
    model = stack(4, train=False)
    x = jnp.ones((2, 4))
    assert error(jax.jit(lambda x: model(x))(x), model(x)) <= OUTPUT
    assert not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(nnx.state(model)))


def test_blocks_that_differ_in_anything_are_traced_apart():
    model = stack(7, train=False)
    model[1].norm.eps = 1.0
    model[2].dense = layers.Linear(4, 4, bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(0), (8, 4))
    Counted.traced = 0
    found = jax.jit(lambda x: model(x))(x)
    assert Counted.traced == 4, "each of the first three, and one for the last four"
    assert error(found, model(x)) <= OUTPUT


def test_a_block_takes_further_inputs():
    model = stack(3, train=False)
    x = jax.random.normal(jax.random.key(0), (8, 4))
    found = jax.jit(lambda x, y: layers.chain(model, x, y, y))(x, 2 * x)
    expected = x
    for block in model:
        expected = block(expected, 2 * x, 2 * x)
    assert error(found, expected) <= OUTPUT


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet20_cifar", dict(depths=(4, 1, 1))),
        ("vit_b_16", dict(image_size=32, width=24, num_heads=2, depth=3, num_classes=5)),
    ],
)
def test_blocks_of_images_over_devices(name, arguments):
    """Gradients with images over two devices, by the compiler and by hand, in eval mode."""
    program = f"""
        import jax
        import jax.numpy as jnp
        import numpy as np
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_enable_x64", True)
        import flax_nets
        from benchmarks.compare import GRADIENT, error
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        model = flax_nets.create_model({name!r}, param_dtype=jnp.float64, **{arguments})
        apply, params, state = flax_nets.functional(model)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), params)
        x = rng.normal(size=(4, 32, 32, 3))
        def loss(params, x):
            return (apply(params, state, x)[0] ** 2).sum()
        want = jax.jit(jax.value_and_grad(loss))(params, x)
        def close(found):
            worst = max(jax.tree.leaves(jax.tree.map(error, found, want)))
            assert worst <= GRADIENT, worst
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                images = jax.device_put(x, NamedSharding(mesh, P("data")))
                weights = jax.device_put(params, NamedSharding(mesh, P()))
                close(jax.jit(jax.value_and_grad(loss))(weights, images))
        with jax.set_mesh(mesh):
            total = jax.shard_map(
                lambda params, x: jax.lax.psum(loss(params, x), "data"),
                in_specs=(P(), P("data")), out_specs=P(),
            )
            close(jax.jit(jax.value_and_grad(total))(weights, images))
    """
    programs.run(program)
