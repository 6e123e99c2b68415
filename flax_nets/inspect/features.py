"""Intermediate features: what any module of a network returned."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from flax_nets.layers import Sequential
from flax_nets.layers.container import each
from flax_nets.registry import suggest


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Path -> module for every module below `model`, parents before their children.

    A container of modules that is never called itself (`nnx.List`) has no entry.
    """
    found = {}

    def visit(module: Any, path: tuple[str, ...]) -> None:
        for name, child in _children(module):
            if isinstance(child, nnx.Module) and not isinstance(child, nnx.List | nnx.Dict):
                found[".".join((*path, name))] = child
            if isinstance(child, nnx.Module):
                visit(child, (*path, name))

    visit(model, ())
    return found


def _children(module: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(module, nnx.List):
        return [(str(i), child) for i, child in enumerate(module)]
    attributes = vars(module)
    order = (
        module.names
        if isinstance(module, Sequential)
        else [name for name in attributes if not name.startswith("_")]
    )
    return [(name, attributes[name]) for name in order]


def names(model: nnx.Module) -> list[str]:
    """Every name that `features` knows: the paths of all modules.

    >>> import flax_nets
    >>> flax_nets.features.names(flax_nets.create_model("lenet5"))[:3]
    ['conv1', 'pool1', 'conv2']
    """
    return list(modules(model))


def stages(model: nnx.Module) -> list[str]:
    """The top-level children, and each block: the members of the sequences among them.

    Auxiliary heads, which are called in train mode alone, are among them in train mode alone.
    """
    found = modules(model)
    silent = getattr(model, "aux_layers", ()) if getattr(model, "deterministic", False) else ()
    chosen = []
    for name in found:
        parent, _, _ = name.rpartition(".")
        if name in silent:
            continue
        of_list = parent not in found  # the top level, or a member of an nnx.List
        if of_list or (parent in chosen and isinstance(found[parent], Sequential)):
            chosen.append(name)
    return chosen


def features(model: nnx.Module, x: jax.Array, names: Iterable[str]) -> dict[str, Any]:
    """Run `model` on x [N, H, W, C] and return what the named modules returned.

    Args:
      names: module paths (`flax_nets.features.names` lists them) and glob patterns of them.
        "layer4.*" is every module below layer4.

    Returns a dict from name to array (NHWC for feature maps), in the order of the modules' calls.
    A module that was called more than once gives its last output.

    Works inside `jax.jit`. Raises ValueError for a name that no module has, and for one whose
    module was not called (an auxiliary head in eval mode).
    """
    names = [names] if isinstance(names, str) else list(names)
    # A copy, with variables of its own: train mode updates its statistics, not the caller's, and
    # may do so while tracing.
    copy = nnx.merge(nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model)))
    copy.set_attributes(remat=False, raise_if_not_found=False)  # or what is within stays within
    found = modules(copy)
    exact = set()
    wanted = set()
    for name in names:
        matches = [n for n in found if n == name or fnmatch.fnmatchcase(n, name)]
        if not matches:
            raise ValueError(f"the network has no module {name!r}{suggest(name, found)}")
        wanted.update(matches)
        if name in found:
            exact.add(name)
    record: dict[str, Any] = {}
    watch({name: found[name] for name in wanted}, record)
    with each():
        copy(x)
    silent = sorted(exact - set(record))
    if silent:
        raise ValueError(f"{silent} took no part in this call (switch with model.train()?)")
    return record


def watch(modules: Mapping[str, nnx.Module], record: dict[str, Any]) -> None:
    """From now on each call of a module keeps its output in `record`, under the module's name.

    What it computes stands under that name in jaxprs and profiles (`jax.named_scope`).
    """
    for name, module in modules.items():
        object.__setattr__(module, "__class__", _recording(type(module)))
        object.__setattr__(module, "_watched", (name, record))


@functools.cache
def _recording(cls: type) -> type:
    """A subclass whose calls note their output."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name, record = self._watched
        with jax.named_scope(name):
            output = cls.__call__(self, *args, **kwargs)
        record.pop(name, None)  # so that the order is that of the last calls
        record[name] = output
        return output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


features.names = names  # type: ignore[attr-defined]
features.stages = stages  # type: ignore[attr-defined]
