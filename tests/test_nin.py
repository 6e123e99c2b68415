"""What Network in Network's paper brought: Lin et al. 2013."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_nets
from convert.rules import entries
from flax_nets import registry
from flax_nets.create import build


def sides(name, side, **overrides):
    model = flax_nets.create_model(name, **overrides)
    names = [n for n in flax_nets.features.names(model) if n.startswith("pool")]
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    found = jax.eval_shape(lambda x: flax_nets.features(model, x, names), x)
    return [found[name].shape[1] for name in names]


def test_pooling_rounds_up_as_the_authors_do_or_down_as_ports_do():
    # the authors' model ends in an average over 6x6, which rounding down would not leave
    assert sides("nin_imagenet", 224) == [27, 13, 6, 6]
    assert sides("nin_imagenet", 224, ceil_mode=False) == [26, 12, 5, 5]
    assert sides("nin_cifar10", 32) == [16, 8, 8]
    assert sides("nin_cifar10", 32, ceil_mode=False) == [15, 7, 7]


@pytest.mark.parametrize("name", ["nin_imagenet", "nin_cifar10"])
def test_there_is_no_dense_layer(name):
    kernels = [e for e in entries(build(registry.resolve(name))) if e.key.endswith("weight")]
    assert all(len(e.torch_shape) == 4 for e in kernels)
    pointwise = [e.key for e in kernels if e.torch_shape[2:] == (1, 1)]
    assert pointwise == [f"cccp{i}.weight" for i in range(1, len(pointwise) + 1)]
    assert len(pointwise) * 3 == len(kernels) * 2  # two after each convolution


def test_logits_are_the_means_of_the_class_maps():
    model = flax_nets.create_model("nin_cifar10")
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3), jnp.float32)
    maps = flax_nets.features(model, x, ["cccp6"])["cccp6"]
    assert maps.shape == (2, 8, 8, 10)
    np.testing.assert_allclose(model(x), jnp.maximum(maps, 0).mean((1, 2)), rtol=1e-5)


def test_dropout_follows_all_blocks_but_the_last():
    """Two of three for CIFAR-10; the ImageNet model of the authors has one before its last."""
    for name, wanted in (("nin_cifar10", (1, 2)), ("nin_imagenet", (3,))):
        model = flax_nets.create_model(name)
        assert (model.dropped, model.dropout.rate) == (wanted, 0.5)
    small = dict(blocks=((8, 3, 1, 1, 8, 8, "max"), (8, 3, 1, 1, 8, None, None)), dropped=(1,))
    apply, params, state = flax_nets.functional(flax_nets.create_model("nin_cifar10", **small))
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3), jnp.float32)
    a, b = (apply(params, state, x, train=True, rngs=jax.random.key(i))[0] for i in (1, 2))
    assert not np.allclose(a, b)


def test_without_head_the_last_hidden_maps_are_pooled():
    model = flax_nets.create_model("nin_cifar10", num_classes=0)
    assert model(jnp.zeros((2, 32, 32, 3), jnp.float32)).shape == (2, 192)


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        flax_nets.create_model("nin_cifar10", blocks=((8, 3, 1, 1, 8, 8, "median"),))
