"""The `flax-nets` command: what it prints, and how it takes mistakes."""

import json
import os
import shlex
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

import convert
import flax_nets
from flax_nets import cli

WEIGHTS = str(Path(flax_nets.__file__).parent / "assets" / "lenet5_digits.pth")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: flax-nets {command}")
    assert "--json" in printed


def test_help_of_the_command_itself(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"{flax_nets.__version__}\n")


def test_list(capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == flax_nets.list_models()
    assert cli.main(["list", "resnet1*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == flax_nets.list_models("resnet1*")


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["list", "lenet5"], []),
        (["--help"], []),
        (["train", "--recipe", "resnet50_a1", "--help"], ["tyro"]),
    ],
    ids=["list", "help", "help of train"],
)
def test_a_command_loads_nothing_that_it_does_not_need(argv, found):
    code = f"""
import sys
from flax_nets import cli
assert cli.main({argv}) == 0
heavy = {{"torch", "matplotlib", "orbax", "grain", "sklearn", "PIL", "tyro", "convert"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(found)


TRAIN = ["train", "--model", "lenet5", "--out", "run"]
EVAL = ["eval", "--model", "lenet5", "--weights", WEIGHTS]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "there is no command 'trian': it is one of list"),
        (["list", "resnett18"], "no network's name matches 'resnett18': did you mean 'resnet18'"),
        (["list", "a", "b"], "unrecognized arguments: b (flax-nets list --help)"),
        (["train"], "Missing from flax-nets train: --out PATH the folder of the run."),
        ([*TRAIN, "--lr", "fast"], "Error parsing --lr: could not convert string to float: 'fast'"),
        ([*TRAIN, "--lr", "-1"], "lr: got -1.0"),
        ([*TRAIN, "--optimiser", "sgd"], "Unrecognized options: --optimiser"),
        ([*TRAIN, "--recipe", "resnet50_a4"], "there is no recipe 'resnet50_a4': did you mean"),
        ([*TRAIN, "--process-id", "1"], "expected a coordinator beside them"),
        ([*TRAIN, "--augment", "filp()"], "there is no 'filp': did you mean 'flip'?"),
        ([*TRAIN, "--model", "lenet6"], "there is no network 'lenet6': did you mean 'lenet5'"),
        ([*TRAIN, "--data", "cifar:x"], "data: there is no 'cifar': did you mean 'cifar10'?"),
        ([*TRAIN, "--batch-size", "0"], "batch size: got 0"),
        ([*TRAIN, "--epochs", "0"], "epochs: got 0"),
        ([*TRAIN, "--warmup-epochs", "10"], "warmup_epochs: got 10.0, expected 0 to less than 10"),
        ([*TRAIN, "--optimizer", "adam", "--momentum", "0.9"], "momentum: adam has none"),
        ([*TRAIN, "--accumulate", "7"], "does not divide into accumulate=7 parts"),
        ([*TRAIN, "--weights", "nowhere.pth"], "nowhere.pth"),
        ([*TRAIN, "--image-size", "-3"], "got size=-3"),
        ([*EVAL, "--split", "all"], "invalid choice 'all' for argument '--split'"),
        ([*EVAL, "--weights", "nowhere.pth"], "nowhere.pth"),
        (["demo", "--epochs", "none"], "argument --epochs: invalid int value: 'none'"),
        (["demo", "--epochs", "0"], "--epochs: got 0"),
    ],
)
def test_mistakes(argv, message, capsys, tmp_path, monkeypatch):
    """Exit code 2, one line that says what is wrong, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_network(capsys):
    """Here every key at fault has a line of its own."""
    assert cli.main(["eval", "--model", "lenet5_1998", "--weights", WEIGHTS]) == 2
    printed = capsys.readouterr().err
    assert "is no checkpoint of this network" in printed
    assert "+ conv1.weight: unexpected" in printed


