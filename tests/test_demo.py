"""`flax-nets demo`: the whole way, as somebody without PyTorch goes it."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
import flax_nets
from flax_nets import demo
from flax_nets.train.data import digits
from torch_ref.lenet import LeNet5

ASSETS = Path(flax_nets.__file__).parent / "assets"
WITHOUT_TORCH = """
import importlib.abc, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
from flax_nets import cli
sys.exit(cli.main(["demo", "--out", sys.argv[1], "--epochs", "2", "--json"]))
"""


def predictions(state_dict):
    model = LeNet5()
    model.load_state_dict(state_dict, strict=True)
    with torch.no_grad():
        images = digits("test").images.transpose(0, 3, 1, 2).copy()
        return model.double().eval()(torch.from_numpy(images).double()).numpy()


def test_the_stored_outputs_are_those_of_the_stored_checkpoint():
    with np.load(ASSETS / "lenet5_digits.npz") as stored:
        logits = stored["logits"]
    found = predictions(torch.load(ASSETS / "lenet5_digits.pth", weights_only=True))
    assert np.abs(found - logits).max() <= 1e-12 * np.abs(logits).max()
    assert np.mean(logits.argmax(1) == digits("test").labels) >= 0.975


def test_demo_without_torch(tmp_path):
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    figures = json.loads(done.stdout)
    assert figures["ok"]
    assert figures["convert"] == {"tensors": 10, "parameters": 61_706, "identical": True}
    assert figures["verify"]["max_error"] <= 1e-12
    assert figures["verify"]["same_predictions"] == figures["verify"]["count"] == 355
    assert figures["before"]["right"] == 347
    assert figures["after"]["accuracy"] > 0.9

    written, picture = map(Path, figures["files"])
    answers = predictions(torch.load(written, weights_only=True)).argmax(1)
    assert np.sum(answers == digits("test").labels) == figures["after"]["right"]
    assert_png(picture.read_bytes())


def assert_png(content):
    """It decodes, is large, and is more than a blank sheet."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = np.frombuffer(content[16:24], ">u4")
    assert width >= 1200
    assert height >= 900
    data, at = b"", 8
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        data += content[at + 8 : at + 8 + size] if content[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    assert len(set(zlib.decompress(data))) > 100


def test_the_demo_notices_a_changed_network(tmp_path):
    """By one bit in one of 61,706 numbers."""
    path, held_out = tmp_path / "changed.pth", digits("test")
    state_dict = {k: v.copy() for k, v in convert.read(ASSETS / "lenet5_digits.pth").items()}
    state_dict["conv2.weight"].view(np.int32)[3, 2, 1, 0] ^= 1
    convert.write(path, state_dict)
    found = demo.verification(path, held_out)
    assert not found["equal"]
    assert 1e-12 < found["max_error"] < 1e-3
    intact = demo.verification(ASSETS / "lenet5_digits.pth", held_out)
    assert intact["equal"]


def test_the_demo_notices_other_digits():
    other = digits("train")
    with pytest.raises(ValueError, match="digits are not those that PyTorch saw"):
        demo.verification(ASSETS / "lenet5_digits.pth", other)
