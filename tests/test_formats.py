"""Reading and writing checkpoint files, against PyTorch, safetensors and NumPy themselves."""

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import re
import resource
import struct
import sys
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from benchmarks import fuzz
from convert.formats import CheckpointError, Placeholder, load_pickle, npz, read, unpickle, write

SAVE = {
    "zip": torch.save,
    "legacy": lambda obj, path: torch.save(obj, path, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save_file,
}
PICKLED = ["zip", "legacy"]


def load(path):
    """What PyTorch reads, in its strict mode, and memory-mapped where it can."""
    with open(path, "rb") as stream:
        is_zip = stream.read(4) == b"PK\3\4"
    return torch.load(path, weights_only=True, mmap=is_zip)


def facts(value):
    """Type, shape and bits, of an array or a tensor."""
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg()
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype)[6:], tuple(value.shape), flat.numpy().tobytes()
    return value.dtype.name, value.shape, value.tobytes()


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in theirs:
        assert facts(ours[name]) == facts(theirs[name]), name


def random_bits(dtype, *shape):
    size = torch.empty(0, dtype=dtype).element_size()
    top = 2 if dtype is torch.bool else 256
    bits = torch.randint(0, top, (max(int(np.prod(shape)), 1) * size,), dtype=torch.uint8)
    return bits.view(dtype)[: int(np.prod(shape))].reshape(shape)


def every_type():
    """A tensor of two, of one and of no dimensions, and an empty one, of each type."""
    return {
        f"{name}.{len(shape)}.{sum(shape)}": random_bits(getattr(torch, name), *shape)
        for name in unpickle.DTYPES
        for shape in ((2, 3), (5,), (), (0, 4))
    }


@contextlib.contextmanager
def peak_memory():
    """A list that holds, afterwards, the largest number of bytes allocated meanwhile."""
    peak = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


# Reading what others wrote


@pytest.mark.parametrize("form", SAVE)
def test_every_type(tmp_path, form):
    tensors = every_type()
    if form == "safetensors":
        tensors = {name: t for name, t in tensors.items() if t.dtype != torch.complex128}
    SAVE[form](tensors, tmp_path / "a")
    ours = read(tmp_path / "a")
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert not any(array.flags.writeable for array in ours.values())


@pytest.mark.parametrize("form", PICKLED)
def test_views(tmp_path, form):
    base = torch.randn(4, 5, 6)
    tensors = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:3, ::2, 4:],
        "scalar": base[3, 4, 5],
        "expanded": torch.randn(3, 1).expand(3, 1000),
        "empty": base[:, 5:],
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "overlapping": torch.as_strided(base, (3, 3), (1, 1), 7),
    }
    SAVE[form](tensors, tmp_path / "a")
    ours = read(tmp_path / "a")
    assert_same(ours, tensors)
    assert np.shares_memory(ours["base"], ours["transposed"])
    assert ours["transposed"].strides == (4, 120, 24)


@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_module_state(tmp_path, form, protocol):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": form == "zip"}
    torch.save(model.state_dict(), tmp_path / "a", **options)
    assert_same(read(tmp_path / "a"), model.state_dict())
    assert load_pickle(tmp_path / "a")._metadata == model.state_dict()._metadata


@pytest.mark.parametrize("form", PICKLED)
def test_objects(tmp_path, form):
    tagged, parameter = torch.randn(3), torch.nn.Parameter(torch.randn(2, 2))
    tagged.note = "kept by PyTorch, dropped here"
    marked = torch.nn.Parameter(torch.randn(4))
    marked.tag = 3
    saved = {
        "tagged": tagged,
        "parameter": parameter,
        "marked": marked,
        "numbers": [0, -1, 300, 70000, 2**40, -(2**70), 1.5, True, None, "é", (1, (2, 3))],
        ("a", 1): torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "counts": collections.Counter("abca"),
        "args": argparse.Namespace(lr=0.1, rates=[1, 2]),
        "best": np.float64(3.5),
        "history": np.arange(3),
        "path": Path("x"),
        "bytes": b"\xff",
    }
    SAVE[form](saved, tmp_path / "a")
    ours = load_pickle(tmp_path / "a")
    assert list(ours) == list(saved)
    assert ours["numbers"] == saved["numbers"]
    assert ours["a", 1] == (2, 3)
    assert ours["dtype"] == ml_dtypes.bfloat16
    for name, placeholder in {
        "device": "torch.device",
        "counts": "collections.Counter",
        "args": "argparse.Namespace",
        "best": "numpy._core.multiarray.scalar",
        "history": "numpy._core.multiarray._reconstruct",
        "path": f"{type(Path()).__module__}.{type(Path()).__name__}",  # Python 3.13: pathlib._local
        "bytes": "_codecs.encode",
    }.items():
        assert isinstance(ours[name], Placeholder) and ours[name].name == placeholder
    assert ours["args"].state == {"lr": 0.1, "rates": [1, 2]}
    assert ours["device"].args == ("cuda", 1)
    with pytest.warns(UserWarning, match=r"left out what is no tensor: a dict \(numbers: list"):
        assert_same(
            read(tmp_path / "a"), {"tagged": tagged, "parameter": parameter, "marked": marked}
        )


