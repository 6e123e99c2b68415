"""Batch norm folded into convolutions: the same function, with fewer operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_nets
from flax_nets.inspect.features import modules


def randomised(name, dtype, **arguments):
    """A network whose batch norms do something."""
    model = flax_nets.create_model(name, param_dtype=dtype, **arguments)
    rng = np.random.default_rng(0)
    for module in modules(model).values():
        if isinstance(module, flax_nets.BatchNorm):
            for variable, low, high in (
                (module.mean, -0.3, 0.3),
                (module.var, 0.5, 2.0),
                (module.scale, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                variable.set_value(jnp.asarray(rng.uniform(low, high, variable.shape), dtype))
    return model


def norms(model):
    return [p for p, m in modules(model).items() if isinstance(m, flax_nets.BatchNorm)]


@pytest.mark.parametrize("name", ["resnet20_cifar", "densenet_bc100_k12_cifar", "lenet5"])
def test_the_function_stays(name):
    arguments = {"depths": (1, 1, 1)} if name != "lenet5" else {}
    model = randomised(name, jnp.float64, **arguments)
    before = norms(model)
    folded = flax_nets.fold_batch_norm(model)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *model.spec.input_shape)))
    run = nnx.jit(lambda m, x: m(x))
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-11, atol=1e-13)
    assert norms(model) == before  # the network itself is as it was
    if name == "resnet20_cifar":
        assert before and not norms(folded)
    if name.startswith("densenet"):  # norm1 takes a concatenation, norm2 what conv1 gives
        assert any(".norm2" in p for p in before)
        assert not any(".norm2" in p for p in norms(folded))
        assert [p for p in before if ".norm1" in p] == [p for p in norms(folded) if ".norm1" in p]


class Shared(nnx.Module):
    """Where folding would be wrong: each convolution's output is used beside its batch norm."""

    def __init__(self, rngs):
        self.conv = flax_nets.Conv(3, 4, 1, rngs=rngs)
        self.norm = flax_nets.BatchNorm(4, rngs=rngs)
        self.twice = flax_nets.Conv(4, 4, 1, rngs=rngs)
        self.norm2 = flax_nets.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        y = self.conv(x)
        y = y + self.norm(y)
        return self.norm2(self.twice(self.twice(y)))


def test_an_output_with_other_users_is_not_folded():
    model = Shared(nnx.Rngs(0))
    folded = flax_nets.fold_batch_norm(model, input_shape=(4, 4, 3))
    assert norms(folded) == ["norm", "norm2"]
    with pytest.raises(ValueError, match="input_shape"):
        flax_nets.fold_batch_norm(model)


def test_parameters_keep_their_type_and_sums_are_wide():
    model = randomised("resnet20_cifar", jnp.bfloat16, depths=(1, 1, 1))
    folded = flax_nets.fold_batch_norm(model)
    types = {v.dtype for v in jax.tree.leaves(nnx.state(folded, nnx.Param))}
    assert types == {jnp.dtype(jnp.bfloat16)}
    exact = model.bn1.scale[...].astype(jnp.float32) * jax.lax.rsqrt(
        model.bn1.var[...].astype(jnp.float32) + jnp.float32(1e-5)
    )
    kernel = model.conv1.kernel[...].astype(jnp.float32) * exact.reshape(1, 1, 1, -1)
    np.testing.assert_array_equal(
        folded.conv1.kernel[...].astype(jnp.float32),
        kernel.astype(jnp.bfloat16).astype(jnp.float32),
    )
