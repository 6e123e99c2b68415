"""The tensor rules of dialects: exact inverses, and nothing forced to fit."""

import numpy as np
import pytest

from convert.dialects import Dialect, Fold, Fuse


def numbers(*shape):
    return np.random.default_rng(0).normal(size=shape)


FOLD = Fold("classifier.{n}.weight", (7, 7))
FUSE = Fuse("blocks.{n}.qkv.{rest}", 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_fold_is_pytorch_s_flatten(dtype):
    kernel = numbers(4, 5, 7, 7).astype(dtype)
    tensors = {"classifier.0.weight": kernel, "classifier.0.bias": kernel[:, 0, 0, 0]}
    native = FOLD.to_native(tensors)
    assert native["classifier.0.weight"].shape == (4, 245)
    assert native["classifier.0.weight"][2, 49 + 8] == kernel[2, 1, 1, 1]
    assert np.shares_memory(native["classifier.0.weight"], kernel)  # a view of a mapped file
    assert native["classifier.0.bias"] is tensors["classifier.0.bias"]
    back = FOLD.from_native(native)
    assert back["classifier.0.weight"].tobytes() == kernel.tobytes()
    assert back["classifier.0.weight"].shape == kernel.shape


@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (4, 245), (7, 7)], ids=str)
def test_fold_leaves_other_sizes_to_be_reported(shape):
    tensors = {"classifier.0.weight": numbers(*shape)}
    assert FOLD.to_native(tensors)["classifier.0.weight"].shape == shape


def test_fuse_puts_the_parts_one_after_the_other():
    parts = {f"blocks.2.qkv.weight[{i}]": numbers(4, 5) + i for i in range(3)}
    native = FUSE.to_native({"norm.weight": numbers(4), **parts})
    assert set(native) == {"norm.weight", "blocks.2.qkv.weight"}
    whole = native["blocks.2.qkv.weight"]
    np.testing.assert_array_equal(whole, np.concatenate(list(parts.values())))
    back = FUSE.from_native(native)
    assert set(back) == {"norm.weight", *parts}
    for key, value in parts.items():
        np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize("broken", ["missing", "another shape"])
def test_fuse_leaves_parts_that_do_not_fit_to_be_reported(broken):
    parts = {f"blocks.2.qkv.weight[{i}]": numbers(4, 5) for i in range(3)}
    if broken == "missing":
        del parts["blocks.2.qkv.weight[1]"]
    else:
        parts["blocks.2.qkv.weight[1]"] = numbers(4, 6)
    assert set(FUSE.to_native(parts)) == set(parts)


def test_a_dialect_renames_and_applies_its_rules_both_ways():
    dialect = Dialect(
        "other",
        "vit",
        renames=(
            ("blocks.{n}.qkv.{rest}[0]", "layer.{n}.query.{rest}"),
            ("blocks.{n}.qkv.{rest}[1]", "layer.{n}.key.{rest}"),
            ("blocks.{n}.qkv.{rest}[2]", "layer.{n}.value.{rest}"),
            ("classifier.0.{rest}", "fc.{rest}"),
        ),
        tensors=(FUSE, FOLD),
    )
    names = ("query", "key", "value")
    foreign = {f"layer.3.{n}.bias": numbers(4) for n in names} | {"fc.weight": numbers(2, 3, 7, 7)}
    native = dialect.tensors_to_native({dialect.to_native(k): v for k, v in foreign.items()})
    assert {k: v.shape for k, v in native.items()} == {
        "blocks.3.qkv.bias": (12,),
        "classifier.0.weight": (2, 147),
    }
    back = {dialect.from_native(k): v for k, v in dialect.tensors_from_native(native).items()}
    assert set(back) == set(foreign)
    for key, value in foreign.items():
        np.testing.assert_array_equal(back[key], value)
