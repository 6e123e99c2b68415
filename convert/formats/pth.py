"""PyTorch's files, without torch: the zip format, read and written, and the one before 1.6."""

import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np

from .files import Mapped
from .unpickle import STORAGES, Storage, Unpickler

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the old format
_ENDIAN = "big-endian tensors", "little-endian ones: load and save them on such a machine"
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


def _nbytes(file: Mapped, kind: Any, dtype: Any, key: Any, device: Any, count: Any) -> int:
    """The size of a storage that a pickle refers to, once all in the reference is checked."""
    texts = type(key) is str and type(device) is str
    if kind != "storage" or not texts or type(count) is not int or count < 0:
        raise file.error("a damaged reference to tensor data", "an intact file")
    if not isinstance(dtype, np.dtype):
        raise file.error("tensor data of unknown type", "an intact file")
    return count * dtype.itemsize


def load_zip(file: Mapped) -> Any:
    """What ``torch.save`` was given, tensors as read-only views of the file.

    CRCs are not checked: PyTorch does not either, and can be told to write none.
    """
    folder = next(iter(file.members)).partition("/")[0] + "/"
    inside = (item for item in file.members.items() if item[0].startswith(folder))
    names = {name.removeprefix(folder): member for name, member in inside}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise file.error("a TorchScript archive", "a state_dict: torch.jit.load(path).state_dict()")
    if "data.pkl" not in names or any(member.method for member in names.values()):
        raise file.error("an archive packed again", "one in the form that torch.save writes")
    order = names.get("byteorder")
    if order and file.data[order.start : order.start + order.size] != b"little":
        raise file.error(*_ENDIAN)
    storages: dict[str, Storage] = {}

    def storage(reference: Any) -> Storage:
        nbytes = _nbytes(file, *reference)
        _, dtype, key, _, count = reference
        member = names.get(f"data/{key}")
        if member is None or member.size != nbytes:
            found = f"{member.size if member else 'no'} bytes of tensor data {key!r}"
            raise file.error(found, f"{nbytes} bytes, {count} numbers of {dtype}")
        made = storages.setdefault(key, Storage(file, dtype, member.start, nbytes))
        if made.dtype != dtype:
            raise file.error(f"tensor data {key!r} as {made.dtype} and {dtype}", "one type")
        return made

    pickle = names["data.pkl"]
    return Unpickler(file, pickle.start, pickle.start + pickle.size, storage).load()


def load_legacy(file: Mapped) -> Any:
    """What ``torch.save`` was given before version 1.6, tensors as read-only views of the file.

    The file holds pickles of magic number, protocol, system, object and storage keys; then, for
    each key, the count of its numbers (int64) and the numbers. Where these lie is known only after
    the object has been read, so it is read twice.
    """
    storages: dict[str, Storage] = {}

    def storage(reference: Any) -> Storage:
        nbytes = _nbytes(file, *reference[:-1])
        _, dtype, key, _, count, view = reference
        made = storages.setdefault(key, Storage(file, dtype, None, nbytes))
        if made.dtype != dtype or made.nbytes != nbytes:
            raise file.error(f"tensor data {key!r} of two types or sizes", "an intact file")
        if view is not None:  # part of a storage, as versions before 0.4 shared them
            _, offset, length = view
            if not 0 <= offset <= offset + length <= count:
                raise file.error("a storage reaching out of another", "an intact file")
            start = None if made.start is None else made.start + offset * dtype.itemsize
            made = made._replace(start=start, nbytes=length * dtype.itemsize)
        return made

    def pickle(position: int) -> tuple[Any, int]:
        reader = Unpickler(file, position, file.size, storage)
        return reader.load(), reader.position

    position = 0
    for expected in (MAGIC, PROTOCOL):
        number, position = pickle(position)
        if type(number) is not int or number != expected:
            raise file.error(
                "a plain pickle, or one of an unknown version", "what torch.save wrote"
            )
    system, after_system = pickle(position)
    if type(system) is not dict or system.get("little_endian") is False:
        raise file.error(*_ENDIAN)
    _, position = pickle(after_system)
    keys, position = pickle(position)
    texts = type(keys) is list and all(type(key) is str for key in keys)
    if not texts or sorted(keys) != sorted(storages):
        raise file.error("a list of tensor data at odds with the tensors", "an intact file")
    for key in keys:
        made = storages[key]
        end = position + 8 + made.nbytes
        if end > file.size:
            raise file.error(f"{file.size} bytes", f"at least {end}: the file is truncated")
        if struct.unpack_from("<q", file.data, position)[0] * made.dtype.itemsize != made.nbytes:
            raise file.error(
                f"tensor data {key!r} of another length than declared", "an intact file"
            )
        storages[key] = made._replace(start=position + 8)
        position = end
    return pickle(after_system)[0]


def write(stream: IO[bytes], tensors: Mapping[str, np.ndarray]) -> None:
    """A file that ``torch.load(weights_only=True)`` opens, with ``mmap=True`` too."""
    with zipfile.ZipFile(stream, "w") as archive:
        records = [("data.pkl", _pickle(tensors)), ("byteorder", b"little"), ("version", b"3\n")]
        for name, data in records:
            _record(archive, stream, name, data)
        for index, array in enumerate(tensors.values()):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            _record(archive, stream, f"data/{index}", flat.data)


def _record(archive: zipfile.ZipFile, stream: IO[bytes], name: str, data: Any) -> None:
    """A stored entry whose bytes begin at a multiple of 64, by padding in its header."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    unpadded = stream.tell() + 30 + len(entry.filename) + 20 + 4  # 20: 64-bit sizes; 4: our header
    padding = -unpadded % 64
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as member:
        member.write(data)


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The pickle, protocol 2, of an OrderedDict of contiguous tensors, storage i for tensor i."""
    ordered_dict = _global("collections", "OrderedDict") + b")R"
    parts = [b"\x80\x02", ordered_dict, b"("]
    for index, (name, array) in enumerate(tensors.items()):
        typed = _STORAGE_OF.get(
            array.dtype.name
        )  # younger types have no storage class of their own
        kind = _global("torch", typed) if typed else _global("torch.storage", "UntypedStorage")
        count = array.size if typed else array.nbytes
        reference = _tuple([_text("storage"), kind, _text(str(index)), _text("cpu"), _int(count)])
        strides = np.cumprod([1, *array.shape[:0:-1]])[::-1] if array.ndim else ()
        arguments = [
            reference + b"Q",
            _int(0),
            _tuple(map(_int, array.shape)),
            _tuple(map(_int, map(int, strides))),
            b"\x89",  # requires_grad: False
            ordered_dict,  # no hooks
        ]
        arguments += [] if typed else [_global("torch", array.dtype.name)]
        function = _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        parts += [_text(name), function, _tuple(arguments), b"R"]
    return b"".join([*parts, b"u."])


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<cI", b"X", len(raw)) + raw


def _int(number: int) -> bytes:
    if number < 1 << 31:
        return struct.pack("<ci", b"J", number)
    return b"\x8a\x09" + number.to_bytes(9, "little")


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"