def test_eval(capsys):
    assert cli.main([*EVAL, "--json", "--batch-size", "100"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["count"] == 355
    assert figures["accuracy"] == pytest.approx(347 / 355)
    assert cli.main(EVAL) == 0
    assert (
        "lenet5 on digits (test): 97.75% of 355 images right, loss 0.0" in capsys.readouterr().out
    )


def test_train_from_a_checkpoint_then_evaluate(capsys, tmp_path):
    """One epoch of a gentle rate leaves a good network a good one."""
    out = tmp_path / "run"
    argv = ["train", "--model", "lenet5", "--weights", WEIGHTS, "--out", str(out), "--epochs", "1"]
    argv += ["--lr", "1e-3", "--optimizer", "adamw", "--clip", "1", "--json"]
    argv += ["--label-smoothing", "0.1", "--accumulate", "2"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert figures["test_accuracy"] > 0.95
    assert "epoch 1/1" in printed.err
    assert cli.main([*EVAL, "--weights", figures["weights"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == figures["test_accuracy"]
    assert found["loss"] == pytest.approx(figures["test_loss"], rel=1e-5)

    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["optimizer"] == "adamw"
    assert (out / "resume.sh").read_text().endswith("--accumulate 2 --resume\n")
    assert cli.main(argv) == 2
    assert "holds a run of 22 steps already: resume it" in capsys.readouterr().err
    assert cli.main([*argv, "--resume", "--lr", "0.1"]) == 2
    assert "holds another run: lr was 0.001 and is 0.1" in capsys.readouterr().err
    assert cli.main([*argv, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == figures


def test_the_digits_are_learnt_by_themselves(capsys, tmp_path):
    """By the recipe that stands in where neither a network nor a recipe is given."""
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] > 0.985
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["recipe"] == "lenet5_digits"


def test_images_are_as_large_and_as_colourful_as_the_network_takes_them(capsys, tmp_path):
    path = tmp_path / "fresh.safetensors"
    convert.write(path, convert.export(flax_nets.create_model("resnet20_cifar")))
    argv = ["eval", "--model", "resnet20_cifar", "--weights", str(path), "--image-size", "8"]
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 355


def test_broken_images_are_counted(capsys, tmp_path):
    small = ["--model", "resnet20_cifar", "--arguments", "depths=(1,)", "widths=(4,)"]
    for i in range(10):  # of each class the fifth and the tenth are to test on
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (9, 8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "9.png").write_bytes(b"no image")
    path = tmp_path / "fresh.safetensors"
    model = flax_nets.create_model("resnet20_cifar", num_classes=2, depths=(1,), widths=(4,))
    convert.write(path, convert.export(model))
    argv = ["eval", *small, "--weights", str(path), "--data", f"folder:{tmp_path}"]
    with pytest.warns(UserWarning, match=r"9\.png: a broken image \(cannot identify image file\)"):
        assert cli.main([*argv, "--skip-broken"]) == 0
    assert "of 3 images right" in (printed := capsys.readouterr().out)
    assert printed.endswith("; broken images skipped: 1\n")
    assert cli.main(argv) == 2
    assert "9.png: found a broken image (cannot identify" in capsys.readouterr().err


def test_eval_wants_as_many_classes_as_there_are(capsys, tmp_path):
    path = tmp_path / "seven.safetensors"
    convert.write(path, convert.export(flax_nets.create_model("lenet5", num_classes=7)))
    assert cli.main(["eval", "--model", "lenet5", "--weights", str(path)]) == 2
    assert "tells 7 classes apart, and digits has 10" in capsys.readouterr().err


RECIPE = [
    "--recipe", "resnet20_cifar", "--arguments", "depths=(1,)", "widths=(8,)", "--image-size", "16",
    "--epochs", "1", "--batch-size", "256", "--milestones", "0.5", "--dtype", "float16", "--json",
]  # fmt: skip


def scalars(folder):
    """(tag, step) -> value, of TensorBoard's files: records of a length, a sum, an event, a sum."""
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            content = content[16 + length :]
    return found


def test_a_recipe_gives_the_defaults_and_each_can_be_changed(capsys, tmp_path):
    """What a run leaves says what it was, and is enough to evaluate and to go on."""
    out = tmp_path / "run"
    assert cli.main(["train", *RECIPE, "--out", str(out)]) == 0
    figures = json.loads(capsys.readouterr().out)

    config = json.loads((out / "config.json").read_text())
    kept = {name: config["settings"][name] for name in ("recipe", "weight_decay", "milestones")}
    assert kept == dict(recipe="resnet20_cifar", weight_decay=1e-4, milestones=[0.5])
    assert set(config) == {"settings", "versions", "platform", "devices", "processes"}
    resume = shlex.split((out / "resume.sh").read_text())
    assert resume[resume.index("flax-nets") :] == [
        "flax-nets", "train", *RECIPE, "--out", str(out), "--resume",
    ]  # fmt: skip
    logged = scalars(out / "tensorboard")
    assert logged["accuracy/test", figures["step"]] == pytest.approx(figures["test_accuracy"])
    assert logged["loss/train", figures["step"]] == pytest.approx(figures["train_loss"])

    assert cli.main(["eval", "--run", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == figures["test_accuracy"]
    argv = ["train", *RECIPE, "--out", str(out), "--resume"]
    assert cli.main([*argv, "--recipe", "resnet110_cifar", "--gamma", "0.1"]) == 2
    printed = capsys.readouterr().err
    assert "holds another run: lr was 0.1 and is 0.01, model was resnet20_cifar and is" in printed


def test_a_new_head_on_a_frozen_body(capsys, tmp_path):
    """From weights with other classes; all but the head is as it was."""
    small = dict(depths=(1,), widths=(8,))
    before = convert.export(flax_nets.create_model("resnet20_cifar", num_classes=7, **small))
    convert.write(tmp_path / "seven.safetensors", before)
    argv = ["train", *RECIPE, "--out", str(tmp_path / "run"), "--recipe", "finetune_head"]
    argv += ["--model", "resnet20_cifar", "--weights", str(tmp_path / "seven.safetensors")]
    assert cli.main([*argv, "--milestones", "1"]) == 0
    after = convert.read(json.loads(capsys.readouterr().out)["weights"])
    assert after["fc.weight"].shape == (10, 8)
    assert np.array_equal(after["conv1.weight"], before["conv1.weight"])
    assert np.any(after["fc.bias"])
    assert cli.main(["eval", "--recipe", "finetune_head"]) == 2
    assert "expected --model and --weights, or --run" in capsys.readouterr().err


def test_several_processes(tmp_path):
    """They train one network, and the first of them writes it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-W", "error", "-m", "flax_nets.cli", *TRAIN, "--epochs", "1"]
    command += ["--out", str(tmp_path / "run"), "--quiet", "--json", "--num-processes", "2"]
    several = [
        subprocess.Popen(
            [*command, "--coordinator", address, "--process-id", str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for i in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=300) for process in several]
    assert [process.returncode for process in several] == [0, 0], printed
    figures = json.loads(printed[0][0].splitlines()[-1])
    assert "test_accuracy" not in printed[1][0]
    assert convert.read(figures["weights"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
