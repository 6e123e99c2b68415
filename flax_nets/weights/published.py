"""The table of published weights, written by `benchmarks/make_weights_table.py`."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_nets import registry
from flax_nets.preprocess import Preprocess

LIBRARIES = ("torchvision", "timm")
FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the library that published some weights says of them.

    Attributes:
      name: "torchvision/resnet50.IMAGENET1K_V2" or "timm/resnet50.a1_in1k".
      model: the library's name of the network.
      default: whether they are the library's first choice for that network.
      preprocess: what turns an image into the network's input.
      test: the same at another size where timm evaluates at one, else None.
      classes: which classes the logits stand for, such as "imagenet-1k"; None where unknown, and
        for weights without a head.
      num_classes: the number of logits; 0 for weights without a head.
      accuracy: in per cent, {"acc@1": 80.858, "acc@5": 95.434}; None where it is not said.
      num_params: numbers in the network; of torchvision's GoogLeNet without its auxiliary heads.
      license: None where it is not said.
      arguments: of the constructor, which these weights take.
      url: of the file, or None.
      hub: the repository on the Hugging Face hub, or None.
      sha256: of the file, or its first digits, or None.
    """

    name: str
    model: str
    default: bool
    preprocess: Preprocess
    classes: str | None
    num_classes: int
    accuracy: Mapping[str, float] | None
    num_params: int
    license: str | None
    arguments: Mapping[str, Any]
    test: Preprocess | None = None
    url: str | None = None
    hub: str | None = None
    sha256: str | None = None

    @property
    def library(self) -> str:
        """ "torchvision" or "timm"."""
        return self.name.partition("/")[0]

    @property
    def tag(self) -> str:
        """What tells them from other weights of the same network: "IMAGENET1K_V2", "a1_in1k"."""
        return self.name.partition(".")[2]

    @property
    def network(self) -> str:
        """Our name of the network; an alias stands for the same one."""
        return canonical(f"{self.library}/{self.model}")


@functools.cache
def table() -> dict[str, Weights]:
    """All published weights of the networks here, by name. An entry can be replaced or added."""
    found: dict[str, Weights] = {}
    for library in LIBRARIES:
        rows = json.loads((FOLDER / f"{library}.json").read_text("utf-8"))
        found |= {name: _entry(name, row) for name, row in rows.items()}
    return found


def _entry(name: str, row: dict[str, Any]) -> Weights:
    pre = row.pop("preprocess")
    del pre["antialias"]  # always so
    test = Preprocess(**pre | row.pop("test")) if "test" in row else None
    return Weights(name=name, preprocess=Preprocess(**pre), test=test, **row)


@functools.cache
def class_names(classes: str) -> tuple[str, ...] | None:
    """The names of "imagenet-1k" in the order of the logits; None for classes without names here.

    >>> import flax_nets
    >>> flax_nets.weights.class_names("imagenet-1k")[281]
    'tabby'
    """
    found = json.loads((FOLDER / "classes.json").read_text("utf-8")).get(classes)
    return None if found is None else tuple(found)


def canonical(name: str) -> str:
    """Our name of the network that a name or alias stands for."""
    name = registry.resolve(name).name
    return registry.ALIASES.get(name, (name,))[0]


def of(name: str) -> list[Weights]:
    """The published weights of a network: first those of the library that the name belongs to."""
    network = canonical(name)
    resolved = registry.resolve(name).name
    timm_first = name.startswith("timm/") or resolved in registry.ALIASES
    found = [w for w in table().values() if w.network == network]
    # Of several of timm's networks that are one here, the one that was asked for comes first.
    found.sort(key=lambda w: resolved not in (w.model, f"{w.library}/{w.model}"))
    return sorted(found, key=lambda w: (w.library == "timm") != timm_first)


def names(name: str, pattern: str = "*") -> list[str]:
    """The names of the published weights of a network, or those that match a glob pattern.

    >>> import flax_nets
    >>> flax_nets.weights.names("vgg11", "torchvision/*")
    ['torchvision/vgg11.IMAGENET1K_V1']
    """
    return [w.name for w in of(name) if fnmatch.fnmatchcase(w.name, pattern)]


def find(name: str, weights: str = "DEFAULT") -> Weights:
    """The published weights of the network `name` under a name of theirs.

    Args:
      name: a network's; with "timm/" or "torchvision/" before it, that library's weights come
        first.
      weights: "DEFAULT", the library's first choice; or a tag, such as "IMAGENET1K_V2" or
        "a1_in1k"; or a whole name, such as "timm/resnet50.a1_in1k".

    Raises ValueError with the nearest names for weights that are not in the table, and for those
    of another network.

    >>> import flax_nets
    >>> flax_nets.weights.find("resnet50").accuracy
    {'acc@1': 80.858, 'acc@5': 95.434}
    """
    if weights in table():
        entry = table()[weights]
        if not same_network(name, entry):
            raise ValueError(f"{weights} are weights of {entry.model}, not of {name}")
        return entry
    known = of(name)
    for entry in known:
        if entry.tag == weights or (weights == "DEFAULT" and entry.default):
            return entry
    if not known:
        raise ValueError(f"weights={weights!r}: no published weights of {name} are known")
    every = [w.tag for w in known] + [w.name for w in known] + ["DEFAULT"]
    near = registry.suggest(weights, every)
    if near == ".":
        near = registry.suggest(weights, table())
    raise ValueError(
        f"{name} has no published weights {weights!r}{near} "
        f"It has DEFAULT and {', '.join(w.name for w in known)}."
    )


def same_network(name: str, entry: Weights) -> bool:
    """Whether weights fit the network `name`, perhaps with other images than it was made for."""
    ours, theirs = (registry.resolve(n) for n in (canonical(name), entry.network))
    return (ours.file, ours.network, _shape(ours)) == (theirs.file, theirs.network, _shape(theirs))


def _shape(spec: registry.Spec) -> dict[str, Any]:
    other = ("image_size", "num_classes", "representation_size", "dropout", "initialise")
    return {k: v for k, v in spec.complete.items() if k not in other}
