"""What SqueezeNet's paper brought: Iandola et al. 2016."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_nets
from convert.rules import entries
from flax_nets import registry
from flax_nets.create import build


def parameters(name):
    return sum(int(np.prod(e.torch_shape)) for e in entries(build(registry.resolve(name))))


def test_49_times_fewer_parameters_than_alexnet():
    """The paper says 50: it rounds 48.9."""
    assert round(parameters("alexnet") / parameters("squeezenet1_0"), 1) == 48.9


def test_output_sizes_of_table_1():
    model = flax_nets.create_model("squeezenet1_0")
    names = [f"features.{i}" for i in range(13) if i != 1] + ["classifier.1"]
    x = jax.ShapeDtypeStruct((1, 227, 227, 3), jnp.float32)  # 227: its 111 asks for it
    found = jax.eval_shape(lambda x: flax_nets.features(model, x, names), x)
    assert [found[name].shape[2:] for name in names] == [
        (111, 96),
        (55, 96),
        (55, 128),
        (55, 128),
        (55, 256),
        (27, 256),
        (27, 256),
        (27, 384),
        (27, 384),
        (27, 512),
        (13, 512),
        (13, 512),
        (13, 1000),
    ]


def test_parameters_of_table_1():
    """Layer by layer, before pruning."""
    counts = [14_208, 11_920, 12_432, 45_344, 49_440, 104_880, 111_024, 188_992, 197_184, 513_000]
    model = build(registry.resolve("squeezenet1_0"))
    with_parameters = [m for m in (*model.features, *model.classifier) if isinstance(m, nnx.Module)]
    found = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(m, nnx.Param))))
        for m in with_parameters
    ]
    assert [count for count in found if count] == counts
    assert sum(counts) == 1_248_424


def test_fire_modules_of_table_1_follow_from_the_metaparameters():
    model = flax_nets.create_model("squeezenet1_0")
    fires = [module for module in model.features if hasattr(module, "squeeze")]
    widths = [
        (f.squeeze.out_channels, f.expand1x1.out_channels, f.expand3x3.out_channels) for f in fires
    ]
    pairs = [(16, 64, 64), (32, 128, 128), (48, 192, 192), (64, 256, 256)]
    assert widths == [row for row in pairs for _ in range(2)]


def test_version_1_1_pools_earlier():
    sides = {}
    for name in ("squeezenet1_0", "squeezenet1_1"):
        model = flax_nets.create_model(name)
        names = [f"features.{i}" for i, m in enumerate(model.features) if hasattr(m, "squeeze")]
        x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        found = jax.eval_shape(
            lambda x, model=model, names=names: flax_nets.features(model, x, names), x
        )
        sides[name] = [found[n].shape[1] for n in names]
    assert sides["squeezenet1_0"] == [54, 54, 54, 27, 27, 27, 27, 13]
    assert sides["squeezenet1_1"] == [55, 55, 27, 27, 13, 13, 13, 13]


def test_parameters_of_the_bypasses():
    plain = parameters("squeezenet1_0")
    assert parameters("squeezenet1_0_bypass") == plain
    # 1x1 convolutions where the channels change, around fire2, fire4, fire6 and fire8 (Figure 2);
    # these make 6.4 MB of float32, where Table 3 has 7.7
    pairs = [(96, 128), (128, 256), (256, 384), (384, 512)]
    assert parameters("squeezenet1_0_complex_bypass") == plain + sum((a + 1) * b for a, b in pairs)


@pytest.mark.parametrize("bypass", ["none", "simple", "complex"])
def test_what_goes_around_each_fire_module(bypass):
    """Figure 2: identities around fire3, 5, 7 and 9; convolutions around the others."""
    model = flax_nets.create_model("squeezenet1_0", bypass=bypass, base=16, increment=16)
    fires = [module for module in model.features if hasattr(module, "squeeze")]
    kinds = {"none": (None, None), "simple": (None, "Identity"), "complex": ("Conv", "Identity")}
    found = [None if f.bypass is None else type(f.bypass).__name__ for f in fires]
    assert found == list(kinds[bypass]) * 4
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 16), jnp.float32)
    fire = fires[1]
    around = fire(x)
    fire.bypass = None
    np.testing.assert_allclose(around - fire(x), x if bypass != "none" else 0 * x, atol=1e-6)


def test_unknown_bypass_is_refused():
    with pytest.raises(ValueError, match="none, simple, complex; got 'full'"):
        flax_nets.create_model("squeezenet1_0", bypass="full")
