"""Dialects: the names that other libraries give to the same parameters.

A dialect is a list of renamings and of tensor rules that work in both directions, and the
constructor arguments that a checkpoint of that library implies but its keys do not show. The
native names need none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from flax_nets import registry

Tensors = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]

# Library -> the files whose native names are that library's already.
NATIVE = {
    "torchvision": (
        "alexnet",
        "densenet",
        "googlenet",
        "inception_v3",
        "mobilenet_v2",
        "mobilenet_v3",
        "resnet",
        "resnext",
        "shufflenet",
        "squeezenet",
        "vgg",
        "vit",
    ),
    "timm": (
        "densenet",
        "inception_v3",
        "inception_v4",
        "mobilenet_v1",
        "resnet",
        "resnext",
        "senet",
        "xception",
    ),
}


class TensorRule(Protocol):
    """What differs in more than its name, in both directions; it speaks of native names."""

    def to_native(self, tensors: Tensors) -> Tensors: ...

    def from_native(self, tensors: Tensors) -> Tensors: ...


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
class Unfold:
    """The inverse of `Fold`: our last axes are one there, as where our 1x1 is a dense layer.

    Sizes that do not fit are left as they are, to be reported as mis-shaped.
    """

    native: str
    tail: tuple[int, ...]

    def to_native(self, tensors: Tensors) -> Tensors:
        size = math.prod(self.tail)
        fits = {k for k, v in tensors.items() if v.ndim and v.size and v.shape[-1] % size == 0}
        unfolded = Fold(self.native, self.tail).from_native({k: tensors[k] for k in fits})
        return {k: unfolded.get(k, v) for k, v in tensors.items()}

    def from_native(self, tensors: Tensors) -> Tensors:
        return Fold(self.native, self.tail).to_native(tensors)


@dataclasses.dataclass(frozen=True)
class Fuse:
    """One tensor here is `parts` equal ones there, on its first axis: q, k and v.

    `native` is a template of its name; the renamings give the parts that name and "[0]", "[1]",
    and so on. Parts that do not fit together are left as they are, to be reported.

    The last part may be longer or shorter than the others where `last` is given: the name of a
    tensor of ours whose last axis is as long.
    """

    native: str
    parts: int
    last: str | None = None

    def to_native(self, tensors: Tensors) -> Tensors:
        fused = dict(tensors)
        for key in tensors:
            whole = key.removesuffix("[0]")
            names = [f"{whole}[{i}]" for i in range(self.parts)]
            if whole != key and _pattern(self.native).match(whole) and self._fit(tensors, names):
                fused[whole] = np.concatenate([fused.pop(n) for n in names])
        return fused

    def _fit(self, tensors: Tensors, names: list[str]) -> bool:
        shapes = [tensors[n].shape if n in tensors else None for n in names]
        if self.last is not None and shapes[-1] and shapes[0]:
            shapes[-1] = (*shapes[0][:1], *shapes[-1][1:])
        return len(set(shapes)) == 1

    def from_native(self, tensors: Tensors) -> Tensors:
        parted: Tensors = {}
        for key, value in tensors.items():
            if _pattern(self.native).match(key):
                pieces = np.split(value, self._cuts(tensors, len(value)))
                parted |= {f"{key}[{i}]": piece for i, piece in enumerate(pieces)}
            else:
                parted[key] = value
        return parted

    def _cuts(self, tensors: Tensors, length: int) -> list[int]:
        """Where the parts of a tensor begin, all but the first."""
        known = tensors.get(self.last or "")
        last = length // self.parts if known is None else known.shape[-1]
        return [(length - last) // (self.parts - 1) * i for i in range(1, self.parts)]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Names of one library for one of our files.

    Args:
      name: of the library.
      file: the file in `flax_nets.models` that it speaks of; "" for a module of the caller's own.
      renames: pairs (native, foreign) of templates, the first that matches counts. "{n}" stands
        for a number and "{rest}" for anything; both keep their value on the other side. A key
        that no template matches keeps its name.
      tensors: rules for what differs in more than its name; they speak of native names.
      arguments: constructor arguments in which that library's networks differ from ours.
      prefix: what all names begin with there. Reading a file may have taken it off ("model.").
      model_type: what the `config.json` beside that library's files calls the network, if any.
      configure: more constructor arguments, from that config (None where there is none) and from
        the shapes of the tensors under native names. ValueError for what ours cannot be.
      resize: how positions are resized there, a key of `convert.positions.METHODS`.
    """

    name: str
    file: str
    renames: tuple[tuple[str, str], ...] = ()
    tensors: tuple[TensorRule, ...] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    model_type: str = ""
    configure: Callable[[Mapping[str, Any] | None, Shapes], Mapping[str, Any]] | None = None
    resize: str = "torchvision"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_in", [(_pattern(f), _target(n)) for n, f in self.renames])
        object.__setattr__(self, "_out", [(_pattern(n), _target(f)) for n, f in self.renames])

    def to_native(self, key: str) -> str:
        return _rename(key.removeprefix(self.prefix), self._in)  # type: ignore[attr-defined]

    def from_native(self, key: str) -> str:
        return self.prefix + _rename(key, self._out)  # type: ignore[attr-defined]

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


