"""Damaged and hostile checkpoints: each is refused clearly, or read exactly as others read it.

    python -m benchmarks.fuzz --count 10000
    python -m benchmarks.fuzz --only zip --seed 7 --keep findings

Small files of each format, as PyTorch, safetensors and NumPy write them, are mutated: cut, flipped,
overwritten, spliced; and, knowing the format, their pickles' opcodes, zip directories, headers and
indexes rewritten with sizes and offsets that are absurd, overlapping or twice there. For each
mutant `convert.read` must either raise CheckpointError, which names the file and a reason, or
return what `torch.load(weights_only=True)`, safetensors or NumPy returns from the same bytes: the
same names, shapes, dtypes and bits. It must do so within seconds and little memory, and run none of
the code that the hostile ones call.

A mutant that ours reads and the others refuse is counted, not condemned: PyTorch refuses gradients
of integers and devices of other machines, which do not touch the numbers.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import pickle
import random
import re
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.torch
import torch

from convert.formats import CheckpointError, read

SECONDS, MEMORY = 10.0, 1 << 32  # for one mutant; bytes of address space beyond what is in use
INTEGERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)


def tensors() -> dict[str, torch.Tensor]:
    """A bit of everything: shared, strided, empty and scalar tensors, and several types."""
    base = torch.arange(6.0).reshape(2, 3)
    return {
        "conv.weight": base,
        "tied": base.T,
        "part": base[1, 1:],
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
    }


def seeds(folder: pathlib.Path) -> dict[str, bytes]:
    """Form -> the bytes of a good file of it."""
    plain = {k: t.detach().contiguous().clone() for k, t in tensors().items()}
    wrapped = {
        "state_dict": collections.OrderedDict(tensors()),
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "hyper_parameters": argparse.Namespace(lr=0.1),
    }
    path = folder / "seed"
    made = {}
    for form, saved, is_zip in (
        ("zip", collections.OrderedDict(tensors()), True),
        ("legacy", collections.OrderedDict(tensors()), False),
        ("wrapped", wrapped, True),
    ):
        torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
        data = path.read_bytes()
        for number, address in enumerate(sorted(set(re.findall(rb"\d{12,}", data)))):
            if not is_zip:  # its names for storages are addresses, which vary from run to run
                data = data.replace(address, b"%0*d" % (len(address), number))
        made[form] = data
    safetensors.torch.save_file(plain, path)
    made["safetensors"] = path.read_bytes()
    arrays = {name: array.copy() for name, array in read(path).items()}
    for form, save in (("npz", np.savez), ("packed npz", np.savez_compressed)):
        with open(path, "wb") as stream:
            save(stream, **arrays)
        made[form] = path.read_bytes()
    path.unlink()
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(plain, "shard.safetensors")}
    made["index"] = json.dumps(index).encode()
    (folder / "shard.safetensors").write_bytes(made["safetensors"])
    return made


# Mutations


def scramble(data: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, overwritten, removed, inserted, copied from elsewhere; or the end cut off."""
    out = bytearray(data)
    if dice.random() < 0.1:
        return data[: dice.randrange(len(data))]
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        at, length = dice.randrange(len(out)), dice.choice((1, 1, 2, 4, 8, 30))
        kind = dice.randrange(6)
        if kind == 0:
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            out[at] = dice.choice((0, 1, 0x2E, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            out[at : at + length] = dice.randbytes(length)
        elif kind == 3 and len(out) > 100:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = dice.randbytes(length)
        else:
            other = dice.randrange(len(out))
            out[at : at + length] = out[other : other + length]
    return bytes(out)


def absurd_integer(data: bytes, dice: random.Random) -> bytes:
    """An integer of 2, 4 or 8 bytes in the middle of things: a size, an offset, a count."""
    width = dice.choice((2, 4, 8))
    at = dice.randrange(max(len(data) - width, 1))
    number = dice.choice((*INTEGERS, len(data), len(data) - 1)) % (1 << 8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def within_pickle(data: bytes, dice: random.Random) -> bytes:
    """One byte of the pickle becomes another that occurs there, or has one bit flipped."""
    start = max(data.find(b"\x80\x02c"), data.find(b"\x80\x02}"), 0)
    end = data.rfind(b"torch._utils", start) + 200
    end = data.find(b".PK", start) if data[:2] == b"PK" else min(end, len(data))
    if end <= start:
        return scramble(data, dice)
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2))):
        at = dice.randrange(start, end)
        out[at] = dice.choice((out[at] ^ 1 << dice.randrange(8), out[dice.randrange(start, end)]))
    return bytes(out)


