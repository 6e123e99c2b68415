"""Optimizers alone against torch.optim and timm: 10 steps on the same gradients, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_nets import train
from flax_nets.train import schedules

STEPS = 10
SHAPES = {"conv": {"bias": (4,), "kernel": (3, 2, 4)}, "norm.1": {"scale": (5,)}}
NAMES = ("conv.bias", "conv.kernel", "norm.1.scale")

fraction = st.floats(0.0, 0.95)
decay = st.sampled_from([0.0, 1e-4, 0.1])
eps = st.sampled_from([1e-10, 1e-8, 1e-3, 1.0])
betas = st.tuples(fraction, st.floats(0.5, 0.9999))
seed = st.integers(0, 2**31)
rms = {
    "alpha": st.floats(0.5, 0.999),
    "eps": eps,
    "weight_decay": decay,
    "momentum": st.just(0.0) | fraction,
    "centered": st.booleans(),
}
OPTIMIZERS = {
    "sgd": (
        train.sgd,
        torch.optim.SGD,
        st.fixed_dictionaries(
            {"momentum": st.just(0.0) | fraction, "dampening": fraction, "weight_decay": decay}
        )
        | st.fixed_dictionaries(
            {"momentum": st.floats(0.1, 0.95), "nesterov": st.booleans(), "weight_decay": decay}
        ),
    ),
    "adam": (
        train.adam,
        torch.optim.Adam,
        st.fixed_dictionaries({"betas": betas, "eps": eps, "weight_decay": decay}),
    ),
    "adamw": (
        train.adamw,
        torch.optim.AdamW,
        st.fixed_dictionaries({"betas": betas, "eps": eps, "weight_decay": decay}),
    ),
    "rmsprop": (train.rmsprop, torch.optim.RMSprop, st.fixed_dictionaries(rms)),
    "rmsprop_tf": (train.rmsprop_tf, timm.optim.RMSpropTF, st.fixed_dictionaries(rms)),
    "lamb": (
        train.lamb,
        timm.optim.Lamb,
        st.fixed_dictionaries(
            {
                "betas": betas,
                "eps": eps,
                "weight_decay": decay,
                "max_grad_norm": st.sampled_from([None, 0.5, 100.0]),
            }
        ),
    ),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
few = settings(max_examples=20, deadline=None, derandomize=True)


def draw(rng, scale=1.0):
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape)),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run_jax(optimizer, params, grads):
    """The parameters after each step, each a list of leaves."""
    state, history = optimizer.init(params), []
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.tree.leaves(params))
    return history


def run_torch(make, params, grads, rates=None, clip=None):
    """The same in PyTorch; `make` takes the list of leaves and returns an optimizer."""
    leaves = [torch.tensor(np.asarray(p), requires_grad=True) for p in jax.tree.leaves(params)]
    optimizer, history = make(leaves), []
    for i, g in enumerate(grads):
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[i]
        for leaf, value in zip(leaves, jax.tree.leaves(g), strict=True):
            leaf.grad = torch.tensor(np.asarray(value)) if leaf.requires_grad else None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in leaves if p.requires_grad], clip)
        optimizer.step()
        history.append([leaf.detach().numpy().copy() for leaf in leaves])
    return history


def error(ours, theirs):
    """The largest error of any tensor at any step, relative to that tensor's maximum."""
    pairs = [p for a, b in zip(ours, theirs, strict=True) for p in zip(a, b, strict=True)]
    return max(np.abs(np.asarray(a) - b).max() / np.abs(b).max() for a, b in pairs)


@each_optimizer
@few
@given(data=st.data(), seed=seed)
def test_optimizer_equals_torch(name, data, seed):
    ours, theirs, arguments = OPTIMIZERS[name]
    kwargs = data.draw(arguments)
    rng = np.random.default_rng(seed)
    params, grads = draw(rng), [draw(rng) for _ in range(STEPS)]
    rates = 10 ** rng.uniform(-4, -1, STEPS)
    history = run_jax(ours(lambda t: jnp.asarray(rates)[t], **kwargs), params, grads)
    assert error(history, run_torch(lambda p: theirs(p, **kwargs), params, grads, rates)) < 1e-12


