"""NumPy's archives: a zip of .npy files. bfloat16 is stored as two raw bytes ("V2")."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO

import numpy as np

from .files import Mapped, Member
from .unpickle import DTYPES

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_GROWTH, _ALWAYS = 16, 1 << 28  # weights pack to nine tenths; bytes that any file may unpack to
_HEADER_SIZE = 1 << 14  # numpy itself refuses headers above 10,000 characters


def load(file: Mapped) -> dict[str, np.ndarray]:
    """All arrays of the archive: views of the file where stored, copies where compressed.

    CRCs are checked, as NumPy does. What little grows enormous is refused before it does.
    """
    unpacked = sum(m.size for m in file.members.values() if m.method == zipfile.ZIP_DEFLATED)
    if unpacked > max(_GROWTH * file.size, _ALWAYS):
        found = f"{file.size:,} bytes that unpack to {unpacked:,}"
        raise file.error(found, f"at most {_GROWTH} times as many (numpy.savez packs nothing)")
    return {name.removesuffix(".npy"): _array(file, name, m) for name, m in file.members.items()}


def _array(file: Mapped, name: str, member: Member) -> np.ndarray:
    data = memoryview(file.data)[member.start : member.start + member.packed_size]
    try:
        if member.method == zipfile.ZIP_DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data = memoryview(inflate.decompress(data, member.size + 1))
        elif member.method != zipfile.ZIP_STORED:
            raise ValueError("neither stored nor deflated")
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise ValueError("its check sum is wrong")
        stream = io.BytesIO(data[:_HEADER_SIZE])
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
        if dtype == np.dtype("V2"):
            dtype = DTYPES["bfloat16"]
        elif dtype.kind not in "biufc" or dtype.byteorder == ">":
            raise ValueError(f"{dtype} is no little-endian number")
        return np.ndarray(shape, dtype, data, stream.tell(), order="F" if fortran else "C")
    except Exception as error:  # zlib has errors of its own, and numpy parses text as Python
        found = f"a damaged or foreign array {name!r} ({error})"
        raise file.error(found, "one that numpy.savez wrote") from error


def write(stream: IO[bytes], tensors: Mapping[str, np.ndarray]) -> None:
    """An archive that ``numpy.load`` opens."""
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in tensors.items():
            if array.dtype == DTYPES["bfloat16"]:
                array = array.view("V2")
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
