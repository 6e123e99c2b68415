"""The converter: strict accounting, dialects, verification and its command."""

import json
import logging
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import convert
import flax_nets
from benchmarks.compare import state_dict, twin
from convert import dialects, rules
from convert.__main__ import main
from flax_nets import registry
from flax_nets.create import build


@pytest.fixture
def lenet():
    return state_dict(twin(registry.resolve("lenet5")))


@pytest.fixture
def saved(lenet, tmp_path):
    path = tmp_path / "lenet.pth"
    torch.save({k: torch.tensor(v) for k, v in lenet.items()}, path)
    return path


def test_one_error_names_every_key_at_fault(lenet):
    lenet["fc1.weights"] = lenet.pop("fc1.weight")
    lenet["conv2.bias"] = lenet["conv2.bias"][:3]
    with pytest.raises(ValueError) as caught:
        flax_nets.create_model("lenet5", weights=lenet)
    message = str(caught.value)
    assert "- fc1.weight: missing (near 'fc1.weights')" in message
    assert "+ fc1.weights: unexpected" in message
    assert "! conv2.bias: has shape (3,), expected (16,)" in message
    assert "1 missing, 1 unexpected, 1 mis-shaped" in message


def test_the_error_names_a_network_that_is_more_likely(lenet):
    with pytest.raises(ValueError, match=r"one of lenet5 \(native names, 100\.0%\)"):
        flax_nets.create_model("resnet20_cifar", weights=lenet)