HOSTILE = [
    b"cposix\nsystem\n(X%s%stR.",
    b"cbuiltins\neval\n(X%s%stR.",
    b"c__builtin__\nexec\n(X%s%stR.",
    b"ctorch.serialization\nload\n(X%s%stR.",
    b"ctorch.hub\nload\n(X%s%stR.",
    b"csubprocess\nPopen\n(X%s%stR.",
    b"\x8c\x05posix\x8c\x06system\x93(X%s%stR.",
    b"(X%s%sios\nsystem\n.",
]


def hostile_pickle(data: bytes, dice: random.Random) -> bytes:
    """A pickle that would make a file, loop, nest, or fill the memory, in either container."""
    canary = b"__import__('os').system('touch hacked')"
    text = struct.pack("<I", len(canary)), canary
    deep = dice.choice((1000, 30_000, 200_000))
    body = dice.choice(
        [
            dice.choice(HOSTILE) % text,
            b"}(X\1\0\0\0a" + (dice.choice(HOSTILE) % text)[:-1] + b"u.",
            b"]" * deep + b"a" * (deep - 1) + b".",
            b"})" + b"\x85" * deep + b"Ns.",
            b"}q\0X\5\0\0\0modelh\0s.",
            b"Nr" + struct.pack("<I", dice.choice(INTEGERS) % 2**32) + b".",
            b")" + b"q\0h\0\x86" * dice.choice((10, 60)) + b"Q.",
            b"X" + struct.pack("<I", dice.choice(INTEGERS) % 2**32) + b"abc.",
            b"c" + b"a" * dice.choice((300, 5000)) + b"\n.",
            b"cargparse\nNamespace\n)R" * dice.choice((1, 1000)) + b".",
            b"ccollections\nOrderedDict\n](" + b"K\1N\x86" * 300 + b"e\x85R.",
        ]
    )
    if data[:2] == b"PK":
        return rezipped(data, lambda name, part: b"\x80\x02" + body if ".pkl" in name else part)
    head = data[: data.index(b"\x80\x02c")] if b"\x80\x02c" in data else b""
    return head + b"\x80\x02" + body + pickle.dumps([], 2)


def rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], **options: Any) -> bytes:
    """The archive written again, each entry changed, or gone where `change` returns None."""
    with tempfile.TemporaryFile() as old, tempfile.TemporaryFile() as new:
        old.write(data)
        with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w", **options) as target:
            for entry in source.infolist():
                part = change(entry.filename, source.read(entry))
                if part is not None:
                    target.writestr(entry.filename, part)
        new.seek(0)
        return new.read()


