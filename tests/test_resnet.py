"""Stochastic depth, in ResNet and in what is made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch

import convert
import flax_nets
from benchmarks.compare import OUTPUT, error, nchw, state_dict, twin
from flax_nets import registry

FAMILIES = ("resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "cbam_resnet18")
SMALL = dict(depths=(1, 1), widths=(16, 32), num_classes=5)  # blocks dropped never, and at the rate


def rates(model):
    """Of all blocks, in their order."""
    blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
    return [getattr(b.drop_path, "rate", getattr(b.drop_path, "drop_prob", 0.0)) for b in blocks]


def test_rates_rise_as_in_timm():
    theirs = rates(timm.create_model("resnet50", drop_path_rate=0.05))
    assert (len(theirs), theirs[-1]) == (16, 0.05)
    spec = registry.resolve("resnet50").with_arguments(stochastic_depth=0.05)
    for model in (flax_nets.create.build(spec), spec.cls("torch_ref")(**spec.arguments)):
        assert np.abs(np.subtract(rates(model), theirs)).max() <= 1e-16


@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_is_dropped_and_nothing_else(name):
    """At a rate of 1, where there is nothing random, as in the twin; in train mode only."""
    spec = registry.resolve(name).with_arguments(**SMALL)
    reference = twin(spec, stochastic_depth=1.0)
    x = np.random.default_rng(0).normal(size=(4, 64, 64, 3))
    outputs = {}
    for rate in (0.0, 1.0):
        model = flax_nets.create_model(name, param_dtype="float64", stochastic_depth=rate, **SMALL)
        apply, params, state = flax_nets.functional(convert.load(model, state_dict(reference)))
        for train in (False, True):
            key = jax.random.key(0) if train else None
            outputs[rate, train], _ = apply(params, state, jnp.asarray(x), train=train, rngs=key)
    for train in (False, True):
        theirs = reference.train(train)(torch.tensor(nchw(x)))
        assert error(outputs[1.0, train], theirs) <= OUTPUT
    assert np.array_equal(outputs[0.0, False], outputs[1.0, False])
    assert error(outputs[0.0, True], outputs[1.0, True]) > 1e-3


def test_examples_are_dropped_at_the_rate():
    """Each on its own; the kept residuals grow, so that the mean stays."""
    x = jnp.tile(jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 3))), (4000, 1, 1, 1))

    def trained(rate):
        """The last block's output, before its ReLU hides what is negative."""
        model = flax_nets.create_model(
            "resnet20_cifar", param_dtype="float64", depths=(2,), widths=(4,), num_classes=0,
            stochastic_depth=rate,
        )  # fmt: skip
        model.train()
        record = flax_nets.features(model, x, ["layer1.1.drop_path"])
        return record["layer1.1.drop_path"]

    whole, some = trained(0.0), trained(0.4)
    dropped = (some == 0).all((1, 2, 3))
    assert error(some[~dropped], whole[~dropped] / 0.6) <= OUTPUT
    assert abs(float(dropped.mean()) - 0.4) < 0.03


def test_it_needs_a_random_stream_to_train():
    model = flax_nets.create_model("resnet20_cifar", depths=(2,), widths=(4,), stochastic_depth=0.1)
    apply, params, state = flax_nets.functional(model)
    x = jnp.zeros((2, 8, 8, 3))
    apply(params, state, x)
    with pytest.raises(ValueError, match="dropout or stochastic depth: in train mode pass rngs"):
        apply(params, state, x, train=True)
    with pytest.raises(ValueError, match=r"stochastic_depth: got 1\.5"):
        flax_nets.create_model("resnet18", stochastic_depth=1.5)
