"""Losses and their gradients against PyTorch in float64, and accuracy against a plain count."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.loss
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_nets import train

few = settings(max_examples=20, deadline=None, derandomize=True)
drawn = dict(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(4, 4), (5, 9)]),  # no single example whose loss is all cancellation
    spread=st.sampled_from([0.1, 3.0, 200.0]),
    smoothing=st.just(0.0) | st.floats(1e-6, 0.99),
    soft=st.booleans(),
)


def problem(seed, shape, spread, soft):
    """Logits [N, C], and labels [N] or probabilities [N, C], as numpy arrays."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal(shape)
    if soft:
        return logits, rng.dirichlet(np.ones(shape[1]), shape[0])
    return logits, rng.integers(shape[1], size=shape[0])


def compare(ours, theirs, logits):
    """Value and gradient with respect to the logits, each within 1e-12 of its maximum."""
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    x = torch.tensor(logits, requires_grad=True)
    expected = theirs(x)
    expected.backward()
    expected = expected.item()
    assert abs(float(value) - expected) <= 1e-12 * abs(expected)
    reference = x.grad.numpy()
    assert np.abs(gradient - reference).max() <= 1e-12 * np.abs(reference).max()


@few
@given(**drawn, reduction=st.sampled_from(["mean", "sum"]))
def test_cross_entropy(seed, shape, spread, smoothing, soft, reduction):
    logits, targets = problem(seed, shape, spread, soft)
    compare(
        lambda x: train.cross_entropy(x, jnp.asarray(targets), smoothing, reduction=reduction),
        lambda x: F.cross_entropy(
            x, torch.tensor(targets), label_smoothing=smoothing, reduction=reduction
        ),
        logits,
    )
    rows = train.cross_entropy(
        jnp.asarray(logits), jnp.asarray(targets), smoothing, reduction="none"
    )
    expected = F.cross_entropy(
        torch.tensor(logits), torch.tensor(targets), label_smoothing=smoothing, reduction="none"
    )
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-12 * float(expected.max()))


@few
@given(**drawn, threshold=st.none() | st.sampled_from([0.0, 0.2]))
def test_binary_cross_entropy(seed, shape, spread, smoothing, soft, threshold):
    logits, targets = problem(seed, shape, spread, soft)
    theirs = timm.loss.BinaryCrossEntropy(smoothing, target_threshold=threshold)
    compare(
        lambda x: train.binary_cross_entropy(x, jnp.asarray(targets), smoothing, threshold),
        lambda x: theirs(x, torch.tensor(targets)),
        logits,
    )


