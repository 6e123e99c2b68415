"""Checkpoints of transformers and of vit-pytorch; image sizes of Vision Transformers."""

import json
import logging
import re
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
import vit_pytorch
from timm.layers.pos_embed import resample_abs_pos_embed
from torchvision.models.vision_transformer import interpolate_embeddings

import convert
import flax_nets
from benchmarks.compare import (
    GRADIENT,
    OUTPUT,
    error,
    flax_pass,
    nchw,
    quick_jit,
    randomise,
    state_dict,
    torch_pass,
    twin,
    worst_errors,
)
from convert import dialects, positions
from flax_nets import registry

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VIT = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=32,
    patch_size=8,
    num_labels=5,
)
RESNET = dict(embedding_size=6, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5)
# The name here, the class there, its config, the image's size (0: the shapes tell all).
MODELS = {
    "vit": ("vit_b_16", "ViTForImageClassification", VIT, 32),
    "vit model": ("vit_b_16", "ViTModel", VIT | dict(qkv_bias=False, layer_norm_eps=0.1), 32),
    "resnet": (
        "resnet50",
        "ResNetForImageClassification",
        RESNET | dict(downsample_in_bottleneck=True, downsample_in_first_stage=True),
        64,
    ),
    "resnet model": (
        "resnet50",
        "ResNetModel",
        RESNET | dict(layer_type="basic", embedding_size=8, hidden_sizes=[6, 8], num_channels=2),
        32,
    ),
    "mobilenet v1": (
        "mobilenetv1_100",
        "MobileNetV1ForImageClassification",
        dict(depth_multiplier=0.25, num_labels=1001),
        33,
    ),
    "mobilenet v1 model": (
        "mobilenetv1_100",
        "MobileNetV1Model",
        dict(depth_multiplier=0.3, min_depth=10),
        0,
    ),
    "mobilenet v2": (
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        dict(depth_multiplier=0.35, num_labels=7),
        33,
    ),
    "mobilenet v2 model": (
        "mobilenet_v2",
        "MobileNetV2Model",
        dict(depth_multiplier=0.3, depth_divisible_by=4, finegrained_output=False),
        0,
    ),
}


def library_model(kind, settings):
    config = getattr(transformers, re.sub("For.*|Model$", "Config", kind))(**settings)
    torch.manual_seed(0)
    return randomise(getattr(transformers, kind)(config).double()).eval()


def images(side, channels=3):
    return np.random.default_rng(0).normal(size=(2, side, side, channels))


def flax_output(model, x):
    apply, params, state = flax_nets.functional(model)
    return quick_jit(apply)(params, state, jnp.asarray(x))[0]


def torch_output(model, x, **arguments):
    with torch.no_grad():
        output = model(torch.tensor(nchw(x)), **arguments)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if "logits" in output else output.pooler_output.flatten(1)


def assert_goes_back(model, dialect, theirs):
    """Bit-identical, into the library's own class."""
    exported = convert.export(model, dialect)
    wanted = theirs.state_dict()
    assert set(exported) == set(wanted)
    for key, value in wanted.items():
        assert exported[key].dtype == value.numpy().dtype
        assert exported[key].shape == tuple(value.shape)
        assert exported[key].tobytes() == value.numpy().tobytes()
    theirs.load_state_dict({k: torch.tensor(v) for k, v in exported.items()}, strict=True)


@pytest.mark.parametrize("row", MODELS)
def test_transformers_models_are_the_same_function(row, tmp_path):
    name, kind, settings, side = MODELS[row]
    theirs = library_model(kind, settings)
    theirs.save_pretrained(tmp_path)
    ours = flax_nets.create_model(name, weights=tmp_path)
    assert_goes_back(ours, "huggingface" if "For" in kind else "huggingface-model", theirs)
    if side:
        x = images(side, settings.get("num_channels", 3))
        assert error(flax_output(ours, x), torch_output(theirs, x)) <= OUTPUT


@pytest.fixture(scope="module")
def vit():
    return library_model("ViTForImageClassification", VIT)


