"""The modules that people plug into networks of their own: each alone, beside its twin."""

import importlib
import inspect
import pathlib
import re

import numpy as np
import pytest
import torch
from flax import nnx
from test_init import disagreement

import convert
import flax_nets
from benchmarks.compare import (
    GRADIENT,
    OUTPUT,
    flax_pass,
    randomise,
    state_dict,
    torch_pass,
    worst_errors,
)
from convert.rules import entries

MODULES = {  # name -> arguments, shape of the input (NHWC, or [N, L, width])
    "BasicBlock": (dict(in_channels=4, channels=4), (2, 5, 4, 4)),
    "Bottleneck": (dict(in_channels=16, channels=4, groups=2, base_width=32), (2, 5, 4, 16)),
    "SqueezeExcite": (dict(channels=8), (2, 5, 4, 8)),
    "ChannelAttention": (dict(channels=8, reduction=4), (2, 5, 4, 8)),
    "SpatialAttention": (dict(kernel_size=3), (2, 5, 4, 8)),
    "CBAM": (dict(channels=8, reduction=4), (2, 9, 8, 8)),
    "MultiHeadAttention": (dict(embed_dim=6, num_heads=2), (2, 5, 6)),
    "LocalAttention": (dict(embed_dim=6, num_heads=2, window=1), (2, 5, 6)),
    "SparseAttention": (dict(embed_dim=6, num_heads=2, pattern="fixed"), (2, 5, 6)),
    "TransformerEncoderLayer": (dict(d_model=6, nhead=2, dim_feedforward=8, dropout=0), (2, 5, 6)),
    "Highway": (dict(in_channels=3, channels=4, linear_carry=True), (2, 3)),
    "Highway (convolution)": (dict(in_channels=3, kernel_size=3), (2, 5, 4, 3)),
    "Fire": (
        dict(in_channels=6, squeeze=3, expand1x1=4, expand3x3=5, bypass="complex"),
        (2, 5, 4, 6),
    ),
    "MLPConv": (dict(in_channels=3, widths=(6, 5, 4), padding=1), (2, 5, 4, 3)),
    "Inception": (
        dict(in_channels=6, ch1x1=2, red3x3=3, ch3x3=4, red5x5=2, ch5x5=3, pool_proj=2),
        (2, 5, 4, 6),
    ),
    "InceptionA": (dict(in_channels=6, pool_features=4), (2, 5, 4, 6)),
    "InceptionB": (dict(in_channels=6), (2, 9, 8, 6)),
    "InceptionC": (dict(in_channels=6, channels_7x7=3), (2, 5, 4, 6)),
    "InceptionD": (dict(in_channels=6), (2, 9, 8, 6)),
    "InceptionE": (dict(in_channels=6), (2, 5, 4, 6)),
    "BasicConv2d": (dict(in_channels=3, channels=4, kernel_size=3, stride=2), (2, 9, 8, 3)),
    "SeparableConv2d": (dict(in_channels=3, channels=4), (2, 5, 4, 3)),
    "DepthwiseSeparableConv": (dict(in_channels=3, channels=4, stride=2), (2, 9, 8, 3)),
    "InvertedResidual": (dict(in_channels=4, channels=4, expansion=2), (2, 5, 4, 4)),
    "DenseBlock": (dict(depth=2, in_channels=4, growth=2), (2, 5, 4, 4)),
    "ShuffleV1Block": (dict(in_channels=12, channels=12), (2, 5, 4, 12)),
    "models.mobilenet_v3.InvertedResidual": (
        dict(in_channels=4, expanded=8, channels=4, kernel_size=5, squeeze=4),
        (2, 5, 4, 4),
    ),
    "models.shufflenet.InvertedResidual": (dict(in_channels=4, channels=6, stride=2), (2, 9, 8, 4)),
}


def find(name):
    """The module in Flax, and its twin: the same class name in the file of the same name."""
    path = name.split()[0].rpartition(".")
    room = importlib.import_module(".".join(filter(None, ("flax_nets", path[0]))))
    ours = getattr(room, path[2])
    file = ours.__module__.rpartition(".")[2]
    shared = "layers" if ".layers." in ours.__module__ else file
    return ours, getattr(importlib.import_module(f"torch_ref.{shared}"), path[2])


def nhwc(x):
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


@pytest.mark.parametrize("name", MODULES)
def test_the_twin_draws_from_our_distributions(name):
    """By itself, too: outside of a network that draws its parameters anew."""
    arguments, _ = MODULES[name]
    ours, theirs = find(name)
    torch.manual_seed(0)
    drawn = state_dict(theirs(**arguments))
    for entry in entries(ours(**arguments, rngs=None)):
        assert disagreement(entry.variable.get_metadata("init"), drawn[entry.key]) is None, entry


@pytest.mark.parametrize("name", MODULES)
def test_alone_beside_its_twin(name):
    """Converted, in train mode: output, gradients of all, statistics; and the way back."""
    arguments, shape = MODULES[name]
    ours, theirs = find(name)
    twin = randomise(theirs(**arguments).double())
    before = {key: value.copy() for key, value in state_dict(twin).items()}
    model = convert.load(ours(**arguments, rngs=None), before)
    back = convert.export(model)
    assert list(back) == list(before)
    assert all(np.array_equal(back[key], value) for key, value in before.items())
    twin.register_forward_hook(
        lambda module, inputs, output: nhwc(output)
    )  # so that both have the same loss
    x = np.random.default_rng(0).normal(size=shape)
    wanted, got = torch_pass(twin, x, train=True), flax_pass(model, x, train=True)
    errors = worst_errors(got, wanted)
    assert max(errors["outputs"], errors["statistics"]) <= OUTPUT, errors
    assert max(errors["gradients"], errors["input_gradient"]) <= GRADIENT, errors
    assert all(np.any(gradient) for gradient in got["gradients"].values())


def test_every_module_has_its_example():
    """In docs/modules.md, whose examples run."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "modules.md").read_text("utf-8")
    exported = [n for n in flax_nets.__all__ if inspect.isclass(getattr(flax_nets, n))]
    modules = [n for n in exported if issubclass(getattr(flax_nets, n), nnx.Module)]
    assert len(modules) > 30
    assert [n for n in modules if not re.search(rf"flax_nets\.{n}\b", page)] == []
    assert [n for n in modules if f"`{n}`" not in page] == []
