"""DenseNet: what the paper says of it, recomputation, and torchvision's older names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
import flax_nets
from benchmarks.compare import quick_jit
from flax_nets import layers, registry
from flax_nets.create import build
from flax_nets.models.densenet import DenseNet

LAYERS = {
    "densenet121": 121,
    "densenet169": 169,
    "densenet201": 201,
    "densenet264": 265,  # by the rows of Table 1; its name is the paper's
    "densenet161": 161,
    "densenet40_k12_cifar": 40,
    "densenet_bc100_k12_cifar": 100,
}


@pytest.mark.parametrize(("name", "expected"), LAYERS.items())
def test_depth_counts_convolutions_and_the_classifier(name, expected):
    modules = [m for _, m in nnx.iter_modules(build(registry.resolve(name)))]
    assert sum(isinstance(m, layers.Conv | layers.Linear) for m in modules) == expected


@pytest.mark.parametrize(
    ("name", "millions"), [("densenet40_k12_cifar", 1.0), ("densenet_bc100_k12_cifar", 0.8)]
)
def test_parameters_of_table_2(name, millions):
    params = flax_nets.functional(flax_nets.create_model(name))[1]
    assert round(sum(p.size for p in jax.tree.leaves(params)) / 1e6, 1) == millions


def test_output_sizes_of_table_1():
    model = flax_nets.create_model("densenet121")
    names = [f"features.denseblock{i}" for i in (1, 2, 3, 4)]
    names += [f"features.transition{i}" for i in (1, 2, 3)]
    x = jnp.zeros((1, 224, 224, 3), jnp.float32)
    maps = jax.eval_shape(lambda x: flax_nets.features(model, x, names), x)
    assert {name: maps[name].shape[1:] for name in names} == {
        "features.denseblock1": (56, 56, 64 + 6 * 32),
        "features.transition1": (28, 28, 128),
        "features.denseblock2": (28, 28, 128 + 12 * 32),
        "features.transition2": (14, 14, 256),
        "features.denseblock3": (14, 14, 256 + 24 * 32),
        "features.transition3": (7, 7, 512),
        "features.denseblock4": (7, 7, 512 + 16 * 32),
    }


def small(**arguments):
    return flax_nets.create_model(
        "densenet40_k12_cifar", depths=(2, 1), param_dtype=jnp.float64, **arguments
    )


@pytest.mark.parametrize("bottleneck", [0, 4])
def test_recomputation_changes_neither_outputs_nor_gradients_nor_statistics(bottleneck):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
    found = []
    for remat in (False, True):
        apply, params, state = flax_nets.functional(
            small(bottleneck=bottleneck, dropout=0.3, remat=remat)
        )

        def loss(params, x, apply=apply, state=state):
            output, new_state = apply(params, state, x, train=True, rngs=jax.random.key(1))
            return jnp.sum(output**2), (output, new_state)

        found.append(quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x))
    for plain, recomputed in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(recomputed, plain, rtol=1e-12, atol=1e-12)
    assert int(found[1][1][1]["features"]["norm5"]["count"]) == 1
    first = found[1][1][1]["features"]["denseblock1"]["denselayer1"]["norm1"]
    assert int(first["count"]) == 1  # not counted again by the second pass


def kept_for_the_backward_pass(depth, remat):
    """Numbers of activations that one block of `depth` layers keeps."""
    apply, params, state = flax_nets.functional(small_block(depth, remat))
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def residuals(params, x):
        return jax.vjp(lambda p: apply(p, state, x, train=True)[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, params, x))
    return sum(r.size for r in kept if r.ndim == 4 and r.shape[0] == 2)


def small_block(depth, remat):
    return flax_nets.create_model("densenet40_k12_cifar", depths=(depth,), remat=remat)


def test_memory_grows_linearly_with_depth_when_recomputing():
    depths = (4, 8, 12, 16)
    plain = [kept_for_the_backward_pass(d, remat=False) for d in depths]
    remat = [kept_for_the_backward_pass(d, remat=True) for d in depths]
    assert np.ptp(np.diff(remat)) == 0, remat  # equal steps: a line
    assert np.all(np.diff(plain, 2) > 0), plain  # growing steps
    assert remat[-1] < plain[-1] / 4


def test_torchvision_s_older_names_load():
    """Its published files have "norm.1" where its code has "norm1"."""
    model = flax_nets.create_model("densenet121", depths=(1, 1), growth=8)
    wanted = convert.export(model)
    old = convert.export(model, dialect="torchvision-old")
    assert "features.denseblock1.denselayer1.norm.1.running_mean" in old
    assert "features.denseblock2.denselayer1.conv.2.weight" in old
    assert "features.transition1.norm.weight" in old
    back = convert.export(convert.load(small_twin(), old))
    assert list(back) == list(wanted)
    assert all(np.array_equal(back[key], wanted[key]) for key in wanted)


def small_twin():
    return flax_nets.create_model("densenet121", depths=(1, 1), growth=8, rngs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bottleneck=-1), "got -1"),
        (dict(compression=0.0), "got 0.0"),
        (dict(compression=1.5), "got 1.5"),
        (dict(stem="mnist"), "'mnist'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseNet(**arguments, rngs=None)