def odd_archive(data: bytes, dice: random.Random) -> bytes:
    """A zip with entries gone, twice there, grown, shrunk, packed, or enormous when unpacked."""
    if data[:2] != b"PK":
        return absurd_integer(data, dice)
    with tempfile.TemporaryFile() as stream:
        stream.write(data)
        names = zipfile.ZipFile(stream).namelist()
    chosen, other = dice.choice(names), dice.choice(names)
    kind = dice.randrange(7)
    if kind == 0:
        return rezipped(data, lambda name, part: None if name == chosen else part)
    if kind == 1:
        return rezipped(data, lambda name, part: part, compression=zipfile.ZIP_DEFLATED)
    if kind == 2:
        return rezipped(data, lambda name, part: part[:-1] if name == chosen else part)
    if kind == 3:  # a bomb: 64 MiB of zeros in 64 KiB
        bomb = lambda name, part: bytes(1 << 26) if name == chosen else part  # noqa: E731
        return rezipped(data, bomb, compression=zipfile.ZIP_DEFLATED)
    if kind == 4:  # two entries of one name, or of names that differ in case
        for name in (chosen, other):
            at = data.rfind(name.encode())
            data = data[:at] + data[at:].replace(name.encode(), chosen.encode()[: len(name)], 1)
        return data
    record = dice.choice([m.start() for m in re.finditer(b"PK[\1\3][\2\4]", data)])
    width, field = dice.choice(((4, 10), (4, 14), (4, 18), (4, 20), (4, 24), (2, 26), (4, 42)))
    number = dice.choice((*INTEGERS, len(data))) % (1 << 8 * width)
    at = record + field
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def odd_header(data: bytes, dice: random.Random) -> bytes:
    """A safetensors header that lies: offsets, shapes, types, names twice, or without end."""
    if data[8:9] != b"{":
        return scramble(data, dice)
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].decode()
    kind = dice.randrange(6)
    if kind == 0:  # any number becomes another
        numbers = list(re.finditer(r"(?<=[\[,])-?\d+", text))
        at = dice.choice(numbers)
        text = text[: at.start()] + str(dice.choice((*INTEGERS, -1, 12, 16))) + text[at.end() :]
    elif kind == 1:
        old, new = (dice.choice(re.findall(r'"([A-Z]+\d+)"', text)) for _ in range(2))
        text = text.replace(f'"{old}"', f'"{dice.choice((new, "F4", "I8", "C64", "F9"))}"', 1)
    elif kind == 2:
        names = re.findall(r'"([\w.]+)":\{', text)
        old, new = dice.choice(names), dice.choice((*names, "__metadata__", "../a", ""))
        text = text.replace(f'"{old}"', f'"{new}"', 1)
    elif kind == 3:
        deep = dice.choice((100, 100_000))
        text = f'{{"a":{"[" * deep}{"]" * deep},{text[1:]}'
    elif kind == 4:
        text += " " * dice.choice((1, 1000, 1 << 20))
    else:
        size = dice.choice((*INTEGERS, len(data), len(data) - 8)) % 2**64
        return size.to_bytes(8, "little") + data[8:]
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data[end:]


SHARDS = [
    *("../seed", "/etc/passwd", "a/../shard.safetensors", "shard.safetensors\0", "", ".", "absent"),
    *("\\\\host\\x", "C:\\x", "x" * 5000, 3, None, ["shard.safetensors"], {"a": 1}),
]


def odd_index(data: bytes, dice: random.Random) -> bytes:
    """Shards that are elsewhere, absent, of other types; names that no shard has, or some twice."""
    if data[:1] != b"{":
        return absurd_integer(data, dice)
    shard: Any = dice.choice(SHARDS)
    index = json.loads(data)
    name = dice.choice(list(index["weight_map"]))
    kind = dice.randrange(5)
    if kind == 0:
        index["weight_map"][name] = shard
    elif kind == 1:
        del index["weight_map"][name]
    elif kind == 2:
        index["weight_map"][dice.choice(("new", "__metadata__", ""))] = "shard.safetensors"
    elif kind == 3:
        index["weight_map"] = dice.choice(([], None, 3, "a", {"a": {"b": "c"}}))
    else:
        return b'{"weight_map":' * dice.choice((10, 100_000)) + data
    return json.dumps(index).encode()


SPECIAL = {
    "zip": (within_pickle, within_pickle, hostile_pickle, odd_archive, absurd_integer),
    "legacy": (within_pickle, within_pickle, hostile_pickle, absurd_integer),
    "wrapped": (within_pickle, hostile_pickle, odd_archive),
    "safetensors": (odd_header, odd_header, absurd_integer),
    "npz": (odd_archive, absurd_integer),
    "packed npz": (odd_archive, absurd_integer),
    "index": (odd_index,),
}


