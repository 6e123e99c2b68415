"""The conversion rules: by layer type, never by network.

A module's path in Flax is its path in PyTorch, so a parameter's PyTorch name is that path and
the last name that `RULES` gives for the layer's class. A bare parameter (a class token) keeps its
name and its layout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from flax_nets import layers
from flax_nets.models.attention import Embedding, MultiHeadAttention


@dataclasses.dataclass(frozen=True)
class Layout:
    """A permutation of axes from PyTorch's order to ours, and its inverse."""

    axes: tuple[int, ...] | None = None

    @functools.cached_property
    def inverse(self) -> tuple[int, ...]:
        axes = self.axes or ()
        return tuple(axes.index(i) for i in range(len(axes)))

    def to_flax(self, value: np.ndarray) -> np.ndarray:
        return value if self.axes is None else value.transpose(self.axes)

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        return value if self.axes is None else value.transpose(self.inverse)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.axes is None else tuple(shape[i] for i in self.inverse)


SAME = Layout()
OIHW_TO_HWIO = Layout((2, 3, 1, 0))
OI_TO_IO = Layout((1, 0))


@dataclasses.dataclass(frozen=True)
class Rule:
    """The name in PyTorch, the name in Flax, and the layout between them."""

    torch: str
    flax: str
    layout: Layout = SAME


WEIGHT_IS_SCALE, BIAS = Rule("weight", "scale"), Rule("bias", "bias")

RULES: dict[type, tuple[Rule, ...]] = {
    layers.Conv: (Rule("weight", "kernel", OIHW_TO_HWIO), BIAS),
    layers.Linear: (Rule("weight", "kernel", OI_TO_IO), BIAS),
    layers.LayerNorm: (WEIGHT_IS_SCALE, BIAS),
    layers.BatchNorm: (
        WEIGHT_IS_SCALE,
        BIAS,
        Rule("running_mean", "mean"),
        Rule("running_var", "var"),
        Rule("num_batches_tracked", "count"),
    ),
    Embedding: (Rule("weight", "embedding"),),
    MultiHeadAttention: tuple(
        Rule(f"{name}_proj_weight", f"{name}_proj_kernel", OI_TO_IO)
        for name in ("in", "q", "k", "v")
    ),
}

# The same rules by what a tree of arrays shows: the last name and the number of axes.
_AXES = {id(r): len(r.layout.axes or ()) for rules in RULES.values() for r in rules}
BY_LEAF = {(r.flax, _AXES[id(r)]): r for rules in RULES.values() for r in rules}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One number or array of a model: its PyTorch name, its path here, its rule, its variable."""

    key: str
    rule: Rule
    variable: nnx.Variable

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.rule.layout.torch_shape(tuple(self.variable.get_raw_value().shape))


def entries(model: nnx.Module) -> list[Entry]:
    """Every parameter and statistic of `model`, in the order in which it was built."""
    return list(_entries(model, ()))


@functools.cache
def _kind(cls: Any) -> str:
    """What an attribute is, by its class: `isinstance` asks NNX, which takes microseconds."""
    if issubclass(cls, nnx.Param | nnx.BatchStat):
        return "number"
    return "module" if issubclass(cls, nnx.Module) else ""


def _entries(module: Any, path: tuple[str, ...]) -> Iterator[Entry]:
    if isinstance(module, nnx.List):
        children = [(str(i), child) for i, child in enumerate(module)]
    else:
        children = [(k, v) for k, v in vars(module).items() if not k.startswith("_")]
    rules = _rules(module.__class__)
    for name, child in children:  # a module's own numbers come first, as in PyTorch
        if _kind(child.__class__) == "number":
            rule = rules.get(name) or Rule(name, name)
            yield Entry(".".join((*path, rule.torch)), rule, child)
    for name, child in children:
        if _kind(child.__class__) == "module":
            # `nnx.Sequential` keeps its children one level down, PyTorch's does not
            within = isinstance(module, nnx.Sequential) and name == "layers"
            yield from _entries(child, path if within else (*path, name))


@functools.cache
def _rules(cls: Any) -> dict[str, Rule]:
    """A layer's rules by their names in Flax, its base classes' among them."""
    return {rule.flax: rule for base in cls.__mro__ for rule in RULES.get(base, ())}


def leaf_name(path: tuple[str, ...], value: np.ndarray) -> tuple[str, Rule]:
    """The PyTorch name and the rule of one array in a tree shaped like `params`."""
    name = path[-1]
    rule = BY_LEAF.get((name, value.ndim)) or BY_LEAF.get((name, 0)) or Rule(name, name)
    return ".".join((*path[:-1], rule.torch)), rule


def named(tree: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """PyTorch's names and layouts for a tree shaped like a model's `params` or `state`."""
    leaves = ((*leaf_name(path, value), value) for path, value in flatten_tree(tree))
    return {key: in_torch(rule, value) for key, rule, value in leaves}


def in_torch(rule: Rule, value: Any) -> np.ndarray:
    """One array as PyTorch keeps it: its order of axes, contiguous, counters in 64 bits."""
    array = np.asarray(rule.layout.to_torch(np.asarray(value)), order="C")
    return array.astype(np.int64) if rule.flax == "count" else array


def flatten_tree(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple]:
    """(path, array) for each leaf of nested mappings; NNX variables are unwrapped."""
    for name, child in tree.items():
        if isinstance(child, Mapping | nnx.State):
            yield from flatten_tree(child, (*path, str(name)))
        else:
            value = child.get_value() if isinstance(child, nnx.Variable) else child
            yield (*path, str(name)), value
