"""What the formats share: the error, the mapped file with its zip directory, the safe write."""

import contextlib
import functools
import mmap
import os
import secrets
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple


class CheckpointError(ValueError):
    """A file is not the checkpoint it should be, or cannot be written as asked.

    Attributes: ``path``, ``found`` (what is there), ``expected`` (what should be, or the way out).
    """

    def __init__(self, path: str | os.PathLike[str], found: str, expected: str):
        super().__init__(path, found, expected)
        self.path, self.found, self.expected = path, found, expected

    def __str__(self) -> str:
        return f"{os.fspath(self.path)}: found {self.found}; expected {self.expected}"


class Member(NamedTuple):
    """Where a zip entry's bytes lie. ``method`` 0 is stored, 8 is deflated."""

    start: int
    packed_size: int
    size: int
    method: int
    crc: int


class Mapped:
    """A file mapped read-only. Views of ``data`` take no memory of their own and keep it mapped.

    As with every memory map, reading a view ends the process when somebody has shortened the file
    in place; ``write`` never does, because it replaces files.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise self.error("no regular file", "a checkpoint file")
        with open(path, "rb") as stream:
            self.size = os.fstat(stream.fileno()).st_size
            if self.size == 0:
                raise self.error("an empty file", "a checkpoint")
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def error(self, found: str, expected: str) -> CheckpointError:
        return CheckpointError(self.path, found, expected)

    @functools.cached_property
    def members(self) -> dict[str, Member]:
        """The entries of a zip archive, each checked against its local header.

        Readers disagree about archives whose two headers disagree, or with two entries of one name
        (PyTorch's ignores case), so both are refused.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
        except Exception as error:  # a damaged directory raises six different types
            found = f"a damaged or truncated zip archive ({error})"
            raise self.error(found, "a complete one") from error
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise self.error("two zip entries of one name", "one of each")
        return {entry.filename: self._member(entry) for entry in entries}

    def _member(self, entry: zipfile.ZipInfo) -> Member:
        start, stored = entry.header_offset + 30, entry.compress_type == zipfile.ZIP_STORED
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        if 30 <= start <= self.size and self.data[start - 30 : start - 26] == b"PK\x03\x04":
            flags, name_size, extra = struct.unpack_from("<6xH18x2H", self.data, start - 30)
            begin = start + name_size + extra
            if (
                self.data[start : start + name_size] == name
                and begin + entry.compress_size <= self.size
                and (entry.compress_size == entry.file_size or not stored)
                and not (flags | entry.flag_bits) & 1  # encrypted
            ):
                return Member(
                    begin, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC
                )
        found = f"a zip entry {entry.filename!r} at odds with its header, or encrypted"
        raise self.error(found, "an intact file")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream beside ``path`` that becomes ``path`` when all went well, and is gone when not.

    A reader sees the old file or the new one, never half of one, also after a power failure.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows has none; elsewhere the rename lies in the directory
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
