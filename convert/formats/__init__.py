"""Checkpoint files in and out, without torch.

Read: ``.pth`` and ``.pt`` (the zip format and the one before PyTorch 1.6), ``.safetensors``,
``pytorch_model.bin``, ``.npz``, the sharded forms of Hugging Face, and Orbax directories. What a
file is follows from its bytes, not from its name. Reading runs no code from the file, and tensors
are read-only views of the mapped file wherever the format allows.
"""

import dataclasses
import difflib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import npz, orbax, pth, safetensors, shards
from .files import CheckpointError, Mapped, replacing
from .unpickle import DTYPES, Placeholder

__all__ = ["CheckpointError", "Contents", "Placeholder", "contents", "load_pickle", "read", "write"]

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")

_LOADERS = {
    "pth": pth.load_zip,
    "legacy": pth.load_legacy,
    "npz": npz.load,
    "safetensors": safetensors.load,
}
WRITABLE = {  # suffix -> the types that the format can name
    ".safetensors": set(safetensors.NAMES.values()),
    ".npz": {name for name in DTYPES if not name.startswith("float8")},
    ".pth": set(DTYPES),
    ".pt": set(DTYPES),
    ".orbax": set(DTYPES) - {"complex64", "complex128", "float8_e8m0fnu"},
}
_IN_DIRECTORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OTHERS = {  # what people have instead of a checkpoint, by its first bytes
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file itself)",
    b"<": "a web page (the download went wrong)",
    b"\x93NUMPY": "a single array (.npy)",
    b"\x89HDF": "an HDF5 file (of Keras)",
    b"\x1f\x8b": "a gzip file (unpack it first)",
}
_EXPECTED = "a checkpoint: .pth, .safetensors, .npz, or the index or directory of a sharded one"

Paths = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Contents:
    """A state dict, and what was around it in its file.

    Attributes:
      tensors: name -> read-only array, with PyTorch's names and layouts.
      format: "pth", "legacy" (PyTorch before 1.6), "npz", "safetensors" or "orbax".
      shards: the number of files that an index put together; 0 where there is no index.
      wrappers: the keys under which the tensors lie, from the outside in.
      prefix: what was taken off every name.
    """

    tensors: dict[str, np.ndarray]
    format: str
    shards: int = 0
    wrappers: tuple[str, ...] = ()
    prefix: str = ""


def read(path: Paths, *, ema: bool = False) -> dict[str, np.ndarray]:
    """The state dict in a checkpoint, with PyTorch's names and layouts.

    Args:
      path: a file, the ``*.index.json`` of a sharded checkpoint, or the directory of either; or an
        Orbax directory, of names or of a model's ``params`` and ``state``.
      ema: take the averaged weights (``model_ema``, ``state_dict_ema``, ``ema_state_dict``) that a
        training checkpoint holds beside the others. Default False.

    Returns: name -> read-only array. Wrappers such as ``{"state_dict": ...}`` are opened; names
    lose ``module.``, ``_orig_mod.``, ``model.``, ``net.`` and ``backbone.`` where all of them begin
    so; entries that are no tensors are left out with a warning. The arrays view the file: as long
    as they are in use, replace it (as ``write`` does) rather than overwrite it.

    Raises: FileNotFoundError naming the nearest file; CheckpointError for all that cannot be read.

    >>> import numpy as np, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "tiny.pth")
    >>> write(path, {"fc.bias": np.zeros(3, np.float32)})
    >>> read(path)["fc.bias"].shape
    (3,)
    """
    return contents(path, ema=ema).tensors


def contents(path: Paths, *, ema: bool = False) -> Contents:
    """What ``read`` returns, and what it went through to get there. Raises as ``read`` does."""
    path = _locate(Path(path))
    if path.is_dir():
        if ema:
            raise CheckpointError(path, "an Orbax directory", "a training checkpoint, for ema=True")
        found = Contents(orbax.load(path), "orbax")
    else:
        file = Mapped(path)
        is_index = file.data[:1] == b"{" and not _is_safetensors(file)
        found = (_read_shards if is_index else _state_dict)(file, ema)
    names, prefix = found.tensors, ""
    while names:
        more = next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in names)), None)
        if more is None:
            break
        prefix += more
    tensors = {name.removeprefix(prefix): array for name, array in names.items()}
    return dataclasses.replace(found, tensors=tensors, prefix=prefix)


