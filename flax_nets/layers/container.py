"""Containers, reshapes and the choice of an option by name."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

REPEATS = 3  # modules alike in a row, from which on tracing one for all of them takes less time

_each = jax.make_user_context(False)  # part of the key of jax.jit's caches


class Sequential(nnx.Module):
    """Modules (or plain functions) called one after the other.

    Children are attributes named as PyTorch names them: "0", "1", ... for positional ones, or
    the keyword given (an `OrderedDict` there). So a path here is the path there.

    >>> import jax, flax_nets
    >>> block = flax_nets.Sequential(jax.nn.relu, jax.nn.tanh)
    >>> block.names
    ('0', '1')
    """

    def __init__(self, *modules: Callable, **named: Callable):
        children = {str(i): m for i, m in enumerate(modules)} | named
        self.names = tuple(children)
        for name, module in children.items():
            setattr(self, name, module)

    def __iter__(self) -> Iterator[Callable]:
        return (getattr(self, name) for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Callable:
        return getattr(self, self.names[index])

    def __call__(self, x: Any) -> Any:
        return chain(self, x)


def chain(modules: Iterable[Callable], x: Any, *inputs: Any) -> Any:
    """`x` through the modules, one after the other; each takes `inputs` besides.

    While JAX traces, of three and more in a row that are alike but for their numbers (blocks of a
    stage) one is traced for all. The program is the same as without, and is made sooner.
    """
    modules = list(modules)
    if len(modules) < REPEATS or not isinstance(x, jax.core.Tracer) or _each.value:
        for module in modules:
            x = module(x, *inputs)
        return x
    for _, run in itertools.groupby(modules, _kind):
        alike = list(run)
        for module in alike:
            if len(alike) < REPEATS:
                x = module(x, *inputs)
            else:  # split here: those before it may have changed a variable that they share
                x, changed = _traced(*nnx.split(module), x, *inputs)
                nnx.update(module, changed)
    return x


def each() -> AbstractContextManager[Any]:
    """Inside, `chain` calls each module itself: for those who watch the calls."""
    return _each(True)


def watched() -> bool:
    """Whether `each` is in force here."""
    return bool(_each.value)


def _kind(module: Callable) -> Any:
    """What is alike of two modules if one trace serves both."""
    if not isinstance(module, nnx.Module):
        return module
    graph, state = nnx.split(module)
    return graph, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))


@functools.partial(jax.jit, static_argnums=0)
def _traced(graph: Any, state: Any, x: Any, *inputs: Any) -> tuple[Any, Any]:
    """What the module gives, and the variables that it changed."""
    module = nnx.merge(graph, state)
    before = {path: kept.get_value() for path, kept in nnx.to_flat_state(state)}
    y = module(x, *inputs)
    after = nnx.to_flat_state(nnx.state(module))
    changed = [(path, new) for path, new in after if new.get_value() is not before.get(path)]
    return y, nnx.from_flat_state(changed)


class Identity(nnx.Module):
    """Returns its input; keeps a place in a `Sequential`, as `torch.nn.Identity` does."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def flatten(x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, C*H*W]: PyTorch's order, so that a dense kernel is a plain transpose."""
    if x.ndim == 4:
        x = jnp.transpose(x, (0, 3, 1, 2))
    return x.reshape(x.shape[0], -1)


def along_last(vector: jax.Array, ndim: int) -> jax.Array:
    """[C] -> [1, ..., 1, C]: per-channel numbers beside an array of `ndim` axes."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def choose(argument: str, value: str, options: Mapping[str, Any]) -> Any:
    """`options[value]`; ValueError that shows the options where there is no such one."""
    if value not in options:
        raise ValueError(f"{argument} must be one of {', '.join(options)}; got {value!r}")
    return options[value]