def test_python2_and_first_pytorch(tmp_path):
    """Parameters as PyTorch 0.1 reduced them, and texts as Python 2 wrote them."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, torch.nn.Parameter):
                hooks = collections.OrderedDict()
                return torch.nn.Parameter, (value.data,), (True, False, hooks)
            if isinstance(value, collections.OrderedDict) and value:
                return collections.OrderedDict, (list(map(list, value.items())),)
            return NotImplemented

    old = types.SimpleNamespace(Pickler=Pickler, dump=pickle.dump, __name__="pickle")
    tensors = {"w": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.nn.Parameter(torch.ones(3))}
    tensors = collections.OrderedDict(tensors)
    torch.save(tensors, tmp_path / "a", old, _use_new_zipfile_serialization=False)
    data = re.sub(rb"X(.)\0\0\0", rb"U\1", (tmp_path / "a").read_bytes())
    assert data.count(b"U\x07storage") == 1 and b"Parameter\n" in data
    (tmp_path / "a").write_bytes(data)
    assert_same(read(tmp_path / "a"), tensors)
    assert_same(load(tmp_path / "a"), tensors)


def legacy_file(path, body, keys=(), data=b"", system=None):
    system = {"little_endian": True} if system is None else system
    parts = [0x1950A86A20F9469CFC6C, 1001, system]
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    path.write_bytes(head + body + pickle.dumps(list(keys), 2) + data)
    return path


def zip_file(path, body, **records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": body, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", data)
    return path


def test_storage_inside_storage(tmp_path):
    """As before PyTorch 0.4: the tensor's storage is a part of another one."""
    body = (
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor\n((X\x07\0\0\0storage"
        b"ctorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06X\x01\0\0\x001K\x02K\x03\x87tQ"
        b"K\x01K\x02\x85K\x01\x85tRs."
    )
    data = struct.pack("<q6f", 6, *range(6))
    path = legacy_file(tmp_path / "a", body, ["0"], data)
    assert read(path)["a"].tolist() == [3, 4]
    assert_same(read(path), load(path))
    bad = legacy_file(
        tmp_path / "b", body.replace(b"K\x02K\x03\x87", b"K\x04K\x03\x87"), ["0"], data
    )
    with pytest.raises(CheckpointError, match="reaching out of another"):
        read(bad)


def test_without_crc(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "a")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [123, *range(128, 384, 8)])
def test_safetensors_header_size(tmp_path, size):
    """The first byte is the size of the header and can be that of any other format."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(size)
    (tmp_path / "a").write_bytes(struct.pack("<Q", size) + header + struct.pack("<2f", 3, 4))
    assert read(tmp_path / "a")["a"].tolist() == [3, 4]


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**61], [0] + [1] * 65])
def test_safetensors_shape_beyond_numpy(tmp_path, shape):
    """Of no numbers at all, which safetensors itself finds nothing wrong with."""
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="'a' of shape"):
        read(tmp_path / "a")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = {
        f"{kind}.{array.ndim}": array.astype(kind)
        for kind in ["?", "u1", "i8", "f2", "f4", "f8", "c8", "c16"]
        for array in (np.arange(6).reshape(2, 3), np.array(3), np.empty((0, 2)))
    }
    arrays["fortran"] = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    arrays["bfloat16"] = np.arange(3).astype(ml_dtypes.bfloat16)
    save(tmp_path / "a.npz", **arrays)
    assert_same(read(tmp_path / "a.npz"), arrays)
    np.savez(tmp_path / "none.npz")
    assert read(tmp_path / "none.npz") == {}


@pytest.mark.parametrize("form", [*SAVE, "npz"])
def test_no_memory(tmp_path, form):
    """Tensors are views of the file: reading 8 MB allocates next to nothing."""
    if form == "npz":
        np.savez(tmp_path / "a.npz", a=np.ones((1000, 1000)))
    else:
        SAVE[form]({"a": torch.ones(1000, 1000, dtype=torch.float64)}, tmp_path / "a.npz")
    read(tmp_path / "a.npz")
    with peak_memory() as peak:
        array = read(tmp_path / "a.npz")["a"]
    assert peak[0] < 200_000
    assert array.sum() == 1_000_000


# What is around the tensors


@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_wrappers(tmp_path, form, key):
    tensors = {"fc.weight": torch.randn(2, 3), "fc.bias": torch.randn(2)}
    SAVE[form](
        {"epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}, key: tensors}, tmp_path / "a"
    )
    assert_same(read(tmp_path / "a"), tensors)
    SAVE[form]({"state_dict": {key: tensors}, "epoch": torch.tensor(3)}, tmp_path / "a")
    assert_same(read(tmp_path / "a"), tensors)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict"])
def test_averaged_weights(tmp_path, key):
    plain, averaged = {"a": torch.zeros(2)}, {"module.a": torch.ones(2)}
    torch.save({"state_dict": plain, key: averaged}, tmp_path / "a")
    assert_same(read(tmp_path / "a"), plain)
    assert_same(read(tmp_path / "a", ema=True), {"a": torch.ones(2)})
    torch.save({"state_dict": plain}, tmp_path / "a")
    with pytest.raises(
        CheckpointError, match=r"found a dict \(state_dict: dict\); expected averaged"
    ):
        read(tmp_path / "a", ema=True)


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod."]
)
def test_prefixes(tmp_path, form, prefix):
    tensors = {"a.w": torch.ones(2), "model": torch.zeros(1)}
    SAVE[form]({prefix + name: t for name, t in tensors.items()}, tmp_path / "a")
    assert_same({n: read(tmp_path / "a")[n] for n in tensors}, tensors)
    shared_by_some = {prefix + "a": torch.ones(2), "head": torch.zeros(1)}
    SAVE[form](shared_by_some, tmp_path / "a")
    assert read(tmp_path / "a").keys() == shared_by_some.keys()


@pytest.mark.parametrize("prefix", ["model.", "net."])
@pytest.mark.parametrize("form", PICKLED)
def test_lightning(tmp_path, monkeypatch, form, prefix):
    """Its checkpoints hold classes of its own, which are named and never looked for."""
    name = "lightning.fabric.utilities.data"
    module = types.ModuleType(name)
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": name})
    tensors = {"fc.weight": torch.randn(2, 3), "fc.bias": torch.randn(2)}
    with monkeypatch.context() as patch:
        for end in re.finditer(r"\.|$", name):
            parent = name[: end.start()]
            patch.setitem(
                sys.modules, parent, module if parent == name else types.ModuleType(parent)
            )
        saved = {
            "epoch": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": collections.OrderedDict({prefix + k: t for k, t in tensors.items()}),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
            "hparams_name": "kwargs",
            "hyper_parameters": module.AttributeDict(lr=0.1, args=argparse.Namespace(depth=18)),
        }
        SAVE[form](saved, tmp_path / "a.ckpt")
    assert_same(read(tmp_path / "a.ckpt"), tensors)
    held = load_pickle(tmp_path / "a.ckpt")["hyper_parameters"]
    assert type(held) is Placeholder and held.name == f"{name}.AttributeDict"
    assert held.items[:2] == ["lr", 0.1]
    assert name not in sys.modules


@pytest.mark.parametrize(
    "saved", [[torch.ones(2)], torch.ones(3), 3, {"a": 1}, {"x": {"a": torch.ones(1)}}]
)
def test_no_state_dict(tmp_path, saved):
    torch.save(saved, tmp_path / "a")
    with pytest.raises(
        CheckpointError, match="expected name -> tensor, at the top or under one of"
    ):
        read(tmp_path / "a")


def shard(directory, form):
    tensors = {f"model.{name}": torch.randn(3) for name in "abc"}
    suffix = {"zip": "pytorch_model{}.bin", "safetensors": "model{}.safetensors"}[form]
    files = [suffix.format(f"-0000{i}-of-00002") for i in (1, 2)]
    names = list(tensors)
    weight_map = {name: files[name == names[2]] for name in names}
    for file in files:
        SAVE[form]({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
    index = directory / (suffix.format("") + ".index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))
    return index, files, {name.removeprefix("model."): t for name, t in tensors.items()}


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_shards(tmp_path, form):
    index, files, tensors = shard(tmp_path, form)
    for path in (index, tmp_path, str(tmp_path)):
        assert_same({name: read(path)[name] for name in "abc"}, tensors)
    SAVE[form]({"model.c": torch.ones(3), "model.d": torch.ones(3)}, tmp_path / files[1])
    with pytest.raises(CheckpointError, match=r"differs from its index in \['model.d'\]"):
        read(index)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"no shard '{files[1]}' beside it"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}',
                                  '{"weight_map": {"a": 3}}', '{"a":' * 50_000,
                                  '{"weight_map": {"a": "%s"}}' % ("x" * 5000),
                                  '{"weight_map": {"a": "\\ud800"}}'])  # fmt: skip
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="found a damaged index"):
        read(tmp_path)


def test_directory(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"expected model.safetensors or model.safetensors.index"
    ):
        read(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert read(tmp_path)["a"].tolist() == [1, 1]
    write(tmp_path / "model.safetensors", {"a": np.zeros(2)})
    assert read(tmp_path)["a"].tolist() == [0, 0]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="its directory is empty"):
        read(tmp_path / "a.pth")
    for name in ("resnet50.pth", "vgg16.pth"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"name there is 'resnet50\.pth'"):
        read(tmp_path / "resnet5O.pt")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        read(tmp_path / "none" / "a.pth")


# Writing


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz"])
def test_write(tmp_path, suffix):
    tensors = every_type() | {
        "transposed": torch.randn(3, 4).T,
        "expanded": torch.randn(1).expand(3, 2),
        "sliced": torch.randn(5, 6)[1:3, ::2],
        "counter": torch.tensor(2**40 + 1),
        "ünï.weight/\udc80": torch.ones(1),
    }
    if suffix == ".safetensors":
        tensors = {n: t for n, t in tensors.items() if t.dtype != torch.complex128}
    if suffix == ".npz":
        tensors = {n: t for n, t in tensors.items() if "float8" not in str(t.dtype)}
    if suffix in (".npz", ".safetensors"):  # their names are UTF-8
        tensors["ünï.weight"] = tensors.pop("ünï.weight/\udc80")
    torch.save(tensors, tmp_path / "torch")
    arrays = read(tmp_path / "torch")
    path = tmp_path / f"ours{suffix}"
    write(path, arrays)
    again = read(path)
    assert_same({name: again[name] for name in tensors}, tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "torch"]
    if suffix in (".pth", ".pt"):
        for mapped in (False, True):
            assert_same(torch.load(path, weights_only=True, mmap=mapped), tensors)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert all(array.ctypes.data % 64 == 0 for array in again.values() if array.size)
    elif suffix == ".safetensors":
        theirs = safetensors.torch.load_file(path)
        assert_same({name: theirs[name] for name in tensors}, tensors)
        with safetensors.safe_open(path, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    else:
        with np.load(path) as theirs:
            for name, array in arrays.items():
                assert theirs[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_write_other_arrays(tmp_path, suffix):
    arrays = {"jax": jnp.arange(3, dtype=jnp.bfloat16), "big": np.arange(3, dtype=">f4")}
    write(tmp_path / f"a{suffix}", arrays)
    ours = read(tmp_path / f"a{suffix}")
    assert facts(ours["jax"]) == facts(np.asarray(arrays["jax"]))
    assert facts(ours["big"]) == facts(np.arange(3, dtype="<f4"))
    write(tmp_path / f"a{suffix}", {})
    assert read(tmp_path / f"a{suffix}") == {}


def test_write_over_what_was_read(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(10_000)}, path)
    (tmp_path / "link.pth").symlink_to(path)
    arrays = read(path)
    write(tmp_path / "link.pth", {"b": arrays["a"][::-1]})
    assert (tmp_path / "link.pth").is_symlink()
    assert read(path)["b"].tolist() == list(range(10_000))[::-1]
    assert arrays["a"].tolist() == list(range(10_000))


def limit_file_size(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def break_fsync(monkeypatch):
    def fail(_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    return monkeypatch.undo


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("trouble", [limit_file_size, break_fsync])
def test_failed_write_leaves_nothing(tmp_path, monkeypatch, suffix, trouble):
    path = tmp_path / f"a{suffix}"
    write(path, {"a": np.ones(3)})
    before = path.read_bytes()
    repair = trouble(monkeypatch)
    try:
        with pytest.raises(OSError):
            write(path, {"a": np.ones(1_000_000)})
    finally:
        repair()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("a.ckpt", {}, "suffix '.ckpt'; expected one of .safetensors, .npz, .pth, .pt, .orbax"),
        ("a.pth", {"a": np.array(["x"])}, "'a' of type <U1; expected one of bfloat16, bool"),
        ("a.pth", {"a": np.array([object()])}, "'a' of type object; expected one of"),
        ("a.safetensors", {"a": np.ones(2, complex)}, "'a' of type complex128; expected one of"),
        ("a.npz", {"a": np.ones(2, ml_dtypes.float8_e5m2)}, "'a' of type float8_e5m2; expected"),
        ("a.npz", {"a\0b": np.ones(2)}, "the name 'a\\x00b'"),
        ("a.pth", {3: np.ones(2)}, "the name 3"),
        ("a.safetensors", {"__metadata__": np.ones(2)}, "the name '__metadata__'"),
    ],
)
def test_write_refuses(tmp_path, name, tensors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write(tmp_path / name, {"first": np.ones(1), **tensors})
    assert list(tmp_path.iterdir()) == []


NUMBERED = {f"layer{i}.weight": np.full((10, 25), i, np.float32) for i in range(5)}


def test_write_shards(tmp_path):
    """Laid out as Hugging Face does; what was there before, whole or in shards, goes away."""
    path = tmp_path / "model.safetensors"
    write(path, NUMBERED)
    write(path, NUMBERED, shard_size="2.5KB")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, f"{path.name}.index.json"]
    index = json.loads((tmp_path / f"{path.name}.index.json").read_text())
    assert index["metadata"] == {"total_size": 5000}
    assert index["weight_map"] == {f"layer{i}.weight": names[i // 2] for i in range(5)}
    assert_same({n: read(path)[n] for n in NUMBERED}, NUMBERED)
    for i, shard in enumerate(names):
        held = safetensors.torch.load_file(tmp_path / shard)
        assert sorted(held) == [f"layer{j}.weight" for j in (2 * i, 2 * i + 1) if j < 5]
    write(path, NUMBERED, shard_size=2**20)  # one is enough
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert_same(read(tmp_path), NUMBERED)


def test_failed_shards_leave_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write(path, NUMBERED)
    for trouble in (limit_file_size, break_fsync):
        repair = trouble(monkeypatch)
        large = NUMBERED | {"last": np.ones(1_000_000, np.float32)}
        try:
            with pytest.raises(OSError):
                write(path, large, shard_size=2000)
        finally:
            repair()
        assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("size", [0, -5, "", "MB", "five GB", "3 XB", "0.5"])
def test_shard_sizes(tmp_path, size):
    with pytest.raises(ValueError, match="expected bytes, or a size such as 500MB or 2GiB"):
        write(tmp_path / "a.safetensors", NUMBERED, shard_size=size)
    with pytest.raises(ValueError, match=r"shard_size is for \.safetensors"):
        write(tmp_path / "a.npz", NUMBERED, shard_size="1MB")


# Of a read that failed, a thread of TensorStore's may finish after Orbax has closed its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_orbax_directory(tmp_path, monkeypatch):
    arrays = {
        "a.weight": np.arange(6.0).reshape(2, 3),
        "a.bias": np.ones(2, ml_dtypes.bfloat16),
        "a.num_batches_tracked": np.array(2**40 + 1),
    }
    path = tmp_path / "a.orbax"
    for _ in range(2):
        write(path, arrays)
    ours = read(path)
    assert_same({name: ours[name] for name in arrays}, arrays)
    with pytest.raises(CheckpointError, match="found an Orbax directory; expected a training"):
        read(path, ema=True)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        write(path, {"b": np.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert read(path).keys() == arrays.keys()
    (path / "manifest.ocdbt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="found a damaged Orbax directory"):
        read(path)
    (tmp_path / "mine.orbax").write_text("a file of the user's own")
    with pytest.raises(FileExistsError, match="no Orbax directory"):
        write(tmp_path / "mine.orbax", arrays)


# Hostile and broken files


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def both_forms(tmp_path, body):
    return [zip_file(tmp_path / "a.pth", body), legacy_file(tmp_path / "b.pth", body)]


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (getattr, ("a", "b"), "builtins.getattr"),
        (open, ("{}", "w"), "io.open"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (np.load, ("{}",), "numpy.load"),
        (torch.nn.Linear, (2, 3), "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_runs(tmp_path, function, args, name, protocol):
    marker = tmp_path / "marker"
    call = Call(function, *(str(arg).format(marker) for arg in args))
    body = pickle.dumps({"a": call}, protocol).replace(b"__builtin__", b"builtins")
    for path in both_forms(tmp_path, body):
        with pytest.raises(CheckpointError, match=rf"'\w*{re.escape(name)}'.* not loaded"):
            read(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cargparse\nNamespace\n(X\x01\0\0\0aX\x01\0\0\0atR(]tR.",  # calls, and calls of the result
        b"cnumpy.core.multiarray\nscalar\n)R}b.",
        b"cpytorch_lightning.callbacks\nModelCheckpoint\n)\x81}X\x01\0\0\0aNsb.",
    ],
)
def test_placeholders_stay_inert(tmp_path, body):
    for path in both_forms(tmp_path, b"\x80\x02" + body):
        assert type(load_pickle(path)) is Placeholder


def call_often(function, argument):
    """A pickle that calls one function 200 times with one object of some kilobytes."""
    return b"\x80\x02" + argument + b"\x85q\0c" + function + b"\nq\1" + b"h\1h\0R" * 200 + b"?"


NUMBERS, SIZE = np.arange(6, dtype="<f4").tobytes(), struct.pack("<q", 6)
TENSOR = (
    b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n"
    b"FloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ%s\x89NtRs."
)
GOOD = TENSOR % b"K\0K\2K\3\x86K\3K\1\x86"
DAMAGED = "found a damaged pickle"
HOSTILE = {
    "memo index": (b"Nr\xff\xff\xff\xff0.", "found pickle opcode b'0'"),
    "memo of nothing": (b"q\0.", DAMAGED),
    "unknown memo": (b"h\5.", DAMAGED),
    "hash of a deep key": (b"})" + b"\x85" * 200_000 + b"Ns.", DAMAGED),
    "deep key of pairs": (
        b"ccollections\nOrderedDict\n])" + b"\x85" * 200_000 + b"N\x86a\x85R.",
        DAMAGED,
    ),
    "list as key": (b"}]Ns.", DAMAGED),
    "name of doubling size": (b")" + b"q\0h\0\x86" * 60 + b"h\0\x93.", DAMAGED),
    "storage of doubling size": (b")" + b"q\0h\0\x86" * 60 + b"Q.", DAMAGED),
    "text longer than the file": (b"X\xff\xff\xff\x7fab.", f"{DAMAGED}|does not end"),
    "bytes longer than the file": (b"B\xff\xff\xff\xffab.", "a pickle that does not end"),
    "empty stack": (b"R.", DAMAGED),
    "no mark": (b"t.", DAMAGED),
    "odd items": (b"}(Nu.", DAMAGED),
    "items of None": (b"N(NNu.", DAMAGED),
    "state of a dict": (b"}}b.", DAMAGED),
    "state of a tensor": (GOOD.replace(b"tRs.", b"tR}bs."), DAMAGED),
    "call of a tensor": (GOOD.replace(b"tRs.", b"tR)Rs."), DAMAGED),
    "storage again as another type": (
        GOOD[:-2] + GOOD[3:].replace(b"Float", b"Int").replace(b"\0\0\0a", b"\0\0\0b"),
        "tensor data '0'",
    ),
    "bytes of a size": (b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.", "'builtins.bytes'"),
    "copies of a size": (call_often(b"torch\nSize", b"](" + b"N" * 5000 + b"e"), DAMAGED),
    "copies of pairs": (
        call_often(
            b"collections\nOrderedDict",
            b"](" + b"".join(b"K%cN\x86" % i for i in range(256)) + b"e",
        ),
        DAMAGED,
    ),
    "copies of a text": (
        call_often(b"_codecs\nencode", b"X\x88\x13\0\0" + b"a" * 5000 + b"X\6\0\0\0latin1"),
        "found pickle opcode",
    ),
    "extension": (b"\x82\1.", "found pickle opcode"),
    "persistent text": (b"P0\n.", "found pickle opcode"),
    "instance": (b"(ios\nsystem\n.", "found pickle opcode"),
    "name without end": (b"c" + b"a" * 5000, DAMAGED),
    "no end": (b"]" * 1000, "does not end|found pickle opcode"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "found pickle opcode"),
    "shape outside": (TENSOR % b"K\0K\7\x85K\1\x85", "a tensor of shape"),
    "offset outside": (TENSOR % b"K\1K\6\x85K\1\x85", "a tensor of shape"),
    "strides outside": (TENSOR % b"K\0K\2K\2\x86K\6K\1\x86", "a tensor of shape"),
    "negative stride": (TENSOR % b"K\5K\2\x85J\xff\xff\xff\xff\x85", "damaged sizes or type"),
    "negative offset": (TENSOR % b"J\xff\xff\xff\xffK\1\x85K\1\x85", "damaged sizes or type"),
    "one stride too few": (TENSOR % b"K\0K\2\x85)", "a tensor of shape"),
    "terabytes of one number": (
        TENSOR % b"K\0J\xff\xff\xff\x7fJ\0\1\0\0\x86K\0K\0\x86",
        "a tensor of 2199023254528 bytes",
    ),
    "overflowing shape": (
        TENSOR % (b"K\0\x8a\x09" + b"\xff" * 8 + b"\0\x85K\0\x85"),
        "a tensor of shape",
    ),
    "shape of floats": (TENSOR % b"K\0G?\xf0\0\0\0\0\0\0\x85K\1\x85", "damaged sizes or type"),
    "too many dimensions": (
        TENSOR % (b"K\0(" + b"K\1" * 1000 + b"t(" + b"K\1" * 1000 + b"t"),
        "a tensor of shape",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, name):
    body, found = HOSTILE[name]
    paths = [
        zip_file(tmp_path / "a.pth", body, data__0=NUMBERS),
        legacy_file(tmp_path / "b.pth", body.replace(b"K\6tQ", b"K\6NtQ"), "0", SIZE + NUMBERS),
    ]
    for path in paths:
        measured = peak_memory() if len(body) < 10_000 else contextlib.nullcontext([0])
        with measured as peak, pytest.raises(CheckpointError, match=found) as caught:
            read(path)
        assert peak[0] < 1_000_000
        assert len(str(caught.value)) < 1000


def test_handmade_tensor(tmp_path):
    """The pickle that the hostile ones vary is a good one."""
    zipped = zip_file(tmp_path / "a.pth", GOOD, data__0=NUMBERS)
    body = GOOD.replace(b"K\6tQ", b"K\6NtQ")
    for path in (zipped, legacy_file(tmp_path / "b.pth", body, "0", SIZE + NUMBERS)):
        assert read(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_endless_objects(tmp_path):
    for path in both_forms(tmp_path, b"\x80\x02}q\0X\5\0\0\0modelh\0s."):  # a dict in itself
        with pytest.raises(CheckpointError, match="expected name -> tensor"):
            read(path)
    for path in both_forms(tmp_path, b"\x80\x02]" + b"]" * 50_000 + b"a" * 50_000 + b"."):
        with pytest.raises(CheckpointError, match="expected name -> tensor"):
            read(path)


def test_pickle_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_PICKLE", 1000)
    for path in both_forms(tmp_path, b"\x80\x02" + b"]" * 1000 + b"."):
        with pytest.raises(CheckpointError, match="a pickle that does not end before byte"):
            read(path)


def unsupported_objects():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    return {
        "a quantised tensor": quantised,
        "a sparse tensor": torch.eye(2).to_sparse(),
        "a lazily conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "a tensor without data": torch.empty(2, device="meta"),
        "torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
        "datetime.date": __import__("datetime").date(2020, 1, 1),
    }


@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("found", unsupported_objects())
def test_unsupported_objects(tmp_path, form, found):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SAVE[form]({"a": unsupported_objects()[found]}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=re.escape(found)):
        read(tmp_path / "a")


@pytest.mark.parametrize("form", PICKLED)
def test_big_endian(tmp_path, form, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("sys.byteorder", "big")
        SAVE[form]({"a": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="found big-endian tensors"):
        read(tmp_path / "a")


def test_torchscript(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*torch.jit.load\(path\)"):
        read(tmp_path / "a.pt")


def rezip(path, change=None, **options):
    """The same entries in a new archive."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two entries of one name
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in change(entries) if change else entries:
                archive.writestr(name, data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"a/data/0", b"a/data/9"),  # another name in the local header than in the directory
        (b"PK\3\4\0\0\x08\x08", b"PK\3\4\0\0\x09\x08"),  # encrypted
    ],
)
def test_contradictory_zip(tmp_path, old, new):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a")
    good = (tmp_path / "a").read_bytes()
    assert old in good
    (tmp_path / "a").write_bytes(good.replace(old, new, 1))
    with pytest.raises(CheckpointError, match="at odds with its header, or encrypted"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"compression": zipfile.ZIP_DEFLATED}, "found an archive packed again"),
        (lambda e: [*e, e[0]], {}, "found two zip entries of one name"),
        (lambda e: [*e, ("a/DATA.pkl", e[0][1])], {}, "found two zip entries of one name"),
        (lambda e: [("a/x", b"1")], {}, "found a zip archive without data.pkl or arrays"),
        (lambda e: [("a/x", b"1"), *[(f"b/{n}", d) for n, d in e]], {}, "an archive packed again"),
        (lambda e: [x for x in e if x[0] != "a/data/0"], {}, "found no bytes of tensor data '0'"),
        (
            lambda e: [(n, d[: 5 if n == "a/data/0" else None]) for n, d in e],
            {},
            "found 5 bytes of",
        ),
    ],
)
def test_other_zips(tmp_path, change, options, message):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.pth")
    rezip(tmp_path / "a.pth")
    assert read(tmp_path / "a.pth")["a"][99] == 99
    rezip(tmp_path / "a.pth", change, **options)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.pth")


