"""Xception: Figure 5 of the paper, counted and measured."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_nets
from flax_nets import layers, registry
from flax_nets.create import build
from flax_nets.models.xception import Block, SeparableConv2d


def test_it_has_36_layers_in_14_modules():
    """Section 4: 36 convolutional layers, a separable one counted once; 12 modules with skips,
    one before them and one after."""
    model = build(registry.resolve("xception"))
    modules = [m for _, m in nnx.iter_modules(model)]
    separable = [m for m in modules if isinstance(m, SeparableConv2d)]
    plain = (model.conv1, model.conv2)
    assert len(separable) + len(plain) == 36
    assert sum(isinstance(m, Block) for m in modules) + 2 == 14


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "xception",
            {
                "conv1": (149, 149, 32),
                "conv2": (147, 147, 64),
                "block1": (74, 74, 128),
                "block2": (37, 37, 256),
                "block3": (19, 19, 728),
                "block11": (19, 19, 728),
                "block12": (10, 10, 1024),
                "conv4": (10, 10, 2048),
            },
        ),
        (
            "xception71",
            {
                "stem": (150, 150, 64),
                "blocks.0": (75, 75, 128),
                "blocks.2": (38, 38, 256),
                "blocks.4": (19, 19, 728),
                "blocks.20": (19, 19, 728),
                "blocks.22": (10, 10, 2048),
            },
        ),
    ],
)
def test_output_sizes(name, sizes):
    model = flax_nets.create_model(name)
    x = jnp.zeros((1, 299, 299, 3), jnp.float32)
    maps = jax.eval_shape(lambda x: flax_nets.features(model, x, list(sizes)), x)
    assert {stage: maps[stage].shape[1:] for stage in sizes} == sizes


def test_depthwise_convolutions_have_one_filter_per_channel():
    for name in ("xception", "xception41"):
        kernels = [
            m
            for _, m in nnx.iter_modules(build(registry.resolve(name)))
            if isinstance(m, layers.Conv) and m.groups > 1
        ]
        assert len(kernels) == (34 if name == "xception" else 39)
        assert all(m.groups == m.in_channels == m.out_channels for m in kernels)
        assert all(m.kernel_size == (3, 3) for m in kernels)
