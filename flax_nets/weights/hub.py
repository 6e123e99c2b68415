"""Repositories of the Hugging Face hub, by plain requests."""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from flax_nets.weights import cache
from flax_nets.weights.download import DownloadError, download

WEIGHTS = (  # in the order in which they are looked for
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIGS = ("config.json", "preprocessor_config.json")


def parse(source: str) -> tuple[str, str]:
    """ "hf-hub:org/name@revision" -> (repository, revision); the revision is "main" by default.

    Raises ValueError for anything else.
    """
    repository, _, revision = source.partition(":")[2].partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository) or ".." in source:
        raise ValueError(f"{source!r}: expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION")
    return repository, revision or "main"


def fetch(repository: str, revision: str = "main", configs: Sequence[str] = CONFIGS) -> Path:
    """The path of a repository's weights, or of their index; its configurations lie beside.

    The weights come last, so that where they are, all of it is. Raises DownloadError.
    """
    folder = cache.home() / "hub" / repository / urllib.parse.quote(revision, safe="")
    address = f"{cache.endpoint()}/{repository}"
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    try:
        for name in configs:
            _get(repository, revision, folder / name)
        for name in WEIGHTS:
            get = _get_shards if name.endswith(".index.json") else _get
            if get(repository, revision, folder / name):
                return folder / name
    except DownloadError as error:
        if not error.why:  # what came was wrong
            raise
        hint = f"{WEIGHTS[0]} and config.json can be downloaded by hand, and put into {folder}"
        if error.status in (401, 403):
            hint = "Perhaps it is not public: HF_TOKEN can hold a token that may read it"
        message = f"cannot download {address} at {revision!r}: {error.why}. {hint}"
        raise DownloadError(message, error.why, error.status) from error
    raise DownloadError(
        f"{address} has no weights at {revision!r}: expected one of {', '.join(WEIGHTS)}"
    )


def _get(repository: str, revision: str, target: Path, name: str = "") -> bool:
    """Download a file of a repository; False where there is none of that name."""
    path = "/".join(urllib.parse.quote(p, safe="") for p in (revision, name or target.name))
    url = f"{cache.endpoint()}/{repository}/resolve/{path}"
    try:
        download(url, target, token=os.environ.get("HF_TOKEN"))
    except DownloadError as error:
        if error.status == 404:
            return False
        raise
    return True


def _get_shards(repository: str, revision: str, index: Path) -> bool:
    """Download an index and the files it lists; it gets its name when they are all there."""
    pending = index.with_name(f".{index.name}")
    if not _get(repository, revision, pending, index.name):
        return False
    try:
        shards = set(json.loads(pending.read_text("utf-8"))["weight_map"].values())
        wrong = [s for s in shards if not re.fullmatch(r"\w[\w.-]*", s)]
    except FileNotFoundError:  # another process was as far, and faster
        return True
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        pending.unlink()
        raise DownloadError(f"{repository}: {index.name} is no index of shards") from error
    if wrong:
        pending.unlink()
        raise DownloadError(f"{repository}: {index.name} names {wrong[0]!r} as a file beside it")
    for shard in sorted(shards):
        if not _get(repository, revision, index.with_name(shard)):
            raise DownloadError(f"{repository}: {index.name} lists {shard}, which is not there")
    pending.replace(index)
    return True