@few
@given(
    seed=drawn["seed"],
    shape=drawn["shape"],
    spread=st.sampled_from([0.1, 3.0, 20.0]),
    j=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_rbf_loss(seed, shape, spread, j):
    """Equation 9 written out in PyTorch."""
    logits, labels = problem(seed, shape, spread, soft=False)
    logits = -np.abs(logits)

    def theirs(x):
        penalties = -x
        own = penalties[torch.arange(len(labels)), torch.tensor(labels)]
        return (own + torch.log(np.exp(-j) + torch.exp(-penalties).sum(1))).mean()

    compare(lambda x: train.rbf_loss(x, jnp.asarray(labels), j), theirs, logits)


LOSSES = {
    "cross_entropy": lambda *a, **k: train.cross_entropy(*a, label_smoothing=0.1, **k),
    "binary_cross_entropy": train.binary_cross_entropy,
    "rbf_loss": train.rbf_loss,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
def test_padded_examples_count_nothing(loss):
    logits, labels = problem(0, (5, 4), 3.0, soft=False)
    padded = np.concatenate([logits, np.full((3, 4), np.nan)])
    fill = np.concatenate([labels, [-1, 0, 99]])
    mask = np.arange(8) < 5
    for reduction in ("mean", "sum"):
        expected = loss(jnp.asarray(logits), jnp.asarray(labels), reduction=reduction)
        value = loss(
            jnp.asarray(padded), jnp.asarray(fill), weights=jnp.asarray(mask), reduction=reduction
        )
        np.testing.assert_allclose(value, expected, rtol=1e-14)
    nothing = loss(jnp.asarray(padded), jnp.asarray(fill), weights=jnp.zeros((8,)))
    assert nothing == 0


@pytest.mark.parametrize("call", [*LOSSES.values(), train.topk_correct])
def test_jit(call):
    logits, labels = map(jnp.asarray, problem(4, (5, 4), 3.0, soft=False))
    weights = jnp.asarray([True, True, False, True, True])
    expected = call(logits, labels, weights=weights)
    jitted = jax.jit(call)(logits, labels, weights=weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), jitted, expected)


@each_loss
def test_weights_are_a_weighted_mean(loss):
    logits, labels = problem(1, (5, 4), 3.0, soft=False)
    weights = np.array([1.0, 0.5, 0.0, 2.0, 3.0])
    rows = loss(jnp.asarray(logits), jnp.asarray(labels), reduction="none")
    value = loss(jnp.asarray(logits), jnp.asarray(labels), weights=weights)
    np.testing.assert_allclose(value, np.average(rows, weights=weights), rtol=1e-14)


@each_loss
def test_a_label_that_is_no_class_gives_nan(loss):
    logits = jnp.zeros((2, 4))
    for label in (-1, 4):
        assert np.isnan(loss(logits, jnp.asarray([0, label])))


@each_loss
def test_low_precision_accumulates_in_float32(loss):
    logits, labels = problem(2, (300, 4), 2.0, soft=False)
    low = jnp.asarray(logits, jnp.bfloat16)
    value = loss(low, jnp.asarray(labels, jnp.uint8))
    assert value.dtype == jnp.float32
    exact = loss(low.astype(jnp.float64), jnp.asarray(labels))
    assert abs(float(value) / float(exact) - 1) < 1e-6
    assert jax.grad(lambda x: loss(x, jnp.asarray(labels)))(low).dtype == jnp.bfloat16


def test_soft_targets_under_strict_dtypes():
    """Float32 probabilities for float64 logits, and the other way round."""
    logits, targets = problem(3, (5, 4), 2.0, soft=True)
    for a, b in [(jnp.float64, jnp.float32), (jnp.bfloat16, jnp.float64)]:
        value = train.cross_entropy(jnp.asarray(logits, a), jnp.asarray(targets, b), 0.1)
        assert value.dtype == np.promote_types(a, jnp.float32)


@few
@given(seed=st.integers(0, 2**31), classes=st.sampled_from([2, 9]), ties=st.booleans())
def test_topk_correct(seed, classes, ties):
    rng = np.random.default_rng(seed)
    n = 12
    logits = rng.integers(3, size=(n, classes)) if ties else rng.standard_normal((n, classes))
    labels = rng.integers(classes, size=n)
    weights = rng.integers(3, size=n)
    order = np.argsort(-logits, axis=1, kind="stable")
    counts = train.topk_correct(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels), (1, 3, 5), weights
    )
    for k, count in counts.items():
        hits = (order[:, :k] == labels[:, None]).any(1)
        assert float(count) == (hits * weights).sum()


def test_topk_of_nan_and_padding():
    logits = jnp.asarray([[jnp.nan] * 4, [1.0, 2.0, jnp.nan, 0.0], [0.0, 3.0, 1.0, 2.0]])
    counts = train.topk_correct(logits, jnp.asarray([0, 1, -1]), ks=(1, 2, 5))
    assert {k: float(v) for k, v in counts.items()} == {1: 0.0, 2: 1.0, 5: 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: train.cross_entropy(x[0], y), r"logits: got shape \(4,\)"),
        (lambda x, y: train.cross_entropy(x, y[:2]), r"targets: got int64 of shape \(2,\)"),
        (
            lambda x, y: train.cross_entropy(x, y.astype(float)),
            r"targets: got float64 of shape \(3,\)",
        ),
        (lambda x, y: train.cross_entropy(x, y, 1.5), "label_smoothing: got 1.5"),
        (lambda x, y: train.cross_entropy(x, y, reduction="avg"), "reduction: got 'avg'"),
        (lambda x, y: train.cross_entropy(x, y, weights=x), r"weights: got shape \(3, 4\)"),
        (lambda x, y: train.rbf_loss(x, x), "labels: got dtype float64"),
        (lambda x, y: train.topk_correct(x, x), "labels: got dtype float64"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((3, 4)), jnp.asarray([0, 1, 2]))


def test_import_is_lazy():
    """`import flax_nets.train` brings in no library of the extras, and knows its names."""
    heavy = "{'orbax', 'grain', 'matplotlib', 'PIL', 'sklearn'}"
    code = (
        f"import sys, flax_nets.train as t; print(sorted({heavy} & set(sys.modules)), "
        "'flax_nets.train.optim' in sys.modules, 'sgd' in dir(t), t.sgd.__module__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", "False", "True", "flax_nets.train.optim"]
    with pytest.raises(AttributeError, match="has no attribute 'sdg'"):
        train.sdg  # noqa: B018
