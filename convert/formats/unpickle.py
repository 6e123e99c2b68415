"""An interpreter for the pickles that ``torch.save`` writes, which runs nobody else's code.

It knows the opcodes and names that ``torch.load(weights_only=True)`` admits for dense tensors, the
few opcodes more in which pickle protocols 4 and 5 say the same, and some classes of metadata, which
become inert placeholders. Every other name is refused. The standard library's unpickler is not used
as a base: four bytes make its memo allocate 64 GB, and a deeply nested key overflows its C stack.
"""

import reprlib
import struct
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .files import CheckpointError, Mapped

MAX_PICKLE = 1 << 25  # bytes: 100,000 tensors take half; a hostile byte takes 130 in memory

_PLAIN = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64"
_EXTENDED = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
DTYPES = {name: np.dtype(name) for name in f"{_PLAIN} complex64 complex128".split()} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENDED.split()
}
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}  # fmt: skip


class Placeholder:
    """Stands for a class, or for an object of it, that a pickle names and we never make.

    Bytes are among them, as protocol 2 spells them with a call. ``args``, ``state`` and ``items``
    hold what was stored for the object.
    """

    def __init__(self, name: str, args: Any = ()):
        self.name, self.args = name, args
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Storage(NamedTuple):
    """A run of bytes in the file that tensors view. ``start`` None: its place is not known yet."""

    file: Mapped
    dtype: np.dtype
    start: int | None
    nbytes: int

    def tensor(
        self, dtype: Any, offset: Any, shape: Any, strides: Any, flags: Any = None
    ) -> np.ndarray:
        """The view [*shape] whose strides and offset count elements; never outside the storage."""
        if self.start is None:
            return np.empty(0)
        numbers = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        if not numbers or not isinstance(dtype, np.dtype):
            raise self.file.error("a tensor with damaged sizes or type", "an intact file")
        try:
            array: np.ndarray = np.ndarray(
                shape,
                dtype,
                buffer=memoryview(self.file.data)[self.start : self.start + self.nbytes],
                offset=offset * dtype.itemsize,
                strides=tuple(n * dtype.itemsize for n in strides),
            )
        except (ValueError, TypeError, OverflowError) as error:
            found = f"a tensor of shape {reprlib.repr(shape)} and strides {reprlib.repr(strides)}"
            expected = f"one inside its storage of {self.nbytes} bytes"
            raise self.file.error(found, expected) from error
        if array.nbytes > max(16 * self.file.size, 1 << 30):  # a stride of zero can claim terabytes
            raise self.file.error(f"a tensor of {array.nbytes} bytes", "one its file can hold")
        if flags:  # a copy would be needed, and many copies of one storage fill all memory
            raise self.file.error("a lazily conjugated or negated tensor", "resolve_conj() of it")
        return array


# The functions below are all that a pickle can call.


def _rebuild(*args: Any) -> Any:
    storage, offset, shape, strides, *options = args  # requires_grad, hooks, flags
    return storage.tensor(storage.dtype, offset, shape, strides, *options[2:])


def _rebuild_v3(*args: Any) -> Any:
    storage, offset, shape, strides, _, _, dtype, *flags = args
    return storage.tensor(dtype, offset, shape, strides, *flags)


def _parameter(tensor: Any, *_options: Any) -> Any:
    if type(tensor) is not np.ndarray:
        raise TypeError("a parameter that is no tensor")
    return tensor


def _with_attributes(function: Any, _class: Any, args: Any, _state: Any) -> Any:
    if function not in (_rebuild, _rebuild_v3):
        raise TypeError("attributes of something that is no tensor")
    return function(*args)


def _size(sizes: Any) -> Any:
    if type(sizes) is not tuple:
        raise TypeError("a size that is no tuple")
    return sizes


