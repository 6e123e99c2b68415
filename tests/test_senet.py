"""Squeeze-and-Excitation: the module, what it costs, and how the two sets of networks differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
import flax_nets
from flax_nets import registry
from flax_nets.create import build
from flax_nets.models.senet import SENet, SqueezeExcite


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def parameters(name, **overrides):
    spec = registry.resolve(name).with_arguments(**overrides)
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(build(spec), nnx.Param)))
    return sum(leaf.size for leaf in leaves)


def test_one_scale_per_channel_from_the_mean():
    x = draw(2, 5, 4, 32)
    excite = SqueezeExcite(32, rngs=nnx.Rngs(0))
    scale = np.asarray(excite(x) / x)
    np.testing.assert_allclose(scale, scale[:, :1, :1] * np.ones_like(x), rtol=1e-4)
    assert np.all((scale > 0) & (scale < 1))
    mean = jnp.mean(x, (1, 2), keepdims=True) * jnp.ones_like(x)
    np.testing.assert_allclose(excite(mean) / mean, scale, rtol=1e-4)  # it sees the mean alone


@pytest.mark.parametrize(
    ("arguments", "hidden"),
    [
        (dict(channels=256), 16),
        (dict(channels=64), 8),  # 4, rounded up to a multiple of 8
        (dict(channels=256, reduction=4), 64),
        (dict(channels=64, hidden=4), 4),
    ],
)
def test_hidden_units(arguments, hidden):
    assert SqueezeExcite(**arguments, rngs=None).fc1.out_channels == hidden


@pytest.mark.parametrize(
    ("depths", "name", "plain"),
    [((3, 4, 6, 3), "seresnet50", "resnet50"), ((3, 4, 23, 3), "seresnet101", "resnet101")],
)
def test_cost_in_parameters(depths, name, plain):
    """Equation 5: 2/r times the sum of N_s C_s^2; the biases, which it leaves out, come on top."""
    widths = (256, 512, 1024, 2048)
    weights = sum(2 * n * c * c // 16 for n, c in zip(depths, widths, strict=True))
    biases = sum(n * (c + c // 16) for n, c in zip(depths, widths, strict=True))
    assert parameters(name) - parameters(plain) == weights + biases
    if name == "seresnet50":
        assert weights == 2_514_944  # "about 2.5 million", 10% of ResNet-50


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("legacy_seresnet50", 3.87),
        ("legacy_seresnet101", 7.60),
        ("legacy_seresnet152", 11.32),
        ("legacy_seresnext50_32x4d", 4.25),
        ("legacy_seresnext101_32x4d", 8.00),
    ],
)
def test_multiply_adds_of_table_2(name, billions):
    """The authors' own networks, which timm has as legacy ones; the table counts slightly more."""
    found = flax_nets.summary(build(registry.resolve(name))).multiply_adds / 1e9
    assert found == pytest.approx(billions, rel=0.005)


SHORT = dict(depths=(1, 1, 1, 1), dropout=0.0)


def test_the_two_forms_of_senet_154_are_two_functions():
    """The same numbers, put into both: only the stem's pooling tells them apart."""
    arguments = SHORT | dict(groups=8)
    present = flax_nets.create_model("senet154", **arguments)
    renamed = {}
    for key, value in convert.export(present).items():
        for old, new in [
            *(("conv1.0.", "layer0.conv1."), ("conv1.1.", "layer0.bn1.")),
            *(("conv1.3.", "layer0.conv2."), ("conv1.4.", "layer0.bn2.")),
            *(("conv1.6.", "layer0.conv3."), ("bn1.", "layer0.bn3."), ("fc.", "last_linear.")),
        ]:
            if key.startswith(old):
                key = new + key.removeprefix(old)
        renamed[key.replace(".se.", ".se_module.")] = value
    legacy = flax_nets.create_model("legacy_senet154", weights=renamed, **arguments)
    x = draw(1, 64, 64, 3)
    assert float(jnp.max(jnp.abs(present(x) - legacy(x)))) > 1e-3 * float(
        jnp.max(jnp.abs(legacy(x)))
    )
    legacy.pool0 = present.maxpool
    np.testing.assert_allclose(legacy(x), present(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "convolution"),
    [
        ("seresnet50", "conv2"),
        ("legacy_seresnet50", "conv1"),
        ("legacy_seresnext50_32x4d", "conv2"),
        ("legacy_senet154", "conv2"),
    ],
)
def test_which_convolution_carries_the_stride(name, convolution):
    block = build(registry.resolve(name).with_arguments(depths=(1, 1, 1, 1))).layer2[0]
    strided = [c for c in ("conv1", "conv2", "conv3") if getattr(block, c).stride == (2, 2)]
    assert strided == [convolution]


def test_se_inception_is_inception_v3_where_nothing_is_excited():
    """Scales held at 1: one excitation after each of the 11 modules, and nothing else changed."""
    model = flax_nets.create_model("se_inception_v3", aux_logits=False, dropout=0.0)
    excitations = [m for _, m in nnx.iter_modules(model) if isinstance(m, SqueezeExcite)]
    assert len(excitations) == 11
    for excite in excitations:
        excite.fc2.kernel[...] = jnp.zeros_like(excite.fc2.kernel[...])
        excite.fc2.bias[...] = jnp.full_like(excite.fc2.bias[...], 100.0)
    tensors = {}
    for key, value in convert.export(model).items():
        parts = key.split(".")
        if not parts[0].startswith("Mixed"):
            tensors[key] = value
        elif parts[1] == "0":
            tensors[".".join([parts[0], *parts[2:]])] = value
    plain = flax_nets.create_model("inception_v3", weights=tensors, aux_logits=False, dropout=0.0)
    x = draw(1, 75, 75, 3)
    np.testing.assert_allclose(jax.jit(model)(x), jax.jit(plain)(x), rtol=1e-5, atol=1e-5)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="at least 1 hidden unit"):
        SqueezeExcite(8, hidden=0, rngs=None)
    with pytest.raises(ValueError, match="'wide'"):
        SENet(block="wide", rngs=None)