def written(vit, form, directory):
    """One of the forms in which such a checkpoint lies on a disk -> what to load."""
    if form in ("sharded", "single", "file"):
        vit.save_pretrained(directory, max_shard_size="10KB" if form == "sharded" else "1GB")
        assert (directory / "model.safetensors.index.json").exists() == (form == "sharded")
        return directory / "model.safetensors" if form == "file" else directory
    vit.config.save_pretrained(directory)
    torch.save(vit.state_dict(), directory / "pytorch_model.bin")
    return directory


@pytest.mark.parametrize("form", ["single", "sharded", "file", "bin"])
def test_every_form_of_file_loads(form, vit, tmp_path):
    ours = flax_nets.create_model("vit_b_16", weights=written(vit, form, tmp_path))
    assert_goes_back(ours, "huggingface", vit)
    if form != "bin":  # transformers' files keep the names from before its version 5
        on_disk = convert.read(tmp_path)
        assert set(convert.export(ours, "huggingface-v4")) == set(on_disk)
    assert ours.spec.arguments["norm_eps"] == 1e-12
    assert ours.spec.arguments["num_heads"] == 2


OVERRIDES = dict(depth=1, width=16, num_heads=2, mlp_dim=24, patch_size=8)


@pytest.mark.parametrize("source", ["state dict", "file", "another's config"])
def test_without_a_config_the_library_s_defaults_stand_in(source, vit, tmp_path, caplog):
    weights = state_dict(vit)
    if source != "state dict":
        convert.write(tmp_path / "vit.safetensors", weights)
        weights = tmp_path / "vit.safetensors"
    if source == "another's config":
        (tmp_path / "config.json").write_text('{"model_type": "bert", "layer_norm_eps": 0.1}')
    with caplog.at_level(logging.WARNING):
        ours = flax_nets.create_model("vit_b_16", weights=weights, **OVERRIDES)
    assert "defaults stand in (norm_eps=1e-12)" in caplog.text
    assert error(flax_output(ours, images(32)), torch_output(vit, images(32))) <= OUTPUT