def _ordered_dict(*pairs: Any) -> Any:
    made: OrderedDict[Any, Any] = OrderedDict()
    for listed in pairs:  # none, or the one list with which Python 2 began
        if type(listed) is not list or not all(type(pair) in (list, tuple) for pair in listed):
            raise TypeError("no list of pairs")
        made.update((_key(name), value) for name, value in listed)
        listed[:] = (None,)  # a second use, which only fills the memory, is an error
    return made


_GLOBALS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,  # how PyTorch 0.1 wrote parameters
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
}
_GLOBALS |= {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
for _module in ("torch", "torch.cuda", "torch.storage"):
    _GLOBALS |= {f"{_module}.{name}": DTYPES[dtype] for name, dtype in STORAGES.items()}
_UNSUPPORTED = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (on the meta device)",
}
_PLACEHOLDERS = {
    "__builtin__.set", "_codecs.encode", "argparse.Namespace", "builtins.bytearray",
    "builtins.complex", "builtins.set", "collections.Counter", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.ndarray", "torch.Tensor", "torch.device",
    "torch.serialization._get_layout", "yacs.config.CfgNode",
    # the second module is Python 3.13's
    *(f"{module}.{pure}{system}Path" for module in ("pathlib", "pathlib._local")
      for pure in ("", "Pure") for system in ("Posix", "Windows")),
}  # fmt: skip
_PLACEHOLDER_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.")


def _global(file: Mapped, module: Any, name: Any) -> Any:
    """What a global name stands for: always something of ours, never an import."""
    if type(module) is not str or type(name) is not str:
        raise TypeError("a name that is no text")
    full = f"{module}.{name}"
    if full in _GLOBALS:
        return _GLOBALS[full]
    if full in _PLACEHOLDERS or full.startswith(_PLACEHOLDER_PACKAGES):
        return Placeholder(full)
    if full in _UNSUPPORTED:
        raise file.error(_UNSUPPORTED[full], "dense tensors: convert it with PyTorch first")
    raise file.error(
        f"the class or function {full!r}, which is not loaded because it could run code",
        "a state_dict and nothing else; if you trust the file, load it in PyTorch with "
        "weights_only=False, and torch.save the state_dict that is in it",
    )


def _call(function: Any, args: Any) -> Any:
    if type(args) is tuple and type(function) is FunctionType:  # one of ours: none else get here
        return function(*args)
    if type(args) is tuple and type(function) is Placeholder:
        return Placeholder(function.name, args)
    raise TypeError("a call of something that is no function")


_PLAIN_KEYS = (str, int, float, bool, bytes, type(None), Placeholder)


def _key(key: Any) -> Any:
    """``key``, when it is safe to hash: the hash of deeply nested tuples overflows the C stack."""
    if not all(type(part) in _PLAIN_KEYS for part in (key if type(key) is tuple else (key,))):
        raise TypeError("a key that is no plain value")
    return key


def _fill(target: Any, items: list[Any], pairs: bool) -> None:
    if type(target) is Placeholder:
        target.items.extend(items)
    elif pairs and type(target) in (dict, OrderedDict):
        for name, value in zip(items[::2], items[1::2], strict=True):
            target[_key(name)] = value
    elif not pairs and type(target) is list:
        target.extend(items)
    else:
        raise TypeError("items for something that is no container")


def _build(target: Any, state: Any) -> None:
    if type(target) is Placeholder:
        target.state = state
    elif type(target) is OrderedDict and type(state) is dict:
        if "_metadata" in state:  # versions of the modules, beside their state_dict
            target._metadata = state["_metadata"]  # type: ignore[attr-defined]
    elif type(target) is not np.ndarray or len(state) != 3 or type(state[0]) is not bool:
        # The exception: PyTorch 0.1 stored (requires_grad, volatile, hooks) for a parameter.
        raise TypeError("state for something that has none")


_OPERANDS = {
    opcode: struct.Struct(form)
    for opcodes, form in {
        b"KqhU\x8a\x8cC\x80": "<B", b"M": "<H", b"J": "<i", b"rjXB": "<I", b"\x95": "<Q",
        b"G": ">d",
    }.items()
    for opcode in opcodes
}  # fmt: skip
_LITERALS = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}


