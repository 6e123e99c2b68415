"""`flax-nets predict`: real digits, as image files, through the LeNet that the demo trains on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flax_nets
from flax_nets import cli, predict
from flax_nets.train import data

ASSETS = Path(flax_nets.__file__).parent / "assets"
CONFIG = {
    "pretrained_cfg": {"input_size": [1, 32, 32], "crop_pct": 1.0, "mean": [0.5], "std": [0.5]},
    "id2label": {str(i): f"a {name}" for i, name in enumerate("0123456789")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty images, what the network calls them in their names, and a checkpoint."""
    folder = tmp_path_factory.mktemp("digits")
    held_out = data.digits("test", 32, 1)
    (folder / "images").mkdir()
    shutil.copy(ASSETS / "lenet5_digits.pth", folder / "lenet.pth")
    lenet = flax_nets.create_model("lenet5", weights=folder / "lenet.pth")
    answers = np.asarray(lenet(held_out.images[:20])).argmax(1)
    assert (answers == held_out.labels[:20]).mean() > 0.9
    for i, answer in enumerate(answers):
        grey = np.round((held_out.images[i, :, :, 0] + 1) * 127.5).astype(np.uint8)
        Image.fromarray(grey).save(folder / "images" / f"{i:02}_{answer}.png")
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(folder, *argv):
    return cli.main(["predict", "--model", "lenet5", "--weights", str(folder / "lenet.pth"), *argv])


def test_a_directory(folder, capsys):
    """More images than a batch holds; as files they are what they are as arrays."""
    assert run(folder, str(folder / "images"), "--json", "--top", "2") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == "lenet5"
    assert printed["weights"] == str(folder / "lenet.pth")
    assert len(printed["images"]) == 20 > predict.BATCH
    for row in printed["images"]:
        first, second = row["classes"]
        assert first["name"] == f"a {first['index']}"
        assert row["image"].endswith(f"_{first['index']}.png")
        assert 1 >= first["probability"] > second["probability"] >= 0


def test_patterns_and_what_is_printed(folder, capsys, tmp_path):
    first, second = sorted((folder / "images").glob("*.png"))[:2]
    pattern, plot = str(folder / "**" / "0[01]_*.png"), tmp_path / "plot.png"
    assert run(folder, pattern, str(first), "--top", "1", "--plot", str(plot)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4:2] == [str(first), str(second)]
    assert lines[1].endswith(f"%  a {first.stem[-1]}")
    assert lines[4:] == [f"wrote {plot}: 2 of 2 images"]
    with Image.open(plot) as picture:
        assert picture.size == (990, 572)
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_a_broken_image_is_named(folder, capsys, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((folder / "images").joinpath("notes.txt").read_bytes())
    good = str(next((folder / "images").glob("*.png")))
    assert run(folder, good, str(broken), "--json") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {broken}: no image that can be read")
    assert len(printed.err.splitlines()) == 1
    rows = json.loads(printed.out)["images"]
    assert [r["image"] for r in rows] == [good, str(broken)]
    assert "classes" in rows[0]
    assert "error" in rows[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{images}", "--top", "0"], "--top: got 0"),
        (["{images}", "--plot", "plot.bmp"], "--plot: got plot.bmp, expected a name that ends in"),
        (["{images}/*.jpg"], "*.jpg: no images there"),
        (["{tmp}"], "no images there"),
        (["{images}", "--weights", "DEFAULT"], "no published weights of lenet5 are known"),
        (["{images}", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["{images}", "--model", "lenet6"], "there is no network 'lenet6'"),
    ],
)
def test_mistakes(argv, message, folder, capsys, tmp_path):
    argv = [a.format(images=folder / "images", tmp=tmp_path) for a in argv]
    assert run(folder, *argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out


def test_names_of_classes(tmp_path):
    assert predict.class_names("torchvision/resnet50.IMAGENET1K_V2")(281) == "tabby"
    assert predict.class_names("timm/resnet50.a1_in1k")(281) == "tabby"
    assert predict.class_names("timm/vit_base_patch16_224.augreg_in21k")(281) == "class 281"
    weights = str(tmp_path / "net.pth")
    assert predict.class_names(weights)(3) == "class 3"
    (tmp_path / "config.json").write_text('{"label_names": ["a", "b"]}')
    assert [predict.class_names(weights)(i) for i in range(3)] == ["a", "b", "class 2"]