def test_mobilenets_without_a_config():
    for name, momentum in (("mobilenetv1_025", 0.9997), ("mobilenetv2_035", 0.997)):
        spec = registry.resolve(name)
        tensors = convert.export(flax_nets.create_model(name, num_classes=1001), "huggingface")
        made, _ = convert.prepare(spec, tensors, {})
        had = {k: made.arguments[k] for k in ("same", "eps", "momentum", "num_classes")}
        assert had == dict(same=True, eps=1e-3, momentum=momentum, num_classes=1001)
        kept, _ = convert.prepare(spec, tensors, dict(same=False))
        assert kept.with_arguments(same=False).arguments["eps"] == 1e-3


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("resnet50", dict(hidden_act="gelu")),
        ("resnet50", dict(layer_type="preact")),
        ("resnet50", dict(hidden_sizes=[18, 32, 64, 128])),
        ("resnet50", dict(depths=[1, 2])),
        ("resnet50", dict(embedding_size="64")),
        ("vit_b_16", dict(hidden_act="quick_gelu")),
        ("vit_b_16", dict(image_size=[224, 192])),
        ("vit_b_16", dict(layer_norm_eps=None)),
        ("vit_b_16", dict(num_hidden_layers=0)),
        ("vit_b_16", dict(pooler_act="relu")),
        ("mobilenetv1_100", dict(hidden_act="relu")),
        ("mobilenetv1_100", dict(tf_padding=1)),
        ("mobilenet_v2", dict(expand_ratio=4.0)),
        ("mobilenet_v2", dict(output_stride=16)),
        ("mobilenet_v2", dict(first_layer_is_expansion=False)),
        ("mobilenet_v2", dict(min_depth=18)),
    ],
    ids=str,
)
def test_a_setting_that_ours_lacks_is_refused_by_name(name, setting):
    dialect = dialects.by_name("huggingface", registry.resolve(name))
    shapes = {"heads.pre_logits.weight": (4, 4)}
    dialect.configure({"model_type": dialect.model_type}, shapes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{next(iter(setting))}"):
        dialect.configure(setting, shapes)


@pytest.mark.parametrize(
    ("name", "setting", "arguments"),
    [
        ("mobilenetv1_100", dict(tf_padding=False, layer_norm_eps=1), dict(same=False, eps=1.0)),
        ("mobilenetv1_100", dict(depth_multiplier=0.5), dict(width=0.5, divisor=8)),
        ("mobilenet_v2", dict(tf_padding=False, layer_norm_eps=1), dict(same=False, eps=1.0)),
        ("mobilenet_v2", dict(depth_multiplier=1.4), dict(width=1.4, divisor=8)),
        ("resnet50", dict(), dict(block="bottleneck", stem_width=None, first_stride=1)),
        ("resnet50", dict(layer_type="basic"), dict(widths=(256, 512, 1024, 2048), stem_width=64)),
        ("vit_b_16", dict(image_size=[96, 96]), dict(image_size=96, mlp_dim=None)),
    ],
    ids=str,
)
def test_settings_become_arguments(name, setting, arguments):
    found = dialects.by_name("huggingface", registry.resolve(name)).configure(setting, {})
    assert arguments.items() <= found.items()


def test_a_refusal_and_a_damaged_config_reach_the_caller(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        flax_nets.create_model("vit_b_16", weights=tmp_path)
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(convert.CheckpointError, match=r"config\.json.*damaged config"):
            flax_nets.create_model("vit_b_16", weights=tmp_path)


PACKAGE = dict(
    image_size=32, patch_size=8, num_classes=5, dim=16, depth=1, heads=2, mlp_dim=24, dim_head=4
)
# Names of vit-pytorch before 1.4, whose blocks have their norms outside, from those of today.
OLDER = (
    (r"\.0\.to_", ".0.fn.to_"),
    (r"\.1\.net\.0\.", ".1.norm."),
    (r"\.1\.net\.1\.", ".1.fn.net.0."),
    (r"\.1\.net\.4\.", ".1.fn.net.3."),
    (r"^mlp_head\.", "mlp_head.1."),
    (r"^transformer\.norm\.", "mlp_head.0."),
)


def older(tensors):
    renamed = {}
    for key, value in tensors.items():
        for pattern, name in OLDER:
            key = re.sub(pattern, name, key)
        renamed[key] = value[None] if key in ("cls_token", "pos_embedding") else value
    return renamed


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_pytorch_is_the_same_function(pool):
    theirs = randomise(vit_pytorch.ViT(**PACKAGE, pool=pool).double()).eval()
    ours = flax_nets.create_model("vit_b_16", weights=state_dict(theirs), **OVERRIDES)
    assert error(flax_output(ours, images(32)), torch_output(theirs, images(32))) <= OUTPUT
    assert_goes_back(ours, "vit-pytorch", theirs)
    native = flax_nets.create_model("vit_b_16", weights=convert.export(ours), **OVERRIDES)
    assert set(convert.export(native)) == set(convert.export(ours))


@pytest.mark.parametrize("name", ["vit_b_16", "vit_h_14"])
def test_the_shapes_of_vit_pytorch_show_all_sizes(name, caplog):
    sizes = dict(image_size=64, patch_size=32, dim=24, depth=2, heads=3, mlp_dim=40)
    theirs = randomise(vit_pytorch.ViT(**sizes, num_classes=5).double()).eval()
    with caplog.at_level(logging.WARNING):
        ours = flax_nets.create_model(name, weights=state_dict(theirs))
    assert "width=24, depth=2, num_heads=3, mlp_dim=40, patch_size=32, as vit-py" in caplog.text
    assert error(flax_output(ours, images(64)), torch_output(theirs, images(64))) <= OUTPUT
    assert_goes_back(ours, "vit-pytorch", theirs)
    assert [match.fits for match in convert.identify(state_dict(theirs))] == [True]
    with pytest.raises(ValueError, match=r"shape \(192, 24\)|unexpected"):
        flax_nets.create_model(name, weights=state_dict(theirs), width=48, num_heads=3)


@pytest.mark.parametrize("channels", [1, 12])
def test_patches_of_vit_pytorch_have_the_channels_asked_for(channels):
    theirs = vit_pytorch.ViT(**PACKAGE | dict(patch_size=16), channels=channels)
    asked = {} if channels == 1 else dict(in_channels=12)
    ours = flax_nets.create_model("vit_b_16", weights=state_dict(theirs), num_heads=2, **asked)
    assert ours.spec.arguments["in_channels"] == channels
    assert_goes_back(ours, "vit-pytorch", theirs)


@pytest.mark.parametrize("version", ["1.16", "1.2", "0.40"])
def test_older_vit_pytorch_is_the_same_function(version):
    theirs = randomise(vit_pytorch.ViT(**PACKAGE).double()).eval()
    tensors = state_dict(theirs)
    if version == "1.16":
        leading = ("cls_token", "pos_embedding")
        tensors = {k: v[None] if k in leading else v for k, v in tensors.items()}
    else:
        tensors = older(tensors)
    if version == "0.40":
        theirs.to_patch_embedding[1] = theirs.to_patch_embedding[3] = torch.nn.Identity()
        tensors = {k: v for k, v in tensors.items() if not re.match(r"to_patch.*\.[13]\.", k)}
        tensors = {re.sub(r"(to_patch\w+)\.2", r"\1.1", k): v for k, v in tensors.items()}
    ours = flax_nets.create_model("vit_b_16", weights=tensors, **OVERRIDES)
    assert error(flax_output(ours, images(32)), torch_output(theirs, images(32))) <= OUTPUT
    exported = convert.export(ours, f"vit-pytorch-{version}")
    assert {k: v.tobytes() for k, v in exported.items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in tensors.items()}


def test_the_number_of_heads_is_the_package_s_default_unless_given(caplog):
    theirs = vit_pytorch.ViT(**PACKAGE | dict(dim=64, heads=4, dim_head=64))
    overrides = OVERRIDES | dict(width=64)
    del overrides["num_heads"]
    spec = registry.resolve("vit_b_16").with_arguments(num_heads=1)
    with caplog.at_level(logging.WARNING):
        made, _ = convert.prepare(spec, state_dict(theirs), overrides)
    assert "num_heads=4" in caplog.text
    assert made.arguments["num_heads"] == 4


@pytest.mark.parametrize(
    ("network", "overrides", "expected"),
    [
        (vit_pytorch.SimpleViT(**PACKAGE), {}, "SimpleViT"),
        (vit_pytorch.ViT(**PACKAGE | dict(heads=1, dim_head=16)), {}, "no output projection"),
        (older(state_dict(vit_pytorch.ViT(**PACKAGE))), dict(pool="mean"), "follows the pooling"),
        (
            {
                re.sub(r"(layers\.\d+\.\d+)\.", r"\1.fn.", k): v
                for k, v in older(state_dict(vit_pytorch.ViT(**PACKAGE))).items()
            },
            {},
            r"before 0\.10",
        ),
    ],
    ids=["simple", "one head", "mean before 1.4", "before 0.10"],
)
def test_vit_pytorch_networks_that_are_not_ours_are_refused_by_name(network, overrides, expected):
    tensors = network if isinstance(network, dict) else state_dict(network)
    with pytest.raises(ValueError, match=expected):
        flax_nets.create_model("vit_b_16", weights=tensors, **OVERRIDES | overrides)


@pytest.mark.parametrize("sides", [(14, 24), (14, 7), (7, 3), (1, 5), (4, 1), (2, 3)], ids=str)
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("torchvision", dict(align_corners=True)),
        ("timm", dict(antialias=True)),
        ("transformers", dict(align_corners=False)),
    ],
)
def test_positions_are_resized_as_pytorch_interpolates(method, arguments, sides):
    old, new = sides
    held = np.random.default_rng(0).normal(size=(1, 2 + old**2, 5))
    grid = torch.tensor(held[:, 2:]).reshape(1, old, old, 5).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(new, new), mode="bicubic", **arguments)
    resized = positions.resize(held, 2, new, method)
    np.testing.assert_array_equal(resized[:, :2], held[:, :2])
    assert error(resized[:, 2:], wanted.permute(0, 2, 3, 1).reshape(1, -1, 5)) <= OUTPUT
    assert positions.resize(held.astype(np.float16), 2, new, method).dtype == np.float16


