"""Optimizers as optax transformations, with the formulas, defaults and names of `torch.optim`.

`learning_rate` is a number or a schedule (update count from 0 -> learning rate, see `schedules`).
`weight_decay` acts where `mask` is True: a tree of booleans shaped like the parameters, or a
function from the parameters to one, such as `groups.decay_mask`; None decays every parameter, as
PyTorch does. Arguments out of range raise a ValueError.

Where optax computes what PyTorch computes, these are its parts. Adam's bias correction and SGD's
dampening are ours: optax takes 1 - beta ** t in float32, off by 2e-5 at the first step
(PyTorch: in double precision), and has no dampening.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

ScalarOrSchedule = float | Callable[[Any], Any]
Mask = Any  # a tree of booleans, or a function from the parameters to one


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """`torch.optim.SGD`.

    g += weight_decay * p; buf = momentum * buf + (1 - dampening) * g, at the first step buf = g;
    p -= lr * buf, with Nesterov's momentum p -= lr * (g + momentum * buf).
    """
    _check(learning_rate, momentum=momentum, weight_decay=weight_decay)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov: needs a momentum above 0 and no dampening, got momentum={momentum} and "
            f"dampening={dampening}"
        )
    parts = [_decay(weight_decay, mask)]
    if momentum:
        parts += [
            _damped_trace(momentum, dampening) if dampening else optax.trace(momentum, nesterov)
        ]
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: ScalarOrSchedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """`torch.optim.Adam` (Kingma & Ba 2014, algorithm 1), its weight decay an L2 penalty.

    g += weight_decay * p; m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * g**2;
    p -= lr * m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps).
    """
    _check(learning_rate, betas, eps=eps, weight_decay=weight_decay)
    return optax.chain(
        _decay(weight_decay, mask),
        _scale_by_adam(*betas, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """`torch.optim.AdamW` (Loshchilov & Hutter 2017): Adam, and p -= lr * weight_decay * p."""
    _check(learning_rate, betas, eps=eps, weight_decay=weight_decay)
    return optax.chain(
        _scale_by_adam(*betas, eps),
        _decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def rmsprop(
    learning_rate: ScalarOrSchedule,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """`torch.optim.RMSprop`: epsilon outside of the root, momentum before the learning rate.

    g += weight_decay * p; v = alpha * v + (1 - alpha) * g**2; buf = momentum * buf +
    g / (sqrt(v) + eps); p -= lr * buf. Centered: v less the square of g's running mean.
    """
    _check(learning_rate, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    scale = optax.scale_by_stddev if centered else optax.scale_by_rms
    return optax.chain(
        _decay(weight_decay, mask),
        scale(alpha, eps, eps_in_sqrt=False),
        optax.trace(momentum) if momentum else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def rmsprop_tf(
    learning_rate: ScalarOrSchedule,
    alpha: float = 0.9,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """timm's `RMSpropTF`, TensorFlow's RMSprop, with which the MobileNets were trained.

    As `rmsprop`, but v starts at one, epsilon is inside the root, and the learning rate enters
    before the momentum: buf = momentum * buf + lr * g / sqrt(v + eps); p -= buf.
    """
    _check(learning_rate, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    scale = optax.scale_by_stddev if centered else optax.scale_by_rms
    return optax.chain(
        _decay(weight_decay, mask),
        scale(alpha, eps, initial_scale=1.0, eps_in_sqrt=True),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(momentum) if momentum else optax.identity(),
    )


def lamb(
    learning_rate: ScalarOrSchedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """timm's `Lamb` (You et al. 2019, algorithm 2).

    The gradients divided by max(1, global norm / max_grad_norm); Adam's update; plus
    weight_decay * p; times |p| / |update| of each tensor (1 where either is 0); times -lr.
    Parameters that are not decayed keep Adam's update unscaled.
    """
    _check(learning_rate, betas, eps=eps, weight_decay=weight_decay)
    adapt = optax.scale_by_trust_ratio() if weight_decay else optax.identity()
    return optax.chain(
        optax.identity() if max_grad_norm is None else _clip(max_grad_norm, 0.0),
        _scale_by_adam(*betas, eps),
        _decay(weight_decay, mask),
        adapt if mask is None else optax.masked(adapt, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`torch.nn.utils.clip_grad_norm_`: g *= min(1, max_norm / (global norm + 1e-6))."""
    return _clip(max_norm, 1e-6)


class _TraceState(NamedTuple):
    step: jax.Array
    trace: Any


def _decay(weight_decay: float, mask: Mask | None) -> optax.GradientTransformation:
    """g += weight_decay * p; a rate of 0 adds nothing, not even a multiplication by it."""
    if weight_decay == 0 and mask is None:
        return optax.identity()  # the same state
    return optax.add_decayed_weights(weight_decay, mask)


def _damped_trace(momentum: float, dampening: float) -> optax.GradientTransformation:
    def init(params: Any) -> _TraceState:
        return _TraceState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: _TraceState, params: Any = None) -> tuple[Any, _TraceState]:
        share = jnp.where(state.step == 0, 1.0, 1.0 - dampening)
        trace = jax.tree.map(
            lambda g, t: momentum * t + share.astype(g.dtype) * g, grads, state.trace
        )
        return trace, _TraceState(optax.safe_increment(state.step), trace)

    return optax.GradientTransformation(init, update)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        # Not b1 * m + (1 - b1) * g: rounded to float32 the two shares do not add up to 1.
        mu = jax.tree.map(lambda g, m: m + (1 - b1) * (g - m), grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), grads, state.nu)

        share1, share2 = _one_minus_power(b1, count), _one_minus_power(b2, count)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            root = jnp.sqrt(v) * (share1 / jnp.sqrt(share2)).astype(v.dtype)
            return m / (root + eps * share1.astype(v.dtype))

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(beta: float, count: jax.Array) -> jax.Array:
    """1 - beta ** count without cancellation, in the default float dtype."""
    log = math.log(beta) if beta else -math.inf
    return -jnp.expm1(count.astype(float) * log)


def _clip(max_norm: float, margin: float) -> optax.GradientTransformation:
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}, expected a number above 0")

    def clip(grads: Any, params: Any) -> Any:
        wide = [g.astype(np.promote_types(g.dtype, np.float32)) for g in jax.tree.leaves(grads)]
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in wide))
        factor = jnp.minimum(max_norm / (norm + margin), 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return optax.stateless(clip)


def _check(
    learning_rate: ScalarOrSchedule, betas: tuple[float, float] = (0.0, 0.0), **values: float
) -> None:
    if not callable(learning_rate):
        values["learning_rate"] = learning_rate
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}: got {value}, expected a number of at least 0")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers in [0, 1)")