def npy(**header):
    stream = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (2,)} | header
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue() + b"\0" * 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(descr="|O"), "object is no little-endian number"),
        (npy(descr=">f4"), ">f4 is no little-endian number"),
        (npy(descr="<U2"), "is no little-endian number"),
        (npy(descr=[("a", "<f4")]), "is no little-endian number"),
        (npy(shape=(3,)), "buffer is too small"),
        (npy(shape=(2**62,)), "array is too big"),
        (b"\x93NUMPY\1", "expected 8 bytes got 7"),
        (b"no array", "magic string is not correct"),
    ],
)
def test_damaged_npz(tmp_path, data, message):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("good.npy", npy())
        archive.writestr("bad.npy", data)
    with pytest.raises(CheckpointError, match=f"'bad.npy'.*{message}"):
        read(tmp_path / "a.npz")


def test_npz_bomb(tmp_path, monkeypatch):
    zeros = np.zeros(1 << 20, np.uint8)
    np.savez_compressed(tmp_path / "a.npz", a=zeros, b=zeros)
    assert read(tmp_path / "a.npz")["b"].nbytes == 1 << 20
    monkeypatch.setattr(npz, "_ALWAYS", 1 << 20)
    with (
        peak_memory() as peak,
        pytest.raises(
            CheckpointError, match=r"a\.npz: found [\d,]+ bytes that unpack to 2,097,408"
        ),
    ):
        read(tmp_path / "a.npz")
    assert peak[0] < 100_000
    np.savez(tmp_path / "a.npz", a=zeros, b=zeros)
    assert len(read(tmp_path / "a.npz")) == 2


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_check_sum(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("a.npy", npy())
    data = (tmp_path / "a.npz").read_bytes()
    crc = struct.pack("<I", zipfile.ZipFile(tmp_path / "a.npz").infolist()[0].CRC)
    (tmp_path / "a.npz").write_bytes(data.replace(crc, b"\1\2\3\4"))
    with pytest.raises(CheckpointError, match="its check sum is wrong"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"hello, world, this is text", "a file that begins with b'hello, world, th'"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x93NUMPY\1\0", "a single array"),
        (b"\x1f\x8b\x08\0", "a gzip file"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"a" * 257 + b"ustar" + b"\0" * 500, "a tar file"),
        (pickle.dumps({"a": 1}, 2), "a plain pickle"),
        (
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1002, 2),
            "a plain pickle, or one of an unknown version",
        ),
        (b"\x80", "a damaged pickle|a pickle that does not end"),
        (b"PK\3\4" + b"\0" * 100, "a damaged or truncated zip archive"),
        (struct.pack("<Q", 100) + b'{"a"', "a truncated safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}" * 9, "a file that begins"),
        (struct.pack("<Q", 16) + b"{}" * 9, "a damaged safetensors file"),
    ],
)
def test_no_checkpoint(tmp_path, data, message):
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"a.pth: found ({message}).*; expected") as caught:
        read(path)
    assert caught.value.path == path
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no regular file"):
        read(tmp_path / "a")


