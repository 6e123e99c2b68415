"""Learning-rate schedules equal to `torch.optim.lr_scheduler`'s.

Each function returns `schedule(step) -> learning rate`: `step` counts from 0 the scheduler's own
steps, an int, a traced integer or an integer array, and the result has its shape and the default
float dtype. PyTorch's schedulers step per epoch as often as per update: `per_epoch` turns the one
into the other. The forms are closed, and so written that float32 keeps their relative precision.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

Schedule = Callable[[ArrayLike], jax.Array]


def step(learning_rate: float, step_size: int, gamma: float = 0.1) -> Schedule:
    """`StepLR`: learning_rate * gamma ** (t // step_size)."""
    _check_positive(step_size=step_size, gamma=gamma)
    return lambda t: learning_rate * _power(gamma, jnp.asarray(t) // step_size)


def multi_step(learning_rate: float, milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """`MultiStepLR`: learning_rate * gamma ** (number of milestones <= t)."""
    _check_positive(gamma=gamma)

    def schedule(t: ArrayLike) -> jax.Array:
        passed = sum((jnp.asarray(t) >= m).astype(jnp.int32) for m in milestones)
        return learning_rate * _power(gamma, passed + jnp.zeros_like(t, jnp.int32))

    return schedule


def exponential(learning_rate: float, gamma: float) -> Schedule:
    """`ExponentialLR`: learning_rate * gamma ** t."""
    _check_positive(gamma=gamma)
    return lambda t: learning_rate * _power(gamma, t)


def cosine(learning_rate: float, t_max: int, eta_min: float = 0.0) -> Schedule:
    """`CosineAnnealingLR`: eta_min + (learning_rate - eta_min) * (1 + cos(pi t / t_max)) / 2.

    As in PyTorch it rises again after `t_max`.
    """
    _check_positive(t_max=t_max)
    return lambda t: eta_min + (learning_rate - eta_min) * _half_cosine(t, t_max)


def linear(
    learning_rate: float,
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    total_iters: int = 5,
) -> Schedule:
    """`LinearLR`: learning_rate times a factor that moves linearly over `total_iters` and stays."""
    _check_positive(start_factor=start_factor, total_iters=total_iters)

    def schedule(t: ArrayLike) -> jax.Array:
        done = jnp.minimum(_float(t) / total_iters, 1.0)
        return learning_rate * (start_factor + (end_factor - start_factor) * done)

    return schedule


def polynomial(learning_rate: float, total_iters: int = 5, power: float = 1.0) -> Schedule:
    """`PolynomialLR`: learning_rate * (1 - min(t, total_iters) / total_iters) ** power."""
    _check_positive(total_iters=total_iters)

    def schedule(t: ArrayLike) -> jax.Array:
        left = jnp.maximum(total_iters - jnp.asarray(t), 0)
        return learning_rate * (_float(left) / total_iters) ** float(power)

    return schedule


def sequential(schedules: Sequence[Schedule], milestones: Sequence[int]) -> Schedule:
    """`SequentialLR`: schedule i runs from milestone i-1 on, its own steps counted from there.

    A warm-up of 5 epochs as in torchvision's recipes:

    >>> warmup, main = linear(0.5, 0.01, total_iters=5), cosine(0.5, t_max=85)
    >>> rate = sequential([warmup, main], milestones=[5])
    >>> [round(float(rate(epoch)), 3) for epoch in (0, 4, 5, 89)]
    [0.005, 0.401, 0.5, 0.0]

    Raises:
        ValueError: there is not one schedule more than milestones, or they do not ascend.
    """
    if len(schedules) != len(milestones) + 1:
        raise ValueError(
            f"got {len(schedules)} schedules and {len(milestones)} milestones; expected one "
            "schedule more than milestones"
        )
    if list(milestones) != sorted(milestones):
        raise ValueError(f"milestones: got {tuple(milestones)}, expected them in ascending order")

    def schedule(t: ArrayLike) -> jax.Array:
        return optax.join_schedules(schedules, milestones)(jnp.asarray(t))

    return schedule


def timm_cosine(
    learning_rate: float,
    t_initial: int,
    lr_min: float = 0.0,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
    warmup_prefix: bool = False,
) -> Schedule:
    """timm's `CosineLRScheduler` with one cycle.

    A linear warm-up from `warmup_lr_init` over `warmup_t`, then the half cosine over `t_initial`
    down to `lr_min`, where it stays. Without `warmup_prefix` the cosine's clock runs from step 0,
    so that the warm-up hides its beginning; with it the cosine begins after the warm-up.
    """
    _check_positive(t_initial=t_initial)

    def schedule(t: ArrayLike) -> jax.Array:
        t = jnp.asarray(t)
        since = jnp.minimum(t - warmup_t if warmup_prefix else t, t_initial)
        main = lr_min + (learning_rate - lr_min) * _half_cosine(since, t_initial)
        slope = (learning_rate - warmup_lr_init) / max(warmup_t, 1)
        return jnp.where(t < warmup_t, warmup_lr_init + slope * _float(t), main)

    return schedule


def per_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """A schedule written in epochs, as one of updates: constant within each epoch."""
    _check_positive(steps_per_epoch=steps_per_epoch)
    return lambda t: schedule(jnp.asarray(t) // steps_per_epoch)


def _float(t: ArrayLike) -> jax.Array:
    return jnp.asarray(t, dtype=float)


def _power(gamma: float, n: ArrayLike) -> jax.Array:
    # The logarithm is taken in double precision: in float32 gamma = 0.99999 itself would be off by
    # 1e-8, and its 100,000th power by 1e-3.
    return jnp.exp(_float(n) * math.log(gamma))


def _half_cosine(t: ArrayLike, t_max: int) -> jax.Array:
    # (1 + cos(pi t / T)) / 2 = sin(pi (T - t) / 2T) ** 2 does not cancel near t = T.
    return jnp.square(jnp.sin(_float(t_max - jnp.asarray(t)) * (math.pi / (2 * t_max))))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number above 0")