def load_pickle(path: Paths) -> Any:
    """The whole object in a ``.pth`` file: dicts, lists and numbers, tensors as read-only arrays.

    Classes of metadata appear as ``Placeholder``. Raises as ``read`` does.
    """
    file = Mapped(_locate(Path(path)))
    kind = _kind(file)
    if kind not in ("pth", "legacy"):
        raise file.error(f"the format {kind}", "a file that torch.save wrote")
    return _LOADERS[kind](file)


def write(
    path: Paths, state_dict: Mapping[str, Any], *, shard_size: int | str | None = None
) -> None:
    """Write name -> array (NumPy's or JAX's) as ``.safetensors``, ``.npz``, ``.pth`` or ``.pt``.

    Args:
      path: its suffix names the format. ``.orbax`` makes an Orbax directory of the names
        (``convert.to_orbax`` makes one of a model's trees).
      shard_size: for ``.safetensors``, the largest size of a file, in bytes or as "500MB" or
        "2GiB". Where one is not enough, there are ``model-00001-of-00003.safetensors`` and so on,
        and ``model.safetensors.index.json``, as Hugging Face has them. Default: one file.

    What is written appears under its name only when it is complete and on the disk; whatever fails
    leaves what was there before. A ``.pth`` opens with ``torch.load(path, weights_only=True)``.

    Raises: ValueError for another suffix or a size that is none; CheckpointError for a type or name
    that the format cannot hold; OSError from the disk.
    """
    path = Path(path)
    if path.suffix not in WRITABLE:
        raise ValueError(f"{path}: suffix {path.suffix!r}; expected one of {', '.join(WRITABLE)}")
    if shard_size is not None and path.suffix != ".safetensors":
        raise ValueError(f"{path}: shard_size is for .safetensors, not {path.suffix}")
    tensors = {}
    for name, value in state_dict.items():
        array = np.asarray(value)
        if array.dtype.name not in WRITABLE[path.suffix]:
            types = ", ".join(sorted(WRITABLE[path.suffix]))
            raise CheckpointError(path, f"{name!r} of type {array.dtype}", f"one of {types}")
        if type(name) is not str or "\0" in name or name == "__metadata__":
            raise CheckpointError(path, f"the name {name!r}", "text without null characters")
        tensors[name] = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if shard_size is not None:
        shards.write(path, tensors, shards.parse_size(shard_size))
    elif path.suffix == ".orbax":
        orbax.write(path, tensors)
    else:
        with replacing(path) as stream:
            if path.suffix == ".safetensors":
                safetensors.write(Path(stream.name), tensors)
            else:
                (npz if path.suffix == ".npz" else pth).write(stream, tensors)


def _locate(path: Path) -> Path:
    """The file to read for ``path``, which may be a directory."""
    if path.is_dir():
        if orbax.within(path):
            return path
        for name in _IN_DIRECTORY:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(path, "a directory without them", " or ".join(_IN_DIRECTORY))
    if path.exists():
        return path
    index = path.with_name(f"{path.name}.index.json")
    if index.is_file():
        return index
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}")
    others = sorted(other.name for other in path.parent.iterdir())
    nearest = difflib.get_close_matches(path.name, others, 1, 0.0)
    hint = f"the nearest name there is {nearest[0]!r}" if nearest else "its directory is empty"
    raise FileNotFoundError(f"{path}: no such file; {hint}")


def _is_safetensors(file: Mapped) -> bool:
    """Whether the file begins with the length of its header, and that with a brace.

    The length may begin with any byte, so this is asked first. Texts and pickles are told apart by
    the gigantic length that their first eight bytes would be.
    """
    return file.data[8:9] == b"{" and int.from_bytes(file.data[:8], "little") < file.size


