"""A model as a pure function and two trees of numbers: the form for `jit`, `grad` and `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Tree = dict[Any, Any]


def functional(model: nnx.Module) -> tuple[Callable[..., tuple[Any, Tree]], Tree, Tree]:
    """Split `model` into (apply, params, state).

    `params` holds what is trained and `state` all other numbers (batch statistics), both plain
    nested dicts whose paths are the module paths; neither holds random state.

    apply(params, state, x, train=False, rngs=None) -> (output, new_state) is pure. `rngs`, an
    `nnx.Rngs` or a JAX key, feeds dropout and stochastic depth.

    Raises ValueError in train mode without `rngs` where the network drops anything.

    >>> import jax, flax_nets
    >>> apply, params, state = flax_nets.functional(flax_nets.create_model("lenet5"))
    >>> x = jax.numpy.zeros((2, 32, 32, 1))
    >>> logits, _ = jax.jit(apply)(params, state, x)
    >>> logits.shape
    (2, 10)
    """
    graph, params, random, state = _split(model)
    copy = nnx.merge(graph, params, random, state)
    set_mode(copy, train=True)
    graphs = {True: nnx.graphdef(copy)}
    set_mode(copy, train=False)
    graphs[False] = nnx.graphdef(copy)
    random = nnx.to_pure_dict(random)

    def apply(
        params: Tree, state: Tree, x: Any, train: bool = False, rngs: Any = None
    ) -> tuple[Any, Tree]:
        if train and rngs is None and jax.tree.leaves(random):
            raise ValueError(
                "this network has dropout or stochastic depth: in train mode pass rngs (an "
                "nnx.Rngs or a JAX key), or create it with dropout=0.0 (or stochastic_depth=0.0)"
            )
        merged = nnx.merge(graphs[train], params, reseeded(random, rngs), state)
        output = merged(x)
        return output, nnx.to_pure_dict(_split(merged)[3])

    return apply, nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def _split(model: nnx.Module) -> Any:
    """(graph, parameters, random state, all other numbers)."""
    return nnx.split(model, nnx.Param, nnx.RngState, ...)


def set_mode(model: nnx.Module, train: bool) -> None:
    """Switch a model, as `model.train()` and `model.eval()` do, also where nothing has a mode."""
    model.set_attributes(
        deterministic=not train, use_running_average=not train, raise_if_not_found=False
    )


def reseeded(random: Tree, rngs: nnx.Rngs | jax.Array | None) -> Tree:
    """The same random streams, each with a key of its own folded from one of `rngs`."""
    if rngs is None:
        return random
    key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
    if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # an old-style key of two numbers
    leaves, structure = jax.tree.flatten(random)
    fresh = [
        jax.random.fold_in(key, i)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jax.numpy.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)