class Unpickler:
    """Reads one pickle at ``position``, before ``end``; afterwards ``position`` is where it ended.

    ``persistent_load`` makes a ``Storage`` of what names one. Raises CheckpointError and nothing
    else, whatever the bytes are.
    """

    def __init__(
        self, file: Mapped, position: int, end: int, persistent_load: Callable[[Any], Any]
    ):
        self.file, self.position, self.persistent_load = file, position, persistent_load
        self.end = min(end, position + MAX_PICKLE)

    def load(self) -> Any:
        try:
            return self._run()
        except CheckpointError:
            raise
        except Exception as error:  # hostile bytes raise anything, with texts not fit to be shown
            found = f"a damaged pickle ({type(error).__name__} near byte {self.position})"
            raise self.file.error(found, "what torch.save writes") from error

    def _run(self) -> Any:
        # Operands need no check against the end: reading past it leads out of the loop.
        data, position, end = self.file.data, self.position, self.end
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while position < end:
            self.position = position
            op = data[position]
            position += 1
            if operand := _OPERANDS.get(op):
                (value,) = operand.unpack_from(data, position)
                position += operand.size
            if op in b"qr":  # BINPUT, LONG_BINPUT
                memo[value] = stack[-1]
            elif op in b"hj":  # BINGET, LONG_BINGET
                stack.append(memo[value])
            elif op in b"KMJG":  # BININT1, BININT2, BININT, BINFLOAT
                stack.append(value)
            elif op in _LITERALS:
                stack.append(_LITERALS[op])
            elif op in b"XU\x8cCB\x8a":  # three kinds of text, two of bytes, LONG1
                raw = data[position : min(position + value, end)]
                position += value
                if op in b"XU\x8c":
                    stack.append(str(raw, "utf-8", "strict" if op == ord("U") else "surrogatepass"))
                else:
                    stack.append(int.from_bytes(raw, "little", signed=True) if op == 0x8A else raw)
            elif op in b"(":  # MARK
                marked.append(stack)
                stack = []
            elif op in b"t":  # TUPLE
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            elif op in b"\x85\x86\x87":  # TUPLE1, TUPLE2, TUPLE3
                stack.append(tuple([stack.pop() for _ in range(op - 0x84)][::-1]))
            elif op in b"Q":  # BINPERSID
                stack.append(self.persistent_load(stack.pop()))
            elif op in b"R\x81":  # REDUCE, NEWOBJ
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
            elif op in b"c":  # GLOBAL
                middle = data.find(b"\n", position, position + 512)
                stop = data.find(b"\n", middle + 1, middle + 513)
                if middle < 0 or stop < 0:
                    raise ValueError("a name without end")
                module, name = data[position:stop].decode().split("\n")
                stack.append(_global(self.file, module, name))
                position = stop + 1
            elif op in b"]}":  # EMPTY_LIST, EMPTY_DICT
                stack.append([] if op == ord("]") else {})
            elif op in b"ue":  # SETITEMS, APPENDS
                items, stack = stack, marked.pop()
                _fill(stack[-1], items, op == ord("u"))
            elif op in b"sa":  # SETITEM, APPEND
                items = [stack.pop() for _ in range(2 if op == ord("s") else 1)][::-1]
                _fill(stack[-1], items, op == ord("s"))
            elif op in b"b":  # BUILD
                state = stack.pop()
                _build(stack[-1], state)
            elif op in b"\x94":  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op in b"\x93":  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                stack.append(_global(self.file, module, name))
            elif op in b".":  # STOP
                self.position = position
                return stack.pop()
            elif op not in b"\x80\x95":  # PROTO and FRAME need no action
                found = f"pickle opcode {bytes([op])!r} at byte {position - 1}"
                raise self.file.error(found, "those that torch.save writes for a state_dict")
        raise self.file.error(
            f"a pickle that does not end before byte {end}",
            f"a complete file whose pickle takes at most {MAX_PICKLE >> 20} MiB",
        )
