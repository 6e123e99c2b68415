"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """The factor of the loss that keeps float16's gradients in range, as `torch.amp.GradScaler`.

    A step whose gradients are not finite changes no parameter and halves it; `interval` good
    steps in a row double it.

    Attributes:
      value: float32 scalar, the factor.
      streak: int32 scalar, the good steps since it last changed.
      interval: Default 2000.
    """

    value: jax.Array
    streak: jax.Array
    interval: int = dataclasses.field(default=2000, metadata={"static": True})

    @classmethod
    def create(cls, value: float = 2.0**16, interval: int = 2000) -> LossScale:
        """The scale before the first step. ValueError where an argument is not positive."""
        if not value > 0 or interval < 1:
            raise ValueError(f"loss scale: got {value} and interval={interval}, expected above 0")
        return cls(jnp.asarray(value, jnp.float32), jnp.zeros((), jnp.int32), interval)

    def after(self, finite: jax.Array) -> LossScale:
        """The scale for the next step, given whether this one's gradients were `finite`."""
        streak = jnp.where(finite, self.streak + 1, 0)
        full = streak == self.interval
        doubled = jnp.where(jnp.isfinite(2 * self.value), 2 * self.value, self.value)
        value = jnp.where(full, doubled, jnp.where(finite, self.value, self.value / 2))
        return LossScale(value, jnp.where(full, 0, streak), self.interval)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree of arrays, so that it can be jitted, donated, sharded and saved as one thing.

    Attributes:
      step: int32 scalar, the number of steps so far.
      params, state: as `flax_nets.functional` gives them.
      opt_state: the optimizer's.
      key: the JAX key of the run; dropout folds `step` into it, so that it never changes.
      ema: None, or running averages of `params` and `state`, as {"params": ..., "state": ...}.
      scale: None, or the scale of the loss.
    """

    step: jax.Array
    params: Tree
    state: Tree
    opt_state: Tree
    key: jax.Array
    ema: Tree = None
    scale: LossScale | None = None

    @classmethod
    def create(
        cls,
        params: Tree,
        state: Tree,
        optimizer: optax.GradientTransformation,
        key: jax.Array | int = 0,
        ema: bool = False,
        scale: LossScale | None = None,
    ) -> TrainState:
        """The state before the first step. It copies: a training step donates its buffers.

        >>> import flax_nets
        >>> from flax_nets import train
        >>> apply, params, state = flax_nets.functional(flax_nets.create_model("lenet5"))
        >>> train.TrainState.create(params, state, train.sgd(0.1)).step
        Array(0, dtype=int32)
        """

        def copy(tree: Tree) -> Tree:
            return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

        return cls(
            step=jnp.zeros((), jnp.int32),
            params=copy(params),
            state=copy(state),
            opt_state=optimizer.init(params),
            key=jax.random.key(key) if isinstance(key, int) else copy(key),
            ema=copy({"params": params, "state": state}) if ema else None,
            scale=copy(scale),
        )

    @property
    def evaluated(self) -> tuple[Tree, Tree]:
        """(params, state) to evaluate and to keep: the averaged ones where there are any."""
        if self.ema is None:
            return self.params, self.state
        return self.ema["params"], self.ema["state"]