def _kind(file: Mapped) -> str:
    """The format, a key of ``_LOADERS``, from the content."""
    head = file.data[:32]
    if _is_safetensors(file):
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if any(name.endswith(("/data.pkl", "/constants.pkl")) for name in file.members):
            return "pth"
        if all(name.endswith(".npy") for name in file.members):
            return "npz"
        raise file.error("a zip archive without data.pkl or arrays", _EXPECTED)
    if head[:1] == b"\x80":
        return "legacy"
    for start, found in _OTHERS.items():
        if head.startswith(start):
            raise file.error(found, _EXPECTED)
    if file.data[257:262] == b"ustar":
        raise file.error("a tar file (of PyTorch before 0.1.10)", _EXPECTED)
    if head[8:10] == b'{"':
        raise file.error("a truncated safetensors file", "a complete one")
    raise file.error(f"a file that begins with {head[:16]!r}", _EXPECTED)


def _read_shards(file: Mapped, ema: bool) -> Contents:
    """The tensors of all shards that an index lists; each shard must hold what the index says."""
    listed: dict[str, set[str]] = {}
    try:
        if file.size > 1 << 27:
            raise ValueError("128 MiB of text")
        for name, shard in json.loads(file.data[:].decode())["weight_map"].items():
            if Path(shard).name != shard or len(shard.encode()) > 255:
                raise ValueError(f"shard {shard[:99]!r} is no plain file name")
            listed.setdefault(shard, set()).add(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        found = f"a damaged index ({type(error).__name__}: {error})"
        raise file.error(found, 'JSON with a "weight_map"') from error
    for shard in listed:
        if not (file.path.parent / shard).is_file():
            raise file.error(f"no shard {shard!r} beside it", f"all of {', '.join(sorted(listed))}")
    whole = Contents({}, "safetensors", len(listed))
    for shard, names in listed.items():
        part = _state_dict(Mapped(file.path.parent / shard), ema)
        if differing := sorted(part.tensors.keys() ^ names):
            found = f"a shard {shard!r} that differs from its index in {differing[:3]}"
            raise file.error(found, "the tensors that the index lists")
        whole = dataclasses.replace(part, tensors=whole.tensors | part.tensors, shards=len(listed))
    return whole


def _state_dict(file: Mapped, ema: bool) -> Contents:
    """The mapping of tensors inside what a file holds."""
    kind = _kind(file)
    found = _LOADERS[kind](file)
    wrappers: list[str] = []
    if ema:
        averaged = [key for key in EMA_WRAPPERS if isinstance(found, dict) and key in found]
        if not averaged:
            expected = f"averaged weights under one of {', '.join(EMA_WRAPPERS)}"
            raise file.error(_outline(found), expected)
        wrappers.append(averaged[0])
        found = found[averaged[0]]
    for _ in WRAPPERS:  # wrappers in wrappers, a few; in a hostile file they have no end
        inside = found if isinstance(found, dict) else {}
        key = next((k for k in WRAPPERS if isinstance(inside.get(k), dict) and inside[k]), None)
        if key is None:
            break
        wrappers.append(key)
        found = inside[key]
    entries = found if isinstance(found, dict) else {"": found}
    tensors = {
        name: value
        for name, value in entries.items()
        if isinstance(name, str) and isinstance(value, np.ndarray)
    }
    if found is not entries or (entries and not tensors):
        expected = f"name -> tensor, at the top or under one of {', '.join(WRAPPERS)}"
        raise file.error(_outline(found), f"{expected} (load_pickle gives the whole)")
    if len(tensors) < len(entries):
        others = _outline({key: entries[key] for key in entries if key not in tensors})
        warnings.warn(f"{file.path}: left out what is no tensor: {others}", stacklevel=4)
    return Contents(tensors, kind, wrappers=tuple(wrappers))


def _outline(value: Any) -> str:
    """A few words on a value, safe to print whatever it is."""
    if not isinstance(value, dict):
        return f"an object of type {type(value).__name__}"
    entries = [f"{str(key)[:40]}: {type(item).__name__}" for key, item in list(value.items())[:8]]
    return f"a dict ({', '.join(entries + ['...'] * (len(value) > 8))})"
