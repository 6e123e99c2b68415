"""The `config.json` that a library may put beside its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.formats import CheckpointError

LIMIT = 1 << 24  # bytes; a config that lists 22,000 class names takes two million


def beside(
    source: Mapping[str, Any] | str | os.PathLike[str], model_type: str
) -> tuple[dict[str, Any] | None, str]:
    """The config in the directory of `source`, or in it; else None, and why there is none.

    Args:
      source: a checkpoint's file or directory; a state dict has no config.
      model_type: what the config must say that it is of.

    Raises CheckpointError for a file that is no JSON object.
    """
    if isinstance(source, Mapping):
        return None, "a state dict has no config.json beside it"
    path = Path(source)
    path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.is_file():
        return None, "there is no config.json beside it"
    config = _read(path)
    found = config.get("model_type")
    if found != model_type:
        return None, f"the config.json beside it is not of {model_type!r}, but of {found!r}"
    return config, ""


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except (ValueError, RecursionError) as error:
        found = f"a damaged config ({type(error).__name__}: {error})"
        raise CheckpointError(path, found, "a JSON object") from error
    return config