@each_optimizer
def test_defaults_and_jit(name):
    """Default arguments, a constant rate, a jitted step; jit changes nothing beyond rounding."""
    ours, theirs, _ = OPTIMIZERS[name]
    rng = np.random.default_rng(0)
    params, grads = draw(rng), [draw(rng) for _ in range(STEPS)]
    optimizer = ours(0.01)
    jitted = optax.GradientTransformation(optimizer.init, jax.jit(optimizer.update))
    theirs = run_torch(lambda p: theirs(p, lr=0.01), params, grads)
    assert error(run_jax(jitted, params, grads), theirs) < 1e-12


@each_optimizer
def test_float32_is_as_exact_as_torch(name):
    """From zero, where a wrong bias correction shows: optax's own Adam fails this."""
    ours, theirs, _ = OPTIMIZERS[name]
    rng = np.random.default_rng(1)
    params = {"w": jnp.zeros((2000,), jnp.float32)}
    grads = [{"w": jnp.asarray(rng.standard_normal((2000,)), jnp.float32)} for _ in range(STEPS)]
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (params, grads))
    truth = run_torch(lambda p: theirs(p, lr=0.01), *wide)
    torch32 = run_torch(lambda p: theirs(p, lr=0.01), params, grads)
    with jax.enable_x64(False):
        jax32 = run_jax(ours(schedules.multi_step(0.01, [])), params, grads)
    assert jax32[-1][0].dtype == jnp.float32

    def distance(history):
        return np.sqrt(
            np.mean([(np.float64(a[0]) - b[0]) ** 2 for a, b in zip(history, truth, strict=True)])
        )

    assert 0 < distance(jax32) <= 1.5 * distance(torch32)


@few
@given(max_norm=st.floats(1e-3, 20.0), seed=seed)
def test_clip_by_global_norm(max_norm, seed):
    rng = np.random.default_rng(seed)
    params, grads = draw(rng), [draw(rng, scale=10.0**-i) for i in range(STEPS)]
    ours = run_jax(optax.chain(train.clip_by_global_norm(max_norm), train.sgd(1.0)), params, grads)
    theirs = run_torch(lambda p: torch.optim.SGD(p, lr=1.0), params, grads, clip=max_norm)
    assert error(ours, theirs) < 1e-12


def test_clip_accumulates_in_float32():
    grads = {"w": jnp.ones((10_000,), jnp.bfloat16)}
    clipped, _ = train.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    assert clipped["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(clipped["w"], jnp.full((10_000,), 0.01, jnp.bfloat16))


def test_decay_mask():
    params = draw(np.random.default_rng(0))
    assert jax.tree.leaves(train.decay_mask(params)) == [False, True, False]
    assert not any(jax.tree.leaves(train.decay_mask(params, exclude=["conv.kernel"])))
    assert not any(jax.tree.leaves(train.decay_mask(params, exclude=["conv"])))
    with pytest.raises(ValueError, match=r"\['cnov'\] match no parameter.*conv\.kernel"):
        train.decay_mask(params, exclude=["cnov"])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "rmsprop_tf", "lamb"])
@pytest.mark.parametrize("as_tree", [False, True])
def test_weight_decay_mask(name, as_tree):
    ours, theirs, _ = OPTIMIZERS[name]
    rng = np.random.default_rng(2)
    params, grads = draw(rng), [draw(rng) for _ in range(STEPS)]
    mask = train.decay_mask(params) if as_tree else train.decay_mask

    def make(leaves):
        bias, kernel, scale = leaves
        decayed = {"params": [kernel], "weight_decay": 0.1}
        return theirs([decayed, {"params": [bias, scale], "weight_decay": 0.0}], lr=0.01)

    history = run_jax(ours(0.01, weight_decay=0.1, mask=mask), params, grads)
    assert error(history, run_torch(make, params, grads)) < 1e-12


