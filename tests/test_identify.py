"""What a checkpoint is of, and what `inspect` says of it, from names and shapes alone."""

import json
import sys

import numpy as np
import pytest
import torch

import convert
import flax_nets
from benchmarks.libraries import build, shapes
from convert.__main__ import main
from flax_nets import registry

identify = sys.modules["convert.identify"]  # the module: the package has the function


@pytest.mark.parametrize(
    ("reference", "arguments", "name", "dialect"),
    [
        ("torchvision/resnet18", dict(num_classes=7), "resnet18", "native"),
        ("torchvision/squeezenet1_1", {}, "squeezenet1_1", "native"),
        ("timm/vgg11", {}, "vgg11", "timm"),
        ("timm/vit_tiny_patch16_224", {}, "vit_tiny_patch16_224", "timm"),
    ],
)
def test_the_network_of_a_checkpoint(reference, arguments, name, dialect):
    state_dict = shapes(build(reference, **arguments))
    first, *others = convert.identify(state_dict)
    assert (first.model, first.dialect, first.percent, first.fits) == (name, dialect, 100.0, True)
    assert all(match.percent < 99 and not match.fits for match in others)
    assert identify.decide(state_dict) == name


def test_where_names_and_shapes_do_not_decide():
    """These two differ in padding and epsilon alone, which no tensor shows."""
    state_dict = shapes(build("timm/mobilenetv3_small_100"))
    with pytest.raises(ValueError, match="say which with --model") as caught:
        identify.decide(state_dict)
    assert " mobilenet_v3_small " in str(caught.value).replace(":", " ")
    assert "tf_mobilenetv3_small_100" in str(caught.value)


def test_where_nothing_fits_entirely():
    state_dict = convert.export(flax_nets.create_model("lenet5"))
    del state_dict["fc1.bias"]
    with pytest.raises(ValueError, match=r"fits no network.*lenet5 \(native names, 90\.0%\)"):
        identify.decide(state_dict, "lenet.pth")
    with pytest.raises(ValueError, match="none has anything in common with it"):
        identify.decide({"w": np.zeros((3, 5, 7))})


def test_the_table_of_sizes_is_up_to_date():
    """Otherwise: python -m convert.identify."""
    table = json.loads(identify.SIZES.read_text())
    assert sorted(table) == identify.names()
    smallest: dict[str, str] = {}
    for name in sorted(table, key=lambda name: -sum(table[name].values())):
        smallest[registry.resolve(name).file] = name
    for name in smallest.values():
        assert table[name] == {str(k): n for k, n in identify.measured(name).items()}, name


def test_inspect(tmp_path, capsys):
    state_dict = convert.export(flax_nets.create_model("lenet5", num_classes=3))
    broken = state_dict["fc1.bias"].copy()
    broken[:3] = np.nan, np.inf, 5.0
    tensors = {
        f"module.{k}": torch.tensor(v) for k, v in (state_dict | {"fc1.bias": broken}).items()
    }
    tensors["module.fc2.bias"] = tensors["module.fc2.bias"].bfloat16() + 1
    path = tmp_path / "net.pth"
    torch.save({"model": tensors, "model_ema": {"a": torch.ones(2)}}, path)
    found = convert.inspect(path)
    assert (found.format, found.wrappers, found.prefix) == ("pth", ("model",), "module.")
    assert (found.networks[0].model, found.dialect) == ("lenet5", "native")
    rows = {row.name: row for row in found.tensors}
    assert (rows["fc1.bias"].nans, rows["fc1.bias"].infinite, rows["fc1.bias"].largest) == (1, 1, 5)
    assert (rows["fc2.bias"].dtype, rows["fc2.bias"].smallest) == ("bfloat16", 1.0)

    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "PyTorch (zip), under model, without the prefix 'module.' of all names" in printed
    assert "likely: lenet5 (native names, 100.0%)" in printed
    assert "1 NaN, 1 infinite" in printed
    assert f"10 tensors, {found.numbers:,} numbers, 0.2 MiB, 2 NaN or infinite" in printed
    assert main(["inspect", str(path), "--ema", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["wrappers"] == ["model_ema"]
    assert figures["networks"] == []
    assert figures["tensors"]["a"]["largest"] == 1.0
