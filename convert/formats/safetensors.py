"""The safetensors format: its own package checks and writes, the tensors are views of the file."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .files import Mapped
from .unpickle import DTYPES

NAMES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "I8": "int8",
    "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16", "F32": "float32",
    "F64": "float64", "C64": "complex64", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def load(file: Mapped) -> dict[str, np.ndarray]:
    """All tensors of the file, as read-only views of it."""
    try:
        with safe_open(file.path, framework="np"):  # checks the header, and that the sizes add up
            pass
    except SafetensorError as error:
        raise file.error(f"a damaged safetensors file ({error})", "an intact one") from error
    begin = 8 + int.from_bytes(file.data[:8], "little")
    header = json.loads(file.data[8:begin].decode())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in NAMES:
            raise file.error(f"{name!r} of type {entry['dtype']}", f"one of {', '.join(NAMES)}")
        start, shape = begin + entry["data_offsets"][0], entry["shape"]
        try:
            array = np.ndarray(shape, DTYPES[NAMES[entry["dtype"]]], file.data, start)
        except ValueError as error:  # no numbers, and one more axis or a larger one than NumPy has
            found = f"{name!r} of shape {reprlib.repr(shape)}"
            raise file.error(found, "one that NumPy can have") from error
        tensors[name] = array
    return tensors


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A file with the note that transformers asks for. Raises OSError from the disk."""
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
