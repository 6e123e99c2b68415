"""Dialects: the names that other libraries give to the same parameters.

A dialect is a list of renamings and of tensor rules that work in both directions, and the
constructor arguments that a checkpoint of that library implies but its keys do not show. The
native names need none.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flax_nets import registry

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fold:
    """One axis here is several there: a dense kernel [o, i * 49] is a convolution's [o, i, 7, 7].

    Args:
      native: template of the native names, as in `Dialect`.
      tail: the sizes of their last axes there, which our last axis holds beside its own.

    A tensor of other sizes is left as it is, to be reported as mis-shaped.
    """

    native: str
    tail: tuple[int, ...]

    def to_native(self, tensors: Tensors) -> Tensors:
        axes = len(self.tail)

        def fold(value: np.ndarray) -> np.ndarray:
            if value.ndim <= axes or value.shape[-axes:] != self.tail:
                return value
            return value.reshape(*value.shape[: -axes - 1], -1)

        return {k: fold(v) if _pattern(self.native).match(k) else v for k, v in tensors.items()}

    def from_native(self, tensors: Tensors) -> Tensors:
        def unfold(value: np.ndarray) -> np.ndarray:
            return value.reshape(*value.shape[:-1], -1, *self.tail)

        return {k: unfold(v) if _pattern(self.native).match(k) else v for k, v in tensors.items()}


@dataclasses.dataclass(frozen=True)
class Fuse:
    """One tensor here is `parts` equal ones there, on its first axis: q, k and v.

    `native` is a template of its name; the renamings give the parts that name and "[0]", "[1]",
    and so on. Parts that do not fit together are left as they are, to be reported.
    """

    native: str
    parts: int

    def to_native(self, tensors: Tensors) -> Tensors:
        fused = dict(tensors)
        for key in tensors:
            whole = key.removesuffix("[0]")
            names = [f"{whole}[{i}]" for i in range(self.parts)]
            shapes = {tensors[n].shape if n in tensors else None for n in names}
            if whole != key and _pattern(self.native).match(whole) and len(shapes) == 1:
                fused[whole] = np.concatenate([fused.pop(n) for n in names])
        return fused

    def from_native(self, tensors: Tensors) -> Tensors:
        parted: Tensors = {}
        for key, value in tensors.items():
            if _pattern(self.native).match(key):
                pieces = np.split(value, self.parts)
                parted |= {f"{key}[{i}]": piece for i, piece in enumerate(pieces)}
            else:
                parted[key] = value
        return parted


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Names of one library for one of our files.

    Args:
      name: of the library.
      file: the file in `flax_nets.models` that it speaks of.
      renames: pairs (native, foreign) of templates, the first that matches counts. "{n}" stands
        for a number and "{rest}" for anything; both keep their value on the other side. A key
        that no template matches keeps its name.
      tensors: rules for what differs in more than its name; they speak of native names.
      arguments: constructor arguments in which that library's networks differ from ours.
    """

    name: str
    file: str
    renames: tuple[tuple[str, str], ...] = ()
    tensors: tuple[Fold | Fuse, ...] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_in", [(_pattern(f), _target(n)) for n, f in self.renames])
        object.__setattr__(self, "_out", [(_pattern(n), _target(f)) for n, f in self.renames])

    def to_native(self, key: str) -> str:
        return _rename(key, self._in)  # type: ignore[attr-defined]

    def from_native(self, key: str) -> str:
        return _rename(key, self._out)  # type: ignore[attr-defined]

    def tensors_to_native(self, tensors: Tensors) -> Tensors:
        """Apply the tensor rules to a checkpoint whose names are native already."""
        for rule in self.tensors:
            tensors = rule.to_native(tensors)
        return tensors

    def tensors_from_native(self, tensors: Tensors) -> Tensors:
        """The exact inverse: names are still native, or those of parts."""
        for rule in reversed(self.tensors):
            tensors = rule.from_native(tensors)
        return tensors


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"{(\w+)}", _group, escaped) + r"\Z")


def _group(placeholder: re.Match[str]) -> str:
    name = placeholder[1]
    return f"(?P<{name}>.+)" if name == "rest" else rf"(?P<{name}>\d+)"


def _target(template: str) -> str:
    return re.sub(r"{(\w+)}", r"\\g<\1>", template)


def _rename(key: str, pairs: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, target in pairs:
        match = pattern.match(key)
        if match:
            return match.expand(target)
    return key


@functools.cache
def all_dialects() -> tuple[Dialect, ...]:
    """The dialects of every library, one module each; ours, the native one, is not among them."""
    from convert.dialects import timm, torchvision

    made = [
        timm.MADE[file](registry.resolve(name).complete)
        for file in timm.MADE
        for name in registry.module(file).VARIANTS
    ]
    return (*timm.DIALECTS, *torchvision.DIALECTS, *made)


def of(spec: registry.Spec | None) -> list[Dialect]:
    """The dialects of a network's names, the native one first."""
    from convert.dialects import timm, torchvision

    if spec is None:
        return [Dialect("native", "")]
    fixed = (*timm.DIALECTS, *torchvision.DIALECTS)
    foreign = [d for d in fixed if d.file == spec.file]
    if spec.file in timm.MADE:
        foreign.append(timm.MADE[spec.file](spec.complete))
    arguments = {}
    if spec.name in registry.ALIASES:  # native names under the other library's name
        ours = registry.resolve(registry.ALIASES[spec.name][0]).complete
        arguments = {name: ours[name] for d in foreign for name in d.arguments}
    return [Dialect("native", spec.file, arguments=arguments), *foreign]


def by_name(name: str, spec: registry.Spec | None) -> Dialect:
    """ValueError that lists the dialects there are, where `name` is none of them."""
    known = {d.name: d for d in of(spec)}
    if name not in known:
        network = "a model not made by create_model" if spec is None else spec.name
        raise ValueError(f"{network} has no dialect {name!r}; it has {', '.join(known)}")
    return known[name]


def recognise(keys: Iterable[str], native: Iterable[str], spec: registry.Spec | None) -> Dialect:
    """The dialect in which most of `keys` are names of ours; the native one at a tie."""
    keys, native = list(keys), set(native)
    return max(of(spec), key=lambda d: sum(d.to_native(k) in native for k in keys))
