"""What `create_model` takes as weights: names, addresses, paths."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from flax_nets import registry
from flax_nets.weights import cache
from flax_nets.weights.published import LIBRARIES, Weights, find

HUB = ("hf-hub:", "hf_hub:")  # timm writes both
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".npz", ".ckpt", ".json", ".tar")


def fetch(name: str, weights: str | os.PathLike[str] = "DEFAULT") -> Path:
    """The path of some weights for the network `name`: from the cache, or downloaded into it.

    Args:
      name: a network's.
      weights: a name or tag of published weights (`find`); "hf-hub:ORG/NAME", with "@REVISION" or
        without; an address, whose "#sha256=..." is checked; or a path, which is returned.

    Raises ValueError with the nearest names where it is none of these, and an OSError that tells
    what to do by hand for a file that cannot be downloaded.
    """
    return locate(name, weights)[0]


def locate(name: str, weights: str | os.PathLike[str]) -> tuple[Path, Weights | None]:
    """The same, and what the table says of the weights."""
    if not isinstance(weights, str):
        return Path(weights), None
    if weights.startswith(("https://", "http://")):
        url, _, fragment = weights.partition("#")
        digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        from flax_nets.weights.download import (
            download,
        )  # the web's modules take a third of a second

        return download(url, cache.of_url(url), digest), None
    if weights.startswith(HUB):
        from flax_nets.weights import hub

        return hub.fetch(*hub.parse(weights)), None
    try:
        published = find(name, weights)
    except ValueError:
        if _may_be_path(weights):
            return Path(weights), None
        raise
    return _fetch_published(published), published


def _fetch_published(weights: Weights) -> Path:
    if weights.hub:
        from flax_nets.weights import hub

        return hub.fetch(weights.hub, configs=("config.json",))
    from flax_nets.weights.download import download

    assert weights.url is not None
    target = cache.home() / weights.library / cache.file_name(weights.url)
    return download(weights.url, target, weights.sha256)


def _may_be_path(text: str) -> bool:
    """Whether a text that names no weights should be read, or complained of, as a path."""
    if os.path.exists(text):
        return True
    named = text.startswith(tuple(f"{library}/" for library in LIBRARIES))
    return not named and (text.endswith(SUFFIXES) or os.sep in text)


def resolve(spec: registry.Spec, name: str, weights: Any) -> tuple[registry.Spec, Any]:
    """For `create_model`: the spec with what the weights imply, and a path (or what was given)."""
    if not isinstance(weights, str | os.PathLike):
        return spec, weights  # a state dict
    path, published = locate(name, weights)
    if published is None:
        return dataclasses.replace(spec, weights=os.path.abspath(path)), path
    spec = spec.with_arguments(**published.arguments)
    return dataclasses.replace(spec, weights=published.name), path