def _libraries() -> tuple[Any, ...]:
    """One module each, with `DIALECTS` and, by file, `MADE`: functions of a network's arguments."""
    from convert.dialects import huggingface, megvii, prlz77, timm, torchvision, vit_pytorch, windxy

    return (timm, torchvision, megvii, prlz77, windxy, huggingface, vit_pytorch)


def _made(library: Any, file: str, arguments: Mapping[str, Any]) -> tuple[Dialect, ...]:
    """The dialects, one or several, that depend on the constructor's arguments."""
    if file not in library.MADE:
        return ()
    made = library.MADE[file](arguments)
    return made if isinstance(made, tuple) else (made,)


def fixed() -> tuple[Dialect, ...]:
    """The dialects whose names depend on no argument."""
    return tuple(dialect for library in _libraries() for dialect in library.DIALECTS)


@functools.cache
def all_dialects() -> tuple[Dialect, ...]:
    """The dialects of every library; ours, the native one, is not among them."""
    made = [
        dialect
        for library in _libraries()
        for file in library.MADE
        for name in registry.module(file).VARIANTS
        for dialect in _made(library, file, registry.resolve(name).complete)
    ]
    return tuple({(d.name, d.file, d.renames): d for d in (*fixed(), *made)}.values())


def of(spec: registry.Spec | None) -> list[Dialect]:
    """The dialects of a network's names, the native one first; None: of modules, whose are ""."""
    if spec is None:
        return [Dialect("native", ""), *(d for d in fixed() if d.file == "")]
    foreign: list[Dialect] = []
    for library in _libraries():
        foreign += [d for d in library.DIALECTS if d.file == spec.file]
        foreign += _made(library, spec.file, spec.complete)
    arguments = {}
    if spec.name in registry.ALIASES:  # native names under the other library's name
        ours = registry.resolve(registry.ALIASES[spec.name][0]).complete
        arguments = {name: ours[name] for d in foreign for name in d.arguments}
    return [Dialect("native", spec.file, arguments=arguments), *foreign]


def by_name(name: str, spec: registry.Spec | None) -> Dialect:
    """ValueError that lists the dialects there are, where `name` is none of them."""
    native, *foreign = of(spec)
    known = {native.name: native}
    known |= {k: native for k, files in NATIVE.items() if spec is None or spec.file in files}
    known |= {d.name: d for d in foreign}
    if name not in known:
        network = "a model not made by create_model" if spec is None else spec.name
        raise ValueError(f"{network} has no dialect {name!r}; it has {', '.join(known)}")
    return known[name]


def recognise(
    keys: Collection[str],
    native: Collection[str],
    spec: registry.Spec | None,
    implied: Callable[[Dialect], Collection[str]] | None = None,
) -> Dialect:
    """The dialect in which most of `keys` are names of ours; the native one at a tie.

    It is the native one, too, where another knows not a tenth of them: networks that have nothing
    to do with each other share a "classifier.1.weight".

    `implied` gives the names of the network that a dialect's arguments imply. It is asked only
    where the names of the network as it is, `native`, do not account for every key.
    """

    def known(dialect: Dialect, names: Collection[str]) -> int:
        return sum(dialect.to_native(k) in names for k in keys)

    native = set(native)
    if native.issuperset(keys) and (spec is None or spec.name not in registry.ALIASES):
        return Dialect("native", "" if spec is None else spec.file)  # as a rule, and soon told
    candidates = of(spec)
    counts = {d.name: known(d, native) for d in candidates}
    if implied is not None and max(counts.values()) < len(keys):
        counts = {d.name: known(d, set(implied(d))) for d in candidates}
    best = max(candidates, key=lambda d: counts[d.name])
    return best if 10 * counts[best.name] >= len(keys) else candidates[0]
