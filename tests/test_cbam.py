"""CBAM: both attentions against their equations, ties, and the sizes of Table 4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert
import flax_nets
from flax_nets import registry
from flax_nets.create import build
from flax_nets.functional import set_mode
from flax_nets.models.cbam import CBAM, ChannelAttention, SpatialAttention
from torch_ref import cbam as torch_ref

TABLE_4 = {  # millions of parameters
    "cbam_resnet18": 11.78,
    "cbam_resnet34": 21.96,
    "cbam_resnet50": 28.09,
    "cbam_resnet101": 49.33,
    "cbam_resnext50_32x4d": 27.56,
}


@pytest.mark.parametrize(("name", "millions"), TABLE_4.items())
def test_parameters_of_table_4(name, millions):
    state = nnx.state(build(registry.resolve(name)), nnx.Param)
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(state)))
    assert round(total / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "billions"), [("cbam_resnet18", 1.815), ("cbam_resnet34", 3.665)])
def test_multiply_adds_of_table_4(name, billions):
    """For deeper ones it has those of a stride on the first 1x1, unlike the authors' code."""
    found = flax_nets.summary(build(registry.resolve(name))).multiply_adds / 1e9
    assert round(found, 3) == billions


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def in_float64(module):
    for i, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(module))):
        value = variable.get_value()
        if isinstance(variable, nnx.Param):
            variable.set_value(jnp.asarray(np.random.default_rng(i).normal(size=value.shape)))
        elif jnp.issubdtype(value.dtype, jnp.floating):
            variable.set_value(value.astype(jnp.float64))
    set_mode(module, train=False)
    return module


def test_channel_attention_adds_what_one_mlp_makes_of_mean_and_maximum():
    """Equation 2."""
    x = draw(2, 5, 4, 32)
    attend = in_float64(ChannelAttention(32, reduction=8, rngs=nnx.Rngs(0)))
    w1, b1 = (np.asarray(v[...]) for v in (attend.mlp[1].kernel, attend.mlp[1].bias))
    w2, b2 = (np.asarray(v[...]) for v in (attend.mlp[3].kernel, attend.mlp[3].bias))

    def mlp(v):
        return np.maximum(v @ w1 + b1, 0) @ w2 + b2

    scale = sigmoid(mlp(x.mean((1, 2))) + mlp(x.max((1, 2))))
    np.testing.assert_allclose(attend(jnp.asarray(x)), x * scale[:, None, None], rtol=1e-12)


def test_spatial_attention_sees_maximum_and_mean_of_the_channels():
    """Equation 3, at a position whose 7x7 neighbourhood lies within the image."""
    x = draw(1, 7, 7, 5)
    attend = in_float64(SpatialAttention(rngs=nnx.Rngs(0)))
    kernel, norm = np.asarray(attend.spatial.conv.kernel[...]), attend.spatial.bn
    maps = np.stack([x.max(-1), x.mean(-1)], -1)[0]  # [7, 7, 2]
    value = np.sum(maps * kernel[..., 0]) / np.sqrt(1 + 1e-5)  # statistics 0 and 1
    scale = sigmoid(value * norm.scale[...] + norm.bias[...])
    np.testing.assert_allclose(attend(jnp.asarray(x))[0, 3, 3], x[0, 3, 3] * scale, rtol=1e-12)


def test_a_fresh_network_starts_with_every_position_equal():
    """The authors start the last scale of the spatial attention at 0: its sigmoid gives 1/2."""
    attend = build(registry.resolve("cbam_resnet18")).layer1[0].cbam
    norm = attend.SpatialGate.spatial.bn
    assert norm.scale.get_metadata("init").mean == 0
    assert norm.momentum == 0.01


def test_at_ties_the_gradient_goes_where_pytorch_sends_it():
    """To the first maximum, over a map as well as over the channels."""
    twin = torch_ref.CBAM(16, reduction=4).double().eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_()
    attend = convert.load(CBAM(16, reduction=4, rngs=nnx.Rngs(0)), twin.state_dict())
    set_mode(attend, train=False)
    x = np.round(draw(2, 6, 6, 16))  # whole numbers: maxima are shared by many
    assert np.mean((x == x.max(-1, keepdims=True)).sum(-1) > 1) > 0.2
    inputs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    torch.sin(twin(inputs)).sum().backward()
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(attend(x))))(jnp.asarray(x))
    wanted = inputs.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="reduction=16 leaves no hidden unit for 8 channels"):
        ChannelAttention(8, rngs=None)
    with pytest.raises(ValueError, match="odd, got 4"):
        SpatialAttention(4, rngs=None)
