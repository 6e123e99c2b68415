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
class TrainState:
    """A pytree of arrays, so that it can be jitted, donated, sharded and saved as one thing.

    Attributes:
      step: int32 scalar, the number of updates so far.
      params, state: as `flax_nets.functional` gives them.
      opt_state: the optimizer's.
      key: the JAX key of the run; dropout folds `step` into it, so that it never changes.
      ema: None, or running averages of `params` and `state`, as {"params": ..., "state": ...}.
    """

    step: jax.Array
    params: Tree
    state: Tree
    opt_state: Tree
    key: jax.Array
    ema: Tree = None

    @classmethod
    def create(
        cls,
        params: Tree,
        state: Tree,
        optimizer: optax.GradientTransformation,
        key: jax.Array | int = 0,
        ema: bool = False,
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
        )

    @property
    def evaluated(self) -> tuple[Tree, Tree]:
        """(params, state) to evaluate and to keep: the averaged ones where there are any."""
        if self.ema is None:
            return self.params, self.state
        return self.ema["params"], self.ema["state"]