def test_load_pickle_of_other_formats(tmp_path):
    write(tmp_path / "a.npz", {"a": np.ones(2)})
    with pytest.raises(
        CheckpointError, match=r"found the format npz; expected a file that torch.save"
    ):
        load_pickle(tmp_path / "a.npz")


# Every mutation of a good file gives an error, or what the others read


@pytest.mark.parametrize("form", fuzz.OTHERS)
def test_truncated(tmp_path, form):
    good, path = fuzz.seeds(tmp_path)[form], tmp_path / "mutant"
    assert fuzz.trial(path, good, form) == ("same", "")
    cuts = {len(good) * i // 20 for i in range(20)} | {1, len(good) - 1}
    assert {fuzz.trial(path, good[:cut], form)[0] for cut in cuts} == {"refused"}


def test_fuzz(tmp_path):
    """A short run of `python -m benchmarks.fuzz`."""
    outcomes = fuzz.fuzz(350, 0, tmp_path)
    assert set(outcomes) == set(fuzz.OTHERS)
    for counter in outcomes.values():
        assert counter["WRONG"] == 0
        assert counter["refused"] > 10
    assert sum(counter["same"] for counter in outcomes.values()) > 50  # not all are refused


def test_fuzz_would_notice(tmp_path, monkeypatch):
    """Other numbers, other names, another error, code that ran: each is an outcome of its own."""
    good, path = fuzz.seeds(tmp_path)["safetensors"], tmp_path / "mutant"
    for found, detail in (
        (lambda path: {n: a + 1 for n, a in read(path).items()}, "theirs"),
        (lambda path: {}, "in one of the two only"),
        (lambda path: [][1], "IndexError"),
        (lambda path: path.with_name("hacked").touch() or read(path), "it ran code of the file"),
    ):
        monkeypatch.setattr(fuzz, "read", found)
        outcome, said = fuzz.trial(path, good, "safetensors")
        assert outcome == "WRONG" and detail in said
