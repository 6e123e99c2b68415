"""Images in: equal to the installed libraries' transforms, bit for bit."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import convert
import flax_nets
from flax_nets import weights
from flax_nets.preprocess import Preprocess, beside, for_model, for_weights, open_image

SIZES = [(61, 40), (40, 61), (33, 33), (200, 31), (24, 24), (20, 9), (45, 44)]  # width, height


def picture(width, height, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def nhwc(tensor):
    return tensor.permute(1, 2, 0).numpy()[None]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop", "resize"), [(24, 27), (24, 24), (31, 16)])
def test_as_torchvision(crop, resize, interpolation):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    theirs = ImageClassification(
        crop_size=crop, resize_size=resize, interpolation=InterpolationMode(interpolation)
    )
    ours = Preprocess(crop, resize, interpolation=interpolation)
    for size in SIZES:
        image = picture(*size)
        np.testing.assert_array_equal(ours(image), nhwc(theirs(image)))


@pytest.mark.parametrize("size", [24, (24, 24), (20, 30)], ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_as_timm(size, crop_pct, crop_mode):
    from timm.data.transforms_factory import transforms_imagenet_eval

    options = dict(crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic")
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    theirs = transforms_imagenet_eval(size, mean=mean, std=std, **options)
    ours = Preprocess(size, mean=mean, std=std, **options)
    for given in SIZES:
        image = picture(*given)
        np.testing.assert_array_equal(ours(image), nhwc(theirs(image)))


TORCHVISION = ["resnet50.IMAGENET1K_V2", "vit_b_16.IMAGENET1K_SWAG_E2E_V1"]
TORCHVISION += ["vgg16.IMAGENET1K_FEATURES", "inception_v3.IMAGENET1K_V1"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_table_s_presets_of_torchvision(name):
    import torchvision

    model, tag = name.split(".")
    theirs = torchvision.models.get_model_weights(model)[tag].transforms()
    image = picture(640, 427)
    np.testing.assert_array_equal(for_weights(model, tag)(image), nhwc(theirs(image)))


@pytest.mark.parametrize("test_size", [False, True])
@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k"])
def test_the_table_s_presets_of_timm(name, test_size):
    import timm

    config = timm.get_pretrained_cfg(name).to_dict()
    config = timm.data.resolve_data_config(pretrained_cfg=config, use_test_size=test_size)
    theirs = timm.data.create_transform(**config)
    image = picture(500, 353)
    ours = for_weights(name.partition(".")[0], f"timm/{name}", test_size)
    np.testing.assert_array_equal(ours(image), nhwc(theirs(image)))


PROCESSORS = {
    "ViT": dict(size={"height": 24, "width": 20}, resample=2),
    "ConvNext": dict(size={"shortest_edge": 24}, crop_pct=0.8, image_mean=[0.4, 0.5, 0.6]),
    "MobileNetV1": dict(size={"shortest_edge": 29}, crop_size={"height": 20, "width": 24}),
    "MobileNetV2": dict(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24}),
    "DeiT": dict(size={"height": 29, "width": 29}, crop_size={"height": 24, "width": 24}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_as_transformers_by_the_configuration_beside_the_weights(kind, tmp_path):
    import transformers

    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**PROCESSORS[kind])
    theirs.save_pretrained(tmp_path)
    ours = beside(tmp_path / "model.safetensors")
    for size in [(61, 40), (40, 61), (33, 33), (90, 31)]:
        image = picture(*size)
        expected = np.moveaxis(theirs(image, return_tensors="np")["pixel_values"], 1, -1)
        np.testing.assert_allclose(ours(image), expected, rtol=0, atol=1e-6)


def test_timm_s_configuration_beside_the_weights(tmp_path):
    config = {"input_size": [3, 20, 20], "crop_pct": 0.8, "interpolation": "bicubic"}
    config |= {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "border"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    half = (0.5, 0.5, 0.5)
    expected = Preprocess(20, 25, crop_mode="border", interpolation="bicubic", mean=half, std=half)
    assert beside(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIP"}')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: the image processor 'CLIP'"):
        beside(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: no JSON"):
        beside(tmp_path)


def test_what_an_image_can_be(tmp_path):
    pre = Preprocess(16)
    image = picture(30, 20)
    image.save(tmp_path / "image.png")
    expected = pre(image)
    assert expected.shape == (1, 16, 16, 3)
    assert expected.dtype == np.float32
    array = np.asarray(image)
    for same in (str(tmp_path / "image.png"), tmp_path / "image.png", array, [image], array[None]):
        np.testing.assert_array_equal(pre(same), expected)
    several = pre([image, picture(50, 50), array])
    np.testing.assert_array_equal(several[[0, 2]], np.concatenate([expected, expected]))
    assert pre([]).shape == (0, 16, 16, 3)
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        other = image.convert(mode)
        np.testing.assert_array_equal(pre(other), pre(other.convert("RGB")))
    grey = Preprocess(16, mean=(0.5,), std=(0.25,))
    np.testing.assert_array_equal(grey(image), grey(np.asarray(image.convert("L"))[:, :, None]))
    assert grey(image).shape == (1, 16, 16, 1)
    read_only = torch.from_numpy(array.copy())
    np.testing.assert_array_equal(pre(read_only), expected)


def test_copies_and_what_is_printed():
    pre = Preprocess(224, crop_pct=0.9, mean=[0.5] * 3)
    assert (pre.image_size, pre.resize_size, pre.shape) == ((224, 224), (248, 248), (224, 224, 3))
    assert dataclasses.replace(pre, interpolation="bicubic").resize_size == (248, 248)
    assert eval(repr(pre)) == pre
    assert hash(pre) == hash(eval(repr(pre)))


def test_mistakes(tmp_path):
    for options, message in [
        (dict(image_size=0), "image_size: got 0"),
        (dict(image_size=(1, 2, 3)), r"image_size: got \(1, 2, 3\)"),
        (dict(crop_pct=1.5), "crop_pct: got 1.5"),
        (dict(resize_size=256, crop_pct=0.9), "say the same thing: give one"),
        (dict(crop_mode="left"), "crop_mode: got 'left', expected one of center"),
        (dict(interpolation="cubic"), "interpolation: got 'cubic'"),
        (dict(mean=(0.5, 0.5)), "expected 1 or 3 numbers"),
        (dict(mean=(0.5,), std=(0,)), "no deviation of 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Preprocess(**options)
    pre = Preprocess(16)
    (tmp_path / "text.png").write_text("no image")
    picture(64, 64).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for image, message in [
        (tmp_path / "text.png", "text.png: no image that can be read"),
        (tmp_path / "half.png", "half.png: no image that can be read"),
        (tmp_path / "nowhere.png", "nowhere.png: there is no such file"),
        (tmp_path, "no image that can be read"),
        (np.zeros((4, 4, 3), np.float32), r"got an array \(4, 4, 3\) of float32, expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"got an array \(4, 4, 2\)"),
        (3, "got int, expected a path"),
        (np.zeros((0, 4, 3), np.uint8), r"got an array \(0, 4, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            pre(image)
    with pytest.raises(ValueError, match="4000 x 1 pixels is too thin"):
        Preprocess(16, crop_mode="border")(picture(4000, 1))


def test_for_model(tmp_path):
    """Of its weights; else the network's usual, at the model's own size."""
    lenet = flax_nets.create_model("lenet5")
    assert for_model(lenet) == Preprocess(32, crop_pct=1.0, mean=(0.0,), std=(1.0,))
    path = tmp_path / "model.safetensors"
    convert.write(path, convert.export(lenet))
    assert for_model(flax_nets.create_model("lenet5", weights=path)) == for_model(lenet)
    vit = flax_nets.create_model("vit_tiny_patch16_224", depth=1, image_size=112)
    usual = weights.find("vit_tiny_patch16_224").preprocess
    found = for_model(vit)
    assert (found.image_size, found.mean) == ((112, 112), usual.mean)
    assert found.resize_size == tuple(side // 2 for side in usual.resize_size)
    config = {"pretrained_cfg": {"input_size": [1, 32, 32], "mean": [0.25], "std": [0.5]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = for_model(flax_nets.create_model("lenet5", weights=path))
    assert (told.mean, told.resize_size, told.interpolation) == ((0.25,), (36, 36), "bicubic")
    with pytest.raises(ValueError, match="resnet51"):
        for_weights("resnet51")
    with pytest.raises(ValueError, match="beside it says what images"):
        (tmp_path / "config.json").unlink()
        for_weights("lenet5", path)


def test_open_image_leaves_the_file_closed(tmp_path):
    path = tmp_path / "image.jpg"
    picture(30, 20).save(path)
    image = open_image(path)
    path.unlink()
    assert np.asarray(image).shape == (20, 30, 3)