TINY = dict(patch_size=8, depth=1, width=24, num_heads=2, mlp_dim=24, num_classes=5)


def test_another_image_size_as_torchvision_does_it(caplog):
    theirs = twin(registry.resolve("vit_b_16"), image_size=32, **TINY)
    with caplog.at_level(logging.WARNING):
        ours = flax_nets.create_model("vit_b_16", weights=state_dict(theirs), **TINY, image_size=56)
    assert "positions are resized from 4x4 to 7x7 as torchvision does" in caplog.text
    wanted = interpolate_embeddings(56, 8, OrderedDict(theirs.state_dict()))
    exported = convert.export(ours)
    assert set(exported) == set(wanted)
    assert max(error(exported[key], wanted[key]) for key in wanted) <= OUTPUT
    with pytest.raises(ValueError, match="image_size=55 is no multiple of patch_size=8"):
        flax_nets.create_model("vit_b_16", weights=state_dict(theirs), **TINY, image_size=55)


def test_another_image_size_as_timm_does_it(monkeypatch):
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", img_size=96, depth=1)
    weights = state_dict(randomise(theirs.double()))
    arguments = dict(depth=1, image_size=64)
    name = "deit_tiny_distilled_patch16_224"
    ours = flax_nets.create_model(name, weights=weights, **arguments)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it interpolates in float32
    wanted = resample_abs_pos_embed(theirs.pos_embed.detach(), [4, 4], num_prefix_tokens=2)
    assert error(convert.export(ours, "timm")["pos_embed"], wanted) <= OUTPUT