def test_param_groups():
    """A rate of its own, another optimizer, and frozen parameters that enter no global norm."""
    rng = np.random.default_rng(3)
    params, grads = draw(rng), [draw(rng) for _ in range(STEPS)]
    groups = {"conv.bias": train.sgd(0.1), "norm*": train.sgd(0.3, momentum=0.9)}
    ours = train.param_groups(groups, default=train.sgd(0.01, weight_decay=0.1))

    def make(leaves):
        bias, kernel, scale = leaves
        return torch.optim.SGD(
            [
                {"params": [kernel], "weight_decay": 0.1},
                {"params": [bias], "lr": 0.1},
                {"params": [scale], "lr": 0.3, "momentum": 0.9},
            ],
            lr=0.01,
        )

    assert error(run_jax(ours, params, grads), run_torch(make, params, grads)) < 1e-12
    with pytest.raises(ValueError, match=r"\['fc'\] match no parameter"):
        train.param_groups({"fc": train.sgd(0.1)}, default=train.sgd(0.01)).init(params)


@each_optimizer
def test_rates_by_layer(name):
    """As PyTorch's groups with rates of their own, that change over time, decay included."""
    ours, theirs, _ = OPTIMIZERS[name]
    rng = np.random.default_rng(5)
    params, grads = draw(rng), [draw(rng) for _ in range(STEPS)]
    rates, factors = 10 ** rng.uniform(-4, -1, STEPS), {"conv": 0.1, "norm*": 3.0}
    made = ours(lambda t: jnp.asarray(rates)[t], weight_decay=0.1)
    scaled = optax.chain(made, train.scale_rates(factors))
    leaves = [torch.tensor(np.asarray(p)) for p in jax.tree.leaves(params)]
    groups = [{"params": leaves[:2]}, {"params": leaves[2:]}]
    reference, history = theirs(groups, lr=1.0, weight_decay=0.1), []
    for rate, g in zip(rates, grads, strict=True):
        for group, factor in zip(reference.param_groups, factors.values(), strict=True):
            group["lr"] = rate * factor
        for leaf, value in zip(leaves, jax.tree.leaves(g), strict=True):
            leaf.grad = torch.tensor(np.asarray(value))
        reference.step()
        history.append([leaf.numpy().copy() for leaf in leaves])
    assert error(run_jax(scaled, params, grads), history) < 1e-12


def test_errors_of_rates_by_layer():
    with pytest.raises(ValueError, match=r"\['fc'\] match no parameter"):
        train.scale_rates({"fc": 2.0}).init(draw(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"factors: got \{'fc': -1.0\}"):
        train.scale_rates({"fc": -1.0})


@pytest.mark.parametrize("pattern", ["conv", "con*", "conv.*"])
def test_freeze(pattern):
    rng = np.random.default_rng(4)
    params, grads = draw(rng), [draw(rng) for _ in range(STEPS)]
    clipped = optax.chain(train.clip_by_global_norm(1.0), train.adamw(0.01, mask=train.decay_mask))

    def make(leaves):
        for leaf in leaves[:2]:
            leaf.requires_grad_(False)
        return torch.optim.AdamW(leaves[2:], lr=0.01, weight_decay=0.0)

    optimizer = train.freeze(clipped, [pattern])
    history = run_jax(optimizer, params, grads)
    assert error(history, run_torch(make, params, grads, clip=1.0)) < 1e-12
    for now, start in zip(history[-1][:2], jax.tree.leaves(params)[:2], strict=True):
        np.testing.assert_array_equal(now, start)
    sizes = [x.size for x in jax.tree.leaves(optimizer.init(params))]
    assert sum(sizes) == 2 * 5 + 1  # two moments of the trained vector, and the count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train.sgd(-0.1), "learning_rate: got -0.1"),
        (lambda: train.sgd(0.1, momentum=-1), "momentum: got -1"),
        (lambda: train.sgd(0.1, nesterov=True), "nesterov: needs a momentum above 0"),
        (lambda: train.sgd(0.1, 0.9, 0.5, nesterov=True), "no dampening, got momentum=0.9"),
        (lambda: train.adam(0.1, betas=(0.9, 1.0)), r"betas: got \(0.9, 1.0\)"),
        (lambda: train.adamw(0.1, weight_decay=math.nan), "weight_decay: got nan"),
        (lambda: train.rmsprop(0.1, eps=-1e-8), "eps: got -1e-08"),
        (lambda: train.clip_by_global_norm(0.0), "max_norm: got 0.0"),
        (lambda: train.lamb(0.1, max_grad_norm=-1.0), "max_norm: got -1.0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