def test_nothing_is_changed_unless_all_fits(lenet):
    model = flax_nets.create_model("lenet5")
    before = convert.export(model)
    lenet["fc2.bias"] = lenet["fc2.bias"][:3]
    with pytest.raises(ValueError, match=r"fc2\.bias"):
        convert.load(model, lenet)
    after = convert.export(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_not_strict_loads_what_there_is_and_says_so(lenet, caplog):
    del lenet["fc1.bias"]
    lenet["extra"] = np.zeros(3)
    model = flax_nets.create_model("lenet5")
    with pytest.raises(ValueError, match="1 missing, 1 unexpected"):
        convert.load(model, lenet)
    with caplog.at_level(logging.WARNING):
        convert.load(model, lenet, strict=False)
    assert "fc1.bias is missing" in caplog.text
    assert "extra is not used" in caplog.text
    np.testing.assert_array_equal(convert.export(model)["conv1.weight"], lenet["conv1.weight"])


def test_a_checkpoint_brings_its_own_classes_channels_and_dtype():
    spec = registry.resolve("lenet5")
    ours = state_dict(twin(spec, num_classes=4, in_channels=2))
    ours = {k: v.astype(np.float16) for k, v in ours.items()}
    model = flax_nets.create_model("lenet5", weights=ours)
    assert model.spec.arguments["num_classes"] == 4
    assert model(jnp.zeros((1, 32, 32, 2))).dtype == jnp.float16
    wide = flax_nets.create_model("lenet5", weights=ours, param_dtype=jnp.float32)
    assert wide.conv1.kernel.dtype == jnp.float32


def test_another_head_and_other_channels_on_request(lenet, caplog):
    with caplog.at_level(logging.WARNING):
        model = flax_nets.create_model("lenet5", weights=lenet, num_classes=3, in_channels=4)
    assert "fresh" in caplog.text
    assert "in_channels=4" in caplog.text
    assert model(jnp.zeros((1, 32, 32, 4))).shape == (1, 3)
    kernel = convert.export(model)["conv1.weight"]
    np.testing.assert_allclose(kernel, np.repeat(lenet["conv1.weight"], 4, 1) / 4)
    headless = flax_nets.create_model("lenet5", weights=lenet, num_classes=0)
    assert headless(jnp.zeros((1, 32, 32, 1))).shape == (1, 84)


def test_counters_are_kept_and_may_be_absent():
    spec = registry.resolve("resnet20_cifar").with_arguments(depths=(1, 1, 1))
    tensors = state_dict(twin(spec))
    model = flax_nets.create_model("resnet20_cifar", weights=tensors, depths=(1, 1, 1))
    back = convert.export(model)["bn1.num_batches_tracked"]
    assert (back, back.dtype, back.shape) == (7, np.int64, ())
    without = {k: v for k, v in tensors.items() if "num_batches" not in k}
    model = flax_nets.create_model("resnet20_cifar", weights=without, depths=(1, 1, 1))
    assert model.bn1.count[...] == 0


def test_values_that_are_not_finite_load_with_a_warning(lenet, caplog):
    lenet["fc1.bias"] = lenet["fc1.bias"].copy()
    lenet["fc1.bias"][:2] = np.nan, np.inf
    with caplog.at_level(logging.WARNING):
        model = flax_nets.create_model("lenet5", weights=lenet)
    assert "2 values are NaN or infinite, in fc1.bias" in caplog.text
    np.testing.assert_array_equal(convert.export(model)["fc1.bias"], lenet["fc1.bias"])


def test_large_values_are_finite_though_their_sum_is_not(lenet, caplog):
    lenet["fc1.bias"] = np.full_like(lenet["fc1.bias"], np.finfo(lenet["fc1.bias"].dtype).max)
    with caplog.at_level(logging.WARNING):
        flax_nets.create_model("lenet5", weights=lenet)
    assert not caplog.text


def test_tensors_of_all_sizes_arrive_in_memory_of_their_own():
    def numbers(entry):
        kind = np.int64 if entry.rule.flax == "count" else np.float32
        return np.arange(math.prod(entry.torch_shape), dtype=kind).reshape(entry.torch_shape)

    network = build(registry.resolve("resnet18"))
    tensors = {entry.key: numbers(entry) for entry in rules.entries(network)}
    convert.load(network, tensors)
    for value in tensors.values():
        value[...] = -1
    exported = convert.export(network)
    for entry in rules.entries(network):
        np.testing.assert_array_equal(exported[entry.key], numbers(entry))


def test_a_tree_of_gradients_gets_its_pytorch_names(lenet):
    model = flax_nets.create_model("lenet5", weights=lenet)
    _, params, _ = flax_nets.functional(model)
    exported = convert.export(params)
    assert set(exported) == set(lenet)
    for key, value in lenet.items():
        np.testing.assert_array_equal(exported[key], value)


def test_rules_are_by_layer_type():
    """No rule knows a network: only dialects, which rename, may name one."""
    assert all(issubclass(cls, object) and cls.__module__ != "convert" for cls in rules.RULES)
    text = pathlib.Path(rules.__file__).read_text()
    named = [name for name in flax_nets.list_models() if name in text]
    assert named == []
    by_leaf = {}
    for row in rules.RULES.values():
        for rule in row:
            key = (rule.flax, len(rule.layout.axes or ()))
            assert by_leaf.setdefault(key, (rule.torch, rule.layout)) == (rule.torch, rule.layout)


@pytest.mark.parametrize("dialect", dialects.all_dialects(), ids=lambda d: f"{d.name}-{d.file}")
def test_dialects_work_in_both_directions(dialect):
    for native, foreign in dialect.renames:
        holes = set(re.findall(r"{(\w+)}", native + foreign))
        values = {
            hole: "weight" if hole == "rest" else i + 3 for i, hole in enumerate(sorted(holes))
        }
        theirs = dialect.prefix + foreign.format(**values)
        assert dialect.from_native(native.format(**values)) == theirs
        assert dialect.to_native(theirs) == native.format(**values)
        assert dialect.to_native(foreign.format(**values)) == native.format(**values)


def test_a_name_in_common_makes_no_dialect():
    spec = registry.resolve("resnet18")
    native = [entry.key for entry in rules.entries(build(spec))]
    other = [entry.key for entry in rules.entries(build(registry.resolve("squeezenet1_1")))]
    theirs = dialects.by_name("huggingface", spec)
    assert {theirs.to_native(key) for key in other} & set(native) == {"fc.weight", "fc.bias"}
    assert dialects.recognise(other, native, spec).name == "native"


def test_an_unknown_dialect_names_the_known():
    model = flax_nets.create_model("vit_tiny_patch16_224", depth=1, image_size=32)
    with pytest.raises(ValueError, match=r"no dialect 'tim'.*native.*timm"):
        convert.export(model, dialect="tim")


def test_verify_finds_equality_and_the_stage_that_differs(saved, lenet):
    report = convert.verify("lenet5", saved)
    assert report
    assert report.output_error <= 1e-12
    assert report.stages[0].name == "conv1"
    assert str(report).splitlines()[-1].startswith("equal: every stage within 1e-12")
    model = flax_nets.create_model("lenet5", weights=saved)
    lenet["conv2.weight"] = lenet["conv2.weight"].copy()
    lenet["conv2.weight"][3, 2, 1, 0] += 1e-3
    report = convert.verify(model, lenet)
    assert not report
    assert report.first_difference == "conv2"
    assert [key for key, _ in report.changed] == ["conv2.weight"]
    assert str(report).splitlines()[-1].startswith("NOT equal: first at conv2, error ")
    assert report.to_dict()["first_difference"] == "conv2"


@pytest.mark.parametrize(
    ("key", "stage"),
    [
        ("layer2.0.conv2.weight", "layer2.0"),
        ("layer3.0.bn1.running_var", "layer3.0"),
        ("conv1.weight", "conv1"),
        ("fc.bias", "fc"),
    ],
)
def test_one_perturbed_weight_is_found_in_its_stage(key, stage):
    """The network of one checkpoint against another that differs in one number."""
    spec = registry.resolve("resnet20_cifar").with_arguments(depths=(1, 1, 1))
    original = state_dict(twin(spec))
    perturbed = original | {key: original[key].copy()}
    perturbed[key].flat[1] *= 1 + 1e-6
    model = flax_nets.create_model("resnet20_cifar", weights=perturbed, depths=(1, 1, 1))
    report = convert.verify(
        model, original, images=np.random.default_rng(1).normal(size=(2, 8, 8, 3))
    )
    assert not report
    assert report.first_difference == stage
    assert [name for name, _ in report.changed] == [key]
    after = [s.name for s in report.stages].index(stage)
    assert all(s.error <= 1e-12 for s in report.stages[:after])


def test_command_converts_and_verifies(saved, lenet, tmp_path, capsys):
    out, plot = tmp_path / "out.safetensors", tmp_path / "errors.png"
    assert main([str(saved), "--verify", "--plot", str(plot), str(out)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith(f"wrote {out}: 0.5 MiB, 10 tensors, native names")
    assert text.splitlines()[-1].startswith("equal: ")
    assert plot.read_bytes().startswith(b"\x89PNG")
    back = convert.read(out)
    assert all(back[k].tobytes() == v.tobytes() for k, v in lenet.items())
    lenet["fc1.weight"] = lenet["fc1.weight"] * (1 + 1e-9)
    convert.write(tmp_path / "other.pth", lenet)
    against = ["--verify", "--against", str(tmp_path / "other.pth"), "--json"]
    assert main([str(out), str(tmp_path / "no.npz"), "--model", "lenet5", *against]) == 1
    figures = json.loads(capsys.readouterr().out)
    assert figures["verify"]["equal"] is False
    assert figures["verify"]["first_difference"] == "fc1"
    assert not (tmp_path / "no.npz").exists()


def test_command_writes_shards_trees_and_programs(saved, lenet, tmp_path, capsys):
    narrow = {k: v.astype(np.float32) for k, v in lenet.items()}
    torch.save({"model": {}, "model_ema": {k: torch.tensor(v) for k, v in narrow.items()}}, saved)
    shards, folder = tmp_path / "a.safetensors", tmp_path / "a.orbax"
    program = tmp_path / "a.stablehlo"
    assert main([str(saved), str(shards), "--ema", "--shard-size", "100KB"]) == 0
    assert main([str(shards), str(folder), "--json"]) == 0  # by the name of what is not one file
    assert main([str(folder), str(program), "--num-classes", "3"]) == 0
    assert f"wrote {program}: 0.2 MiB\n" in capsys.readouterr().out
    for back in (convert.read(shards), convert.read(folder)):
        assert all(back[k].tobytes() == v.tobytes() for k, v in narrow.items())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{saved}", "--model", "lenet6"], "lenet5"),
        (["{saved}", "--model", "resnet18"], "missing"),
        (["{dir}/nothing.pth", "--model", "lenet5"], "nothing.pth"),
        (["{dir}/text.pth", "--model", "lenet5"], "text.pth"),
        (["{dir}/short.pth", "--model", "lenet5"], "short.pth"),
        (["{saved}", "{dir}/out.h5", "--model", "lenet5"], ".safetensors"),
        (["{dir}/text.pth", "{dir}/out.h5"], "suffix '.h5'; expected one of .npz, .onnx, .orbax"),
        (["{saved}", "{dir}/none/out.npz"], "there is no directory"),
        (["{saved}", "{dir}/out.onnx", "--to", "timm"], "will hold a network of ours"),
        (["{saved}", "{dir}/out.npz", "--shard-size", "1MB"], "is for .safetensors"),
        (["{saved}", "{dir}/out.safetensors", "--shard-size", "1 apple"], "'1 apple'"),
        (["{saved}", "--plot", "{dir}/a.png"], "--plot goes with --verify"),
        (["{saved}", "--model", "lenet5", "--verify", "--plot", "{dir}/a.txt"], "a picture's name"),
        (["{saved}", "--ema"], "averaged weights"),
        (["{dir}/head.npz"], "fits no network entirely; likely ones: "),
        (["{saved}", "--modle", "lenet5"], "unrecognized arguments: --modle"),
        (["inspect", "{dir}/text.pth"], "text.pth"),
        (["inspect"], "required: SRC"),
        (["{saved}", "{dir}/out.npz", "--model", "lenet5", "--to", "keras"], "native"),
    ],
)
def test_command_refuses_clearly(argv, expected, saved, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no checkpoint at all")
    (tmp_path / "short.pth").write_bytes(saved.read_bytes()[:1000])
    convert.write(tmp_path / "head.npz", {"fc2.bias": np.zeros(10)})
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([a.format(saved=saved, dir=tmp_path) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert expected in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "nothing half-written"
