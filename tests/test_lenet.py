"""LeNet-5 as LeCun et al. 1998 describe it, layer by layer (section II-B)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
import flax_nets
from flax_nets import registry
from flax_nets.create import build
from flax_nets.models.lenet import CODES, RadialBasis, SparseConv, SubSampling, scaled_tanh

LAYERS = {  # output size, trained parameters, connections
    "c1": ((28, 28, 6), 156, 122_304),
    "s2": ((14, 14, 6), 12, 5_880),
    "c3": ((10, 10, 16), 1_516, 151_600),
    "s4": ((5, 5, 16), 32, 2_000),
    "c5": ((1, 1, 120), 48_120, 48_120),
    "f6": ((84,), 10_164, 10_164),
    "output": ((10,), 0, 840),
}
TABLE_I = """
X . . . X X X . . X X X X . X X
X X . . . X X X . . X X X X . X
X X X . . . X X X . . X . X X X
. X X X . . X X X X . . X . X X
. . X X X . . X X X X . X X . X
. . . X X X . . X X X X . X X X
"""


def shapes(name):
    model = build(registry.resolve(name))
    graph, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)

    def maps(state, x):
        return flax_nets.features(nnx.merge(graph, state), x, ["*"])

    return {path: y.shape[1:] for path, y in jax.eval_shape(maps, state, x).items()}


def test_sizes_and_parameters_of_each_layer():
    model, found = build(registry.resolve("lenet5_1998")), shapes("lenet5_1998")
    for name, (size, parameters, _) in LAYERS.items():
        assert found[name] == size, name
        leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(getattr(model, name), nnx.Param)))
        assert sum(leaf.size for leaf in leaves) == parameters, name
    assert sum(parameters for _, parameters, _ in LAYERS.values()) == 60_000


def test_connections_of_each_layer():
    """340,908, as the paper counts them: each output with all that it reads, bias included."""
    links = sum(row.count("X") for row in TABLE_I.split("\n"))
    maps = {"c1": 25 + 1, "s2": 4 + 1, "s4": 4 + 1, "c5": 16 * 25 + 1, "f6": 120 + 1, "output": 84}
    for name, (size, _, connections) in LAYERS.items():
        if name == "c3":
            assert 100 * (25 * links + 16) == connections
        else:
            assert int(np.prod(size)) * maps[name] == connections, name
    assert sum(connections for _, _, connections in LAYERS.values()) == 340_908


def test_c3_is_connected_as_table_i_says():
    """Which maps of S2 (rows) move which maps of C3 (columns)."""
    table = np.array([[mark == "X" for mark in row.split()] for row in TABLE_I.split("\n") if row])
    assert table.shape == (6, 16) and table.sum() == 60
    conv = SparseConv(rngs=nnx.Rngs(0))
    slopes = jax.jacobian(lambda x: conv(x)[0, 0, 0])(jnp.ones((1, 5, 5, 6), jnp.float32))
    moved = np.any(np.asarray(slopes) != 0, (1, 2, 3))  # [16, 6]
    np.testing.assert_array_equal(moved.T, table)


def test_sub_sampling_is_trained():
    layer = SubSampling(3, rngs=nnx.Rngs(0))
    layer.coefficient[...], layer.bias[...] = jnp.arange(3.0, dtype=jnp.float32), jnp.full(3, -5.0)
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    sums = x.reshape(2, 2, 2, 3, 2, 3).sum((2, 4))
    np.testing.assert_allclose(layer(jnp.asarray(x)), sums * np.arange(3) - 5, rtol=1e-5)
    trained = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert sorted(trained) == ["bias", "coefficient"]


def test_the_squashing_function_passes_through_one():
    """Appendix A: f(1) = 1 and f(-1) = -1, and an amplitude of 1.7159."""
    np.testing.assert_allclose(scaled_tanh(jnp.array([-1.0, 0.0, 1.0])), [-1, 0, 1], atol=1e-4)
    np.testing.assert_allclose(scaled_tanh(jnp.array(50.0)), 1.7159)


def test_logits_are_minus_squared_distances_to_bitmaps():
    """Figure 3: 7 x 12 pixels of plus and minus one, no two digits alike."""
    assert np.shape(CODES) == (10, 84)
    assert set(np.unique(CODES)) == {-1.0, 1.0}
    distances = ((np.array(CODES)[:, None] - np.array(CODES)) ** 2).sum(-1)
    assert np.min(distances[~np.eye(10, dtype=bool)]) > 0
    found = RadialBasis(CODES)(jnp.array(CODES))
    np.testing.assert_array_equal(found, -distances)
    assert "output" not in "".join(convert.export(flax_nets.create_model("lenet5_1998")))


def test_codes_are_an_argument():
    codes = ((1.0,) * 84, (-1.0,) * 84)
    model = flax_nets.create_model("lenet5_1998", codes=codes, num_classes=2)
    features = flax_nets.create_model("lenet5_1998", codes=codes, num_classes=0)
    x = jnp.zeros((1, 32, 32, 1), jnp.float32)
    f6 = np.asarray(features(x))
    wanted = [[-np.sum((f6 - 1) ** 2), -np.sum((f6 + 1) ** 2)]]
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="num_classes=11"):
        flax_nets.create_model("lenet5_1998", num_classes=11)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_the_activation_of_the_modern_form(activation):
    model = flax_nets.create_model("lenet5", activation=activation)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 1)), jnp.float32)
    maps = flax_nets.features(model, x, ["conv1", "pool1"])
    before = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}[activation]
    wanted = before(maps["conv1"]).reshape(1, 14, 2, 14, 2, 6).mean((2, 4))
    np.testing.assert_allclose(maps["pool1"], wanted, rtol=1e-5, atol=1e-6)


def test_sizes_of_the_modern_form():
    found = shapes("lenet5")
    wanted = {"conv1": (28, 28, 6), "pool1": (14, 14, 6), "conv2": (10, 10, 16)}
    wanted |= {"pool2": (5, 5, 16), "conv3": (1, 1, 120), "fc1": (84,), "fc2": (10,)}
    assert {name: found[name] for name in wanted} == wanted


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="tanh, sigmoid, relu; got 'gelu'"):
        flax_nets.create_model("lenet5", activation="gelu")
