"""Highway networks: the gates, the sizes of the papers, and training at depths of 50 and 100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import flax_nets
from flax_nets import layers
from flax_nets.models.highway import Highway, HighwayMLP


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def with_gate(highway, bias):
    """Gates that no longer look at their input."""
    highway.gate.kernel[...] = jnp.zeros_like(highway.gate.kernel[...])
    highway.gate.bias[...] = jnp.full_like(highway.gate.bias[...], bias)
    return highway


@pytest.mark.parametrize(("kernel_size", "shape"), [(0, (3, 6)), (3, (2, 5, 5, 6))])
def test_a_shut_gate_carries_and_an_open_one_transforms(kernel_size, shape):
    """Equation 4: y = x where T = 0, y = H(x) where T = 1."""
    x = draw(*shape)
    highway = Highway(6, kernel_size=kernel_size, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(with_gate(highway, -200.0)(x), x, rtol=1e-6)
    transformed = jnp.maximum(highway.transform(x), 0)
    np.testing.assert_allclose(with_gate(highway, 200.0)(x), transformed, rtol=1e-6)


def test_the_linear_carry_may_change_the_width():
    x = draw(3, 6)
    highway = Highway(6, 4, linear_carry=True, rngs=nnx.Rngs(0))
    y = with_gate(highway, 0.0)(x)  # T = 1/2
    half = (jnp.maximum(highway.transform(x), 0) + highway.carry(x)) / 2
    np.testing.assert_allclose(y, half, rtol=1e-5, atol=1e-6)


def convolutions(function, *arguments):
    equations = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    return sum(equation.primitive.name == "conv" for equation in equations)


def test_transform_and_gate_are_one_convolution():
    """Where both are alike, and nobody watches the calls of each. In float64, gradients too."""
    x = draw(2, 5, 5, 6).astype(jnp.float64)
    highway = Highway(6, kernel_size=3, rngs=nnx.Rngs(0))
    nnx.update(highway, jax.tree.map(lambda v: v.astype(jnp.float64), nnx.state(highway)))

    def apart(highway, x):
        gate = jax.nn.sigmoid(highway.gate(x))
        return jnp.maximum(highway.transform(x), 0) * gate + x * (1 - gate)

    def loss(function):
        return nnx.value_and_grad(
            lambda highway, x: (function(highway, x) ** 2).sum(), argnums=(0, 1)
        )

    ours = jax.tree.leaves(loss(lambda highway, x: highway(x))(highway, x))
    theirs = jax.tree.leaves(loss(apart)(highway, x))
    assert len(ours) == 1 + 4 + 1  # the loss, two kernels, two biases, the images
    for mine, other in zip(ours, theirs, strict=True):  # to the limit of float64 in all tests
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-12)
    assert convolutions(highway, x) == 1
    assert flax_nets.features(highway, x, ["gate"])["gate"].shape == x.shape
    with pytest.raises(ValueError, match="channels last"):
        highway(x[..., 1:])


@pytest.mark.parametrize(
    "changes", [{"padding": 2, "dilation": 2}, {"bias": False}, {"param_dtype": jnp.bfloat16}]
)
def test_other_convolutions_stay_apart(changes):
    x = draw(2, 5, 5, 6)
    make = functools.partial(layers.Conv, 6, 6, 3, rngs=nnx.Rngs(0))
    convs = make(padding=1), make(**{"padding": 1} | changes)
    assert convolutions(lambda x: layers.side_by_side(x, *convs), x) == 2
    for y, conv in zip(layers.side_by_side(x, *convs), convs, strict=True):
        np.testing.assert_array_equal(y, conv(x))


@pytest.mark.parametrize("name", ["highway_mlp", "highway19_cifar"])
def test_gates_start_towards_carrying(name):
    """Section 2.2: a negative bias, so that early training passes signals through."""
    model = flax_nets.create_model(name, gate_bias=-3.0)
    gates = [m.gate for _, m in nnx.iter_modules(model) if isinstance(m, Highway)]
    assert len(gates) == (9 if name == "highway_mlp" else 14)
    for gate in gates:
        np.testing.assert_array_equal(gate.bias[...], -3.0)


@pytest.mark.parametrize(("name", "depth"), [("highway19_cifar", 19), ("highway32_cifar", 32)])
def test_depth_counts_highway_and_plain_layers(name, depth):
    model = flax_nets.create_model(name)
    counted = [
        child
        for child in (*model.features, model.ip2)
        if isinstance(child, Highway | layers.Conv | layers.Linear)
    ]
    assert len(counted) == depth


@pytest.mark.parametrize(("name", "millions"), [("highway19_cifar", 2.3), ("highway32_cifar", 1.3)])
def test_parameters_of_table_1(name, millions):
    """2.3 million, and 1.25 million, which is 1.3 with one decimal."""
    params = flax_nets.functional(flax_nets.create_model(name))[1]
    assert round(sum(p.size for p in jax.tree.leaves(params)) / 1e6, 1) == millions


def test_a_layer_of_50_blocks_is_as_large_as_71_plain_units():
    """Section 3: both have about 5,000 parameters."""
    block = Highway(50, rngs=nnx.Rngs(0))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(block, nnx.Param))) == 5_100
    assert 71 * 71 + 71 == 5_112


def unrolled(model):
    """The network with its highway layers stacked and looped over: deep ones compile at once."""
    plain, _, _ = flax_nets.functional(model.plain)
    layer, _, _ = flax_nets.functional(model.highways[0])
    head, _, _ = flax_nets.functional(model.fc)
    _, params, _ = flax_nets.functional(model)
    highways = params["highways"].values()
    params["highways"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *highways)

    def apply(params, x):
        x = jnp.maximum(plain(params["plain"], {}, x.reshape(x.shape[0], -1))[0], 0)
        x, _ = jax.lax.scan(lambda x, p: (layer(p, {}, x)[0], None), x, params["highways"])
        return head(params["fc"], {}, x)[0]

    return apply, params


def test_layers_may_be_looped_over():
    model = flax_nets.create_model("highway_mlp", depth=5, image_size=8)
    apply, params = unrolled(model)
    x = draw(2, 8, 8, 1)
    np.testing.assert_allclose(apply(params, x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("depth", "gate_bias"), [(50, -4.0), (100, -5.0)])
def test_it_trains_where_the_plain_network_fails(depth, gate_bias):
    """Figure 1, with real handwritten digits and plain SGD.

    The plain network is the same one with its gates held open. It gets He's initial values, too,
    and the best of three learning rates.
    """
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target)
    apply, highway = unrolled(
        flax_nets.create_model("highway_mlp", depth=depth, image_size=8, gate_bias=gate_bias)
    )
    plain = jax.tree.map(lambda leaf: leaf, highway)
    gate = plain["highways"]["gate"]
    gate.update(kernel=jnp.zeros_like(gate["kernel"]), bias=jnp.full_like(gate["bias"], 40.0))

    def loss(params, chosen):
        scores = jax.nn.log_softmax(apply(params, images[chosen]))
        return -jnp.mean(jnp.take_along_axis(scores, labels[chosen][:, None], 1))

    @jax.jit
    def train(params, rate):
        def step(params, key):
            chosen = jax.random.randint(key, (64,), 0, len(labels))
            value, gradient = jax.value_and_grad(loss)(params, chosen)
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value

        keys = jax.random.split(jax.random.key(0), 300)
        _, losses = jax.lax.scan(step, params, keys)
        return jnp.mean(losses[-20:])

    assert train(highway, jnp.float32(0.3)) < 0.5
    assert min(train(plain, jnp.float32(rate)) for rate in (0.1, 0.01, 0.001)) > 1.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Highway(6, 4, rngs=None), "linear_carry=True"),
        (lambda: Highway(6, kernel_size=2, rngs=None), "got 2"),
        (lambda: Highway(6, activation="gelu", rngs=None), "'gelu'"),
        (lambda: HighwayMLP(depth=0, rngs=None), "got 0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
