"""What a checkpoint holds, without knowing of which network it is."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from convert.formats import contents
from convert.identify import Match, identify

FORMATS = {
    "pth": "PyTorch (zip)",
    "legacy": "PyTorch (before 1.6)",
    "npz": "NumPy (npz)",
    "safetensors": "safetensors",
    "orbax": "Orbax",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor. The range is of its finite numbers, None where there are none, or complex ones.

    `broken` counts what is NaN or infinite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    smallest: float | None
    largest: float | None
    nans: int
    infinite: int

    @property
    def broken(self) -> int:
        return self.nans + self.infinite


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found, printable and, by `to_dict`, for programs."""

    source: str
    format: str
    shards: int
    wrappers: tuple[str, ...]
    prefix: str
    networks: tuple[Match, ...]
    tensors: tuple[Row, ...]
    numbers: int
    size: int  # bytes

    @property
    def dialect(self) -> str | None:
        """Whose names it has, as the likeliest network knows them."""
        return self.networks[0].dialect if self.networks else None

    def to_dict(self) -> dict[str, Any]:
        tensors = {
            row.name: {k: v for k, v in dataclasses.asdict(row).items() if k != "name"}
            for row in self.tensors
        }
        return dataclasses.asdict(self) | {"dialect": self.dialect, "tensors": tensors}

    def __str__(self) -> str:
        head = [f"{self.source}: {FORMATS[self.format]}"]
        head += [f"{self.shards} shards"] if self.shards else []
        head += [f"under {' > '.join(self.wrappers)}"] if self.wrappers else []
        head += [f"without the prefix {self.prefix!r} of all names"] if self.prefix else []
        likely = ", ".join(map(str, self.networks[:4])) or "none of our networks"
        lines = [", ".join(head), f"likely: {likely}"]
        width = max((len(row.name) for row in self.tensors), default=0)
        for row in self.tensors:
            known = row.smallest is not None
            span = f"{row.smallest:.4g} .. {row.largest:.4g}" if known else ""
            broken = f"  {row.nans} NaN, {row.infinite} infinite" if row.broken else ""
            lines.append(f"  {row.name:{width}}  {row.dtype:9} {row.shape!s:20} {span}{broken}")
        total = sum(row.broken for row in self.tensors)
        lines.append(
            f"{len(self.tensors)} tensors, {self.numbers:,} numbers, {self.size / 2**20:.1f} MiB"
            + (f", {total:,} NaN or infinite" if total else "")
        )
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str], ema: bool = False) -> Inspection:
    """Format, wrappers, dialect and likely networks of a checkpoint, and all of its tensors.

    Args:
      path: whatever `convert.read` takes.
      ema: look at the averaged weights.

    Raises as `convert.read` does.
    """
    held = contents(path, ema=ema)
    return Inspection(
        source=os.fspath(path),
        format=held.format,
        shards=held.shards,
        wrappers=held.wrappers,
        prefix=held.prefix,
        networks=tuple(identify(held.tensors)),
        tensors=tuple(_row(name, value) for name, value in held.tensors.items()),
        numbers=sum(value.size for value in held.tensors.values()),
        size=sum(value.nbytes for value in held.tensors.values()),
    )


def _row(name: str, value: np.ndarray) -> Row:
    row = Row(name, value.shape, value.dtype.name, None, None, 0, 0)
    if not value.size or value.dtype.kind == "c":
        return row
    if value.dtype.kind not in "biuf":  # bfloat16 and the like, which NumPy is slow at
        value = value.astype(np.float32)
    if value.dtype.kind == "f" and not np.isfinite([value.min(), value.max()]).all():
        nans, infinite = np.isnan(value).sum(), np.isinf(value).sum()
        row = dataclasses.replace(row, nans=int(nans), infinite=int(infinite))
        value = value[np.isfinite(value)]
        if not value.size:
            return row
    smallest, largest = value.min().item(), value.max().item()
    return dataclasses.replace(row, smallest=smallest, largest=largest)