def test_another_image_size_as_transformers_does_it(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    ours = flax_nets.create_model("vit_b_16", weights=tmp_path, image_size=48)
    x = images(48)
    wanted = torch_output(vit, x, interpolate_pos_encoding=True)
    assert error(flax_output(ours, x), wanted) <= OUTPUT


def test_positions_tell_the_image_size_unless_they_make_no_square(caplog):
    theirs = state_dict(twin(registry.resolve("vit_b_16"), image_size=32, **TINY))
    with caplog.at_level(logging.WARNING):
        ours = flax_nets.create_model("vit_b_16", weights=theirs, **TINY)
    assert ours.image_size == 32
    assert "image_size=32, as the number of its positions shows" in caplog.text
    theirs["encoder.pos_embedding"] = theirs["encoder.pos_embedding"][:, :-1]
    for given in ({}, dict(image_size=64)):
        with pytest.raises(ValueError, match=r"pos_embedding: has shape \(1, 16, 24\)"):
            flax_nets.create_model("vit_b_16", weights=theirs, **TINY, **given)


def test_native_names_are_exported_under_the_name_of_their_library():
    model = flax_nets.create_model("resnet18", depths=(1, 1), widths=(4, 8), num_classes=3)
    native = convert.export(model)
    _, params, _ = flax_nets.functional(model)
    for library in ("torchvision", "timm"):
        assert set(convert.export(model, library)) == set(native)
        assert set(convert.export(params, library)) == set(convert.export(params))
    assert set(convert.load(model, native, dialect="timm").spec.arguments)
    with pytest.raises(ValueError, match="native, torchvision, timm, huggingface"):
        convert.export(model, "keras")
    for name, library in (("lenet5", "torchvision"), ("resnet20_cifar", "huggingface")):
        with pytest.raises(ValueError, match=f"{name} has no dialect '{library}'"):
            dialects.by_name(library, registry.resolve(name))


def test_normalised_patches_train_alike():
    arguments = TINY | dict(image_size=16, patch_norm=True, attention_width=16, pool="all")
    theirs = twin(registry.resolve("vit_b_16"), **arguments)
    ours = flax_nets.create_model("vit_b_16", weights=state_dict(theirs), **arguments)
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    worst = worst_errors(flax_pass(ours, x, True), torch_pass(theirs, x, True))
    assert worst["outputs"] <= OUTPUT
    assert max(worst["gradients"], worst["input_gradient"]) <= GRADIENT


@pytest.mark.parametrize(
    "arguments",
    [
        dict(class_token=False),
        dict(class_token=False, pool="mean", distilled=True),
        dict(pool="max"),
        dict(attention_width=16, num_heads=3),
    ],
    ids=str,
)
def test_vit_arguments_that_do_not_go_together(arguments):
    with pytest.raises(ValueError, match=re.escape(next(reversed(arguments)))):
        flax_nets.create_model("vit_b_16", depth=1, **arguments)