def mutants(form: str, good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` mutants of one file; the same ones for the same seed."""
    for number in range(count):
        dice = random.Random(f"{form} {seed} {number}")
        yield dice.choice((scramble, *SPECIAL[form]))(good, dice)


# The others


def load_torch(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\3\4"
    with torch.serialization.safe_globals([argparse.Namespace]):  # to us a placeholder
        found = torch.load(path, weights_only=True, mmap=is_zip)
    for key in ("state_dict", "model", "model_state_dict", "net"):
        if isinstance(found, dict) and isinstance(found.get(key), dict) and found[key]:
            found = found[key]
    return {n: t for n, t in found.items() if type(n) is str and isinstance(t, torch.Tensor)}


def load_npz(path: pathlib.Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        loaded = {name: arrays[name] for name in arrays}
    return {
        n: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a for n, a in loaded.items()
    }


def load_index(path: pathlib.Path) -> dict[str, Any]:
    weight_map = json.loads(path.read_text())["weight_map"]
    made: dict[str, Any] = {}
    for shard in dict.fromkeys(weight_map.values()):
        made |= safetensors.torch.load_file(path.parent / shard)
    if made.keys() != weight_map.keys():
        raise ValueError("the index and the shards differ")
    return made


OTHERS = {
    "zip": load_torch,
    "legacy": load_torch,
    "wrapped": load_torch,
    "safetensors": safetensors.torch.load_file,
    "npz": load_npz,
    "packed npz": load_npz,
    "index": load_index,
}


def facts(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Type, shape and bits of an array or a tensor."""
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg()
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype)[6:], tuple(value.shape), flat.numpy().tobytes()
    return value.dtype.name, value.shape, value.tobytes()


# The trial


def trial(path: pathlib.Path, data: bytes, form: str) -> tuple[str, str]:
    """(outcome, detail): "refused", "same", "ours alone", or what must not be: "WRONG"."""
    path.write_bytes(data)
    canary = path.with_name("hacked")
    start = time.process_time()
    try:
        ours: dict[str, Any] | None = read(path)
        reason = ""
    except CheckpointError as error:
        ours, reason = None, str(error)
        if path.name not in reason and "shard" not in reason:
            return "WRONG", f"the error does not name the file: {reason[:200]}"
    except Exception as error:
        return "WRONG", f"{type(error).__name__}: {str(error)[:200]}"
    took = time.process_time() - start
    if canary.exists():
        canary.unlink()
        return "WRONG", "it ran code of the file"
    if took > SECONDS:
        return "WRONG", f"it took {took:.1f} s"
    if ours is None:
        return "refused", re.sub(r"'[^']*'|\d+", "_", reason.partition("; expected")[0])[-80:]
    try:
        theirs = OTHERS[form](path)
    except Exception as error:  # of whatever type the other package likes
        return "ours alone", f"{type(error).__name__}: {str(error)[:80]}"
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs:
            return "WRONG", f"{name!r} is in one of the two only"
        if facts(ours[name]) != facts(theirs[name]):
            return "WRONG", f"{name!r} is {facts(ours[name])}, theirs {facts(theirs[name])}"
    return "same", ""


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """An allocation far beyond what is in use now fails, instead of taking the machine down."""
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    count: int, seed: int, folder: pathlib.Path, only: str = "", keep: pathlib.Path | None = None
) -> dict[str, collections.Counter[str]]:
    """Outcomes by form; what is wrong is printed, and kept in `keep`. `count` is shared out."""
    here = os.getcwd()
    os.chdir(folder)  # where a hostile file would leave its mark
    good = {form: data for form, data in seeds(folder).items() if only in form}
    outcomes: dict[str, collections.Counter[str]] = {}
    path = folder / "mutant"
    try:
        with little_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for form, data in good.items():
                outcomes[form] = collections.Counter([trial(path, data, form)[0]])
                if outcomes[form] != {"same": 1}:
                    raise AssertionError(
                        f"the good {form} file is not read: {trial(path, data, form)}"
                    )
                for number, mutant in enumerate(mutants(form, data, count // len(good), seed)):
                    outcome, detail = trial(path, mutant, form)
                    outcomes[form][outcome] += 1
                    if outcome == "WRONG":
                        print(f"{form} {number} of seed {seed}: {detail}", file=sys.stderr)
                        if keep:
                            keep.mkdir(parents=True, exist_ok=True)
                            (keep / f"{form}-{seed}-{number}".replace(" ", "_")).write_bytes(mutant)
    finally:
        os.chdir(here)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=1000, help="mutants, of all forms together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="forms whose name has this in it")
    parser.add_argument("--keep", type=pathlib.Path, help="a directory for what went wrong")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep = args.keep.absolute() if args.keep else None
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(args.count, args.seed, pathlib.Path(folder), args.only, keep)
    wrong = sum(counter["WRONG"] for counter in outcomes.values())
    if args.json:
        print(json.dumps(outcomes, indent=2))
    else:
        for form, counter in outcomes.items():
            print(f"{form:12} " + ", ".join(f"{n} {what}" for what, n in counter.most_common()))
        print(f"{args.count} mutants in {time.process_time() - start:.0f} s, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
