"""Hugging Face's sharded safetensors: some files and an index of what lies in which."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import safetensors
from .files import replacing

_UNITS = {"": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    if prefix or unit == "B"
}


def parse_size(size: int | str) -> int:
    """Bytes: 500_000_000, "500MB" or "2GiB". ValueError for what is no positive size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", str(size).upper())
    if match is None or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise ValueError(f"shard_size={size!r}: expected bytes, or a size such as 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def write(path: Path, tensors: Mapping[str, np.ndarray], size: int) -> None:
    """Shards of at most `size` bytes each, a larger tensor alone in one, and their index.

    The index appears last, so that a reader never sees some old and some new shards. What else was
    there under `path` is taken away: one file, where there is an index now, or the other way round.
    """
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        if parts[-1] and sum(a.nbytes for a in parts[-1].values()) + array.nbytes > size:
            parts.append({})
        parts[-1][name] = array
    index = path.with_name(f"{path.name}.index.json")
    names = [f"{path.stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    whole = len(parts) == 1
    temporary = [path if whole else path.with_name(f".{name}.new") for name in names]
    try:
        for file, part in zip(temporary, parts, strict=True):
            with replacing(file) as stream:
                safetensors.write(Path(stream.name), part)
        old = _listed(index)
        index.unlink(missing_ok=True)
        if not whole:
            for file, name in zip(temporary, names, strict=True):
                file.replace(path.with_name(name))
    finally:
        if not whole:
            for file in temporary:
                file.unlink(missing_ok=True)
    if not whole:
        total = sum(array.nbytes for array in tensors.values())
        weight_map = {name: names[i] for i, part in enumerate(parts) for name in part}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with replacing(index) as stream:
            stream.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        path.unlink(missing_ok=True)
        old -= set(names)
    for name in old:
        path.with_name(name).unlink(missing_ok=True)


def _listed(index: Path) -> set[str]:
    """The shards of an index about to be replaced, those whose names `write` could have made."""
    try:
        found = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    stem = re.escape(index.name.removesuffix(".safetensors.index.json"))
    return {n for n in found if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", str(n))}
