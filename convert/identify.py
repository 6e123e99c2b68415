"""Which network a checkpoint is of: what its tensors are called and how large they are.

`python -m convert.identify` writes `sizes.json` anew, where networks were added or changed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import dialects, port, rules
from convert.formats.files import replacing
from flax_nets import registry
from flax_nets.create import build

SIZES = Path(__file__).with_name("sizes.json")
SHORTLIST = 6  # networks to build and to compare name by name


@dataclasses.dataclass(frozen=True)
class Match:
    """How well a network fits: its name, whose names the tensors have, and the share that fits.

    `percent` counts tensors of the same name and shape among all that either side has, batch
    counters aside, once the number of classes and what else the shapes show is set. `fits` is
    whether a strict load would succeed.
    """

    model: str
    dialect: str
    percent: float
    fits: bool

    def __str__(self) -> str:
        return f"{self.model} ({self.dialect} names, {self.percent:.1f}%)"


def identify(tensors: Mapping[str, Any]) -> list[Match]:
    """The likely networks, best first; other names of the same network are left out.

    Only names and shapes are looked at, whichever network library the names are of.

    >>> import convert, flax_nets
    >>> state_dict = convert.export(flax_nets.create_model("lenet5", num_classes=3))
    >>> [str(match) for match in convert.identify(state_dict)][0]
    'lenet5 (native names, 100.0%)'
    """
    theirs = _sizes({key: tuple(value.shape) for key, value in tensors.items()})

    def likeness(name: str) -> float:
        ours = _table()[name]
        return (ours & theirs).total() / max((ours | theirs).total(), 1)

    likely = sorted(_table(), key=likeness, reverse=True)
    shells = {k: np.broadcast_to(np.False_, tuple(v.shape)) for k, v in tensors.items()}
    shortlist = [name for name in likely[:SHORTLIST] if likeness(name)]
    tried = [_match(name, shells) for name in dict.fromkeys((*shortlist, *_named(tensors)))]
    best: dict[str, Match] = {}  # one function has several names: vit's and deit's, of 224 and 384
    for function, _, match in sorted(tried, key=lambda t: (t[1], len(t[2].model) if t[2] else 0)):
        if match:
            best.setdefault(function, match)
    return sorted(best.values(), key=lambda m: (not m.fits, -m.percent))


def decide(tensors: Mapping[str, Any], source: str = "the state dict") -> str:
    """The one network that the tensors fit. ValueError with the likely ones where it is not one."""
    matches = identify(tensors)
    fitting = [match for match in matches if match.fits]
    if len(fitting) == 1:
        return fitting[0].model
    if fitting:
        names = " and ".join(match.model for match in fitting)
        raise ValueError(f"{source}: names and shapes fit {names}: say which with --model")
    likely = ", ".join(map(str, matches[:3])) or "none has anything in common with it"
    raise ValueError(f"{source} fits no network entirely; likely ones: {likely}; see --model")


def _match(name: str, shells: Mapping[str, np.ndarray]) -> tuple[str, int, Match | None]:
    """(the function it would be, the arguments in which it would differ from `name`, the match)."""
    own = registry.resolve(name)
    try:
        with _silent():
            spec, checkpoint = port.prepare(own, shells, {})
        ours = _uncounted({e.key: e.torch_shape for e in rules.entries(build(spec))})
    except Exception:  # shapes of another network can show arguments that no network has
        return "", 0, None
    theirs = _uncounted({key: value.shape for key, value in checkpoint.tensors.items()})
    same = sum(ours.get(key) == shape for key, shape in theirs.items())
    if not same:
        return "", 0, None
    percent = 100 * same / len(ours | theirs)
    match = Match(name, checkpoint.dialect.name, percent, same == len(ours) == len(theirs))
    computes = {k: v for k, v in spec.complete.items() if "drop" not in k and k != "initialise"}
    changes = sum(value != own.complete[key] for key, value in spec.complete.items())
    return repr((spec.file, spec.network, sorted(computes.items()))), changes, match


def _named(keys: Mapping[str, Any]) -> Iterator[str]:
    """A network of each file for which a dialect that implies arguments renames most keys.

    Such a checkpoint may have other sizes than any network here has by its name alone.
    """
    for dialect in dialects.all_dialects():
        renamed = sum(dialect.to_native(key) != key.removeprefix(dialect.prefix) for key in keys)
        if dialect.file and dialect.arguments and 2 * renamed > len(keys):
            yield next(iter(registry.module(dialect.file).VARIANTS))


def _uncounted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {k: s for k, s in shapes.items() if not k.endswith("num_batches_tracked")}


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> collections.Counter[int]:
    """How many tensors of each size there are: much the same whoever named and folded them."""
    return collections.Counter(math.prod(shape) for shape in _uncounted(shapes).values())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the notes on what a checkpoint implies: it is only being tried."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    port.log.addFilter(drop)
    try:
        yield
    finally:
        port.log.removeFilter(drop)


@functools.cache
def _table() -> dict[str, collections.Counter[int]]:
    """Sizes of all networks: building them all takes many seconds, so they are in a file."""
    known = json.loads(SIZES.read_text()) if SIZES.exists() else {}
    return {
        name: collections.Counter({int(size): count for size, count in known[name].items()})
        if name in known
        else measured(name)  # a network newer than the file: slower, but as good
        for name in names()
    }


def names() -> list[str]:
    """Of all networks, aliases excepted."""
    return [name for name in registry.list_models() if name not in registry.ALIASES]


def measured(name: str) -> collections.Counter[int]:
    """The sizes of one network."""
    entries = rules.entries(build(registry.resolve(name)))
    return _sizes({e.key: e.torch_shape for e in entries})


if __name__ == "__main__":
    rows = (
        f" {json.dumps(name)}: {json.dumps(dict(sorted(measured(name).items())))}"
        for name in names()
    )
    with replacing(SIZES) as stream:
        stream.write(("{\n" + ",\n".join(rows) + "\n}\n").encode())
