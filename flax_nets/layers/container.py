"""Containers, reshapes and the choice of an option by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


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
        for module in self:
            x = module(x)
        return x


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
