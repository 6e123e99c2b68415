"""Schedules against torch.optim.lr_scheduler and timm, step by step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.scheduler
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from flax_nets.train import schedules

few = settings(max_examples=20, deadline=None, derandomize=True)


def torch_rates(make, count, rate):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


SCHEDULES = {
    "step": (
        lambda rate, n, g: schedules.step(rate, n, g),
        lambda o, n, g: lr_scheduler.StepLR(o, n, g),
    ),
    "multi_step": (
        lambda rate, n, g: schedules.multi_step(rate, [n, n, 2 * n + 1], g),
        lambda o, n, g: lr_scheduler.MultiStepLR(o, [n, n, 2 * n + 1], g),
    ),
    "exponential": (
        lambda rate, n, g: schedules.exponential(rate, g),
        lambda o, n, g: lr_scheduler.ExponentialLR(o, g),
    ),
    "cosine": (
        lambda rate, n, g: schedules.cosine(rate, n, 0.01 * g),
        lambda o, n, g: lr_scheduler.CosineAnnealingLR(o, n, 0.01 * g),
    ),
    "linear": (
        lambda rate, n, g: schedules.linear(rate, g, 0.7, n),
        lambda o, n, g: lr_scheduler.LinearLR(o, g, 0.7, n),
    ),
    "polynomial": (
        lambda rate, n, g: schedules.polynomial(rate, n, 3 * g),
        lambda o, n, g: lr_scheduler.PolynomialLR(o, n, 3 * g),
    ),
    "sequential": (
        lambda rate, n, g: schedules.sequential(
            [schedules.linear(rate, g, 1.0, n), schedules.cosine(rate, 30)], [n]
        ),
        lambda o, n, g: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, g, 1.0, n), lr_scheduler.CosineAnnealingLR(o, 30)],
            milestones=[n],
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@few
@given(rate=st.floats(1e-3, 1.0), n=st.integers(1, 25), gamma=st.floats(0.1, 1.0))
def test_schedule_equals_torch(name, rate, n, gamma):
    ours, theirs = SCHEDULES[name]
    expected = torch_rates(lambda o: theirs(o, n, gamma), 40, rate)
    schedule = ours(rate, n, gamma)
    rates = jax.vmap(schedule)(jnp.arange(40, dtype=jnp.int32))
    assert np.abs(rates - expected).max() / expected.max() < 1e-12
    np.testing.assert_array_equal(schedule(np.arange(40)), rates)
    assert np.abs(float(schedule(7)) - expected[7]) <= 1e-12 * expected.max()


@few
@given(
    rate=st.floats(1e-3, 1.0),
    total=st.integers(2, 30),
    warmup=st.integers(0, 10),
    low=st.floats(0.0, 1e-3),
    prefix=st.booleans(),
)
def test_timm_cosine(rate, total, warmup, low, prefix):
    arguments = dict(lr_min=low, warmup_t=warmup, warmup_lr_init=low / 2, warmup_prefix=prefix)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    theirs = timm.scheduler.CosineLRScheduler(optimizer, total, **arguments)
    expected = np.array([theirs._get_lr(t)[0] for t in range(50)])
    rates = schedules.timm_cosine(rate, total, **arguments)(jnp.arange(50))
    assert np.abs(rates - expected).max() < 1e-12 * rate


def test_per_epoch():
    """Constant over the updates of an epoch, as a scheduler stepped once per epoch."""
    rates = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 4), 4, 0.1)
    schedule = schedules.per_epoch(schedules.cosine(0.1, 4), steps_per_epoch=3)
    ours = jax.jit(schedule)(jnp.arange(12))
    assert np.abs(ours - np.repeat(rates, 3)).max() < 1e-12 * 0.1


@pytest.mark.parametrize(
    ("schedule", "truth", "t"),
    [
        (schedules.exponential(1.0, 0.99999), 0.99999**100_000, 100_000),
        (schedules.cosine(1.0, 100_000), math.sin(math.pi / 200_000) ** 2, 99_999),
        (schedules.polynomial(1.0, 100_000, 2.0), 1e-10, 99_999),
    ],
)
def test_schedules_keep_precision_in_float32(schedule, truth, t):
    with jax.enable_x64(False):
        rate = schedule(jnp.asarray(t))
        assert rate.dtype == jnp.float32
        assert abs(float(rate) / truth - 1) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.step(0.1, 0), "step_size: got 0"),
        (lambda: schedules.exponential(0.1, 0.0), "gamma: got 0.0"),
        (lambda: schedules.sequential([schedules.cosine(0.1, 5)], [3]), "got 1 schedules and 1"),
        (
            lambda: schedules.sequential([schedules.cosine(0.1, 5)] * 3, [5, 3]),
            r"milestones: got \(5, 3\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
