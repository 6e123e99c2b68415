"""Data sets in their own formats, batches from them, and augmentations against torchvision's."""

import functools
import gzip
import hashlib
import http.server
import io
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import warnings

import numpy as np
import pytest
import timm.data
import torch
import torchvision.transforms as T
from PIL import Image, ImageOps
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode

from benchmarks import input as benchmark
from flax_nets.preprocess import Preprocess
from flax_nets.train.data import (
    Dataset,
    Pipeline,
    augment,
    digits,
    load,
    policies,
    prefetch,
    sources,
)

RNG = np.random.default_rng(0)


def picture(width=64, height=48, mode="RGB", seed=0):
    """Smooth areas and noise, so that no operation leaves it as it was."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-20, 21, large.shape)
    pixels = np.clip(large.astype(int) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


# Augmentations: the draws of torchvision and timm, fed to ours.


old = np.random.mtrand._rand  # numpy's generator of old, which timm draws from


class TorchDraws:
    """numpy's Generator, as far as we use it, over torch's stream."""

    def random(self, size=None):
        return torch.rand(size or 1).numpy() if size else torch.rand(1).item()

    def uniform(self, low, high):
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low, high, size=None):
        drawn = torch.randint(low, high, (size or 1,))
        return drawn.numpy() if size else drawn.item()

    def permutation(self, n):
        return torch.randperm(n).numpy()


class PythonDraws:
    """The same over Python's stream, and numpy's old one where timm uses that."""

    random, uniform, normal = (
        staticmethod(f) for f in (random.random, random.uniform, random.gauss)
    )

    def integers(self, low, high, size=None):
        return random.randrange(low, high) if size is None else old.randint(low, high, size)


class NumpyDraws:
    random, beta, integers = (staticmethod(f) for f in (old.rand, old.beta, old.randint))


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    old.seed(seed)


def crops(**kwargs):
    return augment.random_resized_crop(20, **kwargs), T.RandomResizedCrop(20, **kwargs)


TORCHVISION = {
    "crop": crops(),
    "crop that seldom fits": crops(scale=(0.9, 1.0), ratio=(2.0, 3.0)),
    "crop of full width": crops(scale=(0.749, 0.751), ratio=(1.777, 1.778)),
    "crop that is tall": crops(scale=(0.9, 1.0), ratio=(0.3, 0.4)),
    "resize": (augment.resize(30), T.Resize(30)),
    "center_crop": (augment.center_crop(33), T.CenterCrop(33)),
    "center_crop of more": (augment.center_crop(61), T.CenterCrop(61)),
    "random_crop": (augment.random_crop(40, padding=4), T.RandomCrop(40, padding=4)),
    "random_crop, reflected": (
        augment.random_crop(40, 4, "reflect"), T.RandomCrop(40, 4, padding_mode="reflect"),
    ),
    "flip": (augment.flip(), T.RandomHorizontalFlip()),
    "color_jitter": (
        augment.color_jitter(0.4, 0.3, 0.2, 0.1), T.ColorJitter(0.4, 0.3, 0.2, 0.1),
    ),
    "color_jitter in part": (augment.color_jitter(1.5, hue=0.5), T.ColorJitter(1.5, hue=0.5)),
    "rand_augment": (policies.rand_augment(), T.RandAugment()),
    "rand_augment, strong": (
        policies.rand_augment(3, 27, method=Image.Resampling.BILINEAR, fill=(1, 2, 3)),
        T.RandAugment(3, 27, interpolation=InterpolationMode.BILINEAR, fill=[1, 2, 3]),
    ),
    "trivial_augment": (policies.trivial_augment(), T.TrivialAugmentWide()),
    "auto_augment": (policies.auto_augment(), T.AutoAugment()),
    "auto_augment of CIFAR": (
        policies.auto_augment("cifar10"), T.AutoAugment(T.AutoAugmentPolicy.CIFAR10),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_pixels_are_torchvisions(name):
    ours, theirs = TORCHVISION[name]
    changed, mode = 0, "RGB" if "strong" in name else None
    for seed in range(60):
        image = picture(mode=mode or ("L" if seed % 4 == 3 else "RGB"), seed=seed % 5)
        seed_all(seed)
        wanted = theirs(image)
        seed_all(seed)
        given = ours(image, TorchDraws())
        assert given.mode == wanted.mode
        assert given.size == wanted.size
        assert given.tobytes() == wanted.tobytes(), seed
        changed += wanted.tobytes() != image.tobytes()
    assert changed > 20


def test_the_tables_are_torchvisions():
    """Every magnitude of each operation, and AutoAugment's 25 pairs."""
    size = (331, 200)  # width, height
    for wide, theirs in ((False, T.RandAugment()), (True, T.TrivialAugmentWide())):
        args = (31,) if wide else (31, size[::-1])
        space = policies._Space(31, size, wide)
        for name, (magnitudes, signed) in theirs._augmentation_space(*args).items():
            wanted = magnitudes.double().numpy().reshape(-1)
            given = [space(name, level)[0] for level in range(len(wanted))]
            np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-6, err_msg=name)
            assert space(name, 0)[1] == signed
        assert set(policies.RAND) == set(theirs._augmentation_space(*args))
    for name, theirs in (("imagenet", "IMAGENET"), ("cifar10", "CIFAR10")):
        wanted = T.AutoAugment(T.AutoAugmentPolicy[theirs]).policies
        given = policies.policy(name)
        assert [[(op, p, level or 0) for op, p, level in pair] for pair in wanted] == [
            [tuple(step) for step in pair] for pair in given
        ]


@pytest.mark.parametrize(
    "config", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m15-mmax30-mstd101-p1"]
)
def test_the_pixels_are_timms(config, monkeypatch):
    posterize = ImageOps.posterize  # Pillow 13's refuses the 0 bits of timm's weakest magnitudes
    black = lambda image, bits: posterize(image, bits) if bits else image.point(lambda x: 0)  # noqa: E731
    monkeypatch.setattr(ImageOps, "posterize", black)
    theirs = timm.data.rand_augment_transform(config, dict(img_mean=(128, 128, 128)))
    ours = policies.timm_rand_augment(config)
    changed = 0
    for seed in range(120):
        image = picture(seed=seed % 5)
        seed_all(seed)
        wanted = theirs(image)
        seed_all(seed)
        given = ours(image, PythonDraws())
        assert given.tobytes() == wanted.tobytes(), seed
        changed += wanted.tobytes() != image.tobytes()
    assert changed > 60


def test_random_erasing():
    x = RNG.normal(size=(30, 40, 3)).astype(np.float32)
    chw = torch.tensor(x.transpose(2, 0, 1))
    narrow = dict(area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    for ours, theirs, draws in (
        (augment.random_erasing(), T.RandomErasing(), TorchDraws()),
        (augment.random_erasing(0.5, **narrow), RandomErasing(device="cpu"), PythonDraws()),
    ):
        erased = 0
        for seed in range(60):
            seed_all(seed)
            wanted = theirs(chw.clone()).numpy().transpose(1, 2, 0)
            seed_all(seed)
            given = ours(x, draws)
            np.testing.assert_array_equal(given, wanted)
            erased += not np.array_equal(given, x)
        assert 10 < erased < 50
    noisy = augment.random_erasing(1.0, area=(0.3, 0.3), fill="pixels")(x, np.random.default_rng(0))
    filled = noisy[noisy != x]
    assert abs(filled.mean()) < 0.2 and abs(filled.std() - 1) < 0.2
    assert abs(filled.size / x.size - 0.3) < 0.03


@pytest.mark.parametrize("options", [dict(mixup=0.2), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1)])
def test_mix_is_timms(options):
    images = RNG.normal(size=(6, 12, 10, 3)).astype(np.float32)
    labels = np.array([0, 3, 1, 1, 4, 2], np.int32)
    theirs = timm.data.Mixup(
        options.get("mixup", 0.0), options.get("cutmix", 0.0),
        prob=0.8, label_smoothing=0.1, num_classes=5,
    )  # fmt: skip
    ours = augment.mix(5, **options, p=0.8, label_smoothing=0.1)
    for seed in range(20):
        seed_all(seed)
        x, y = theirs(torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(labels))
        seed_all(seed)
        batch = ours({"image": images, "label": labels, "mask": labels}, NumpyDraws())
        np.testing.assert_allclose(batch["image"], x.numpy().transpose(0, 2, 3, 1), atol=1e-6)
        np.testing.assert_allclose(batch["label"], y.numpy(), atol=1e-6)
        assert batch["image"].dtype == batch["label"].dtype == np.float32
        assert batch["mask"] is labels


def test_normalize_is_torchvisions():
    theirs = T.Compose([T.ToTensor(), T.Normalize(augment.MEAN, augment.STD)])
    image = picture()
    given = augment.normalize()(image, RNG)
    np.testing.assert_array_equal(given, theirs(image).numpy().transpose(1, 2, 0))
    assert augment.normalize(0.5, 0.5)(image.convert("L"), RNG).shape == (48, 64, 1)
    pre = Preprocess(32, 36)
    chain = augment.compose(augment.resize(36), augment.center_crop(32), augment.normalize())
    np.testing.assert_array_equal(augment.prepare(pre)(image, RNG), chain(image, RNG))


def test_pca_noise():
    """One colour is added to all pixels: along the axes, as much as the formula says."""
    image, std = picture(), 0.3
    axes = np.array(augment.PCA)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-3)
    rng, added = np.random.default_rng(0), []
    for _ in range(300):
        difference = augment.pca_noise(std)(image, rng) - np.asarray(image, np.float32)
        assert np.ptp(difference.reshape(-1, 3), axis=0).max() < 1e-4
        added.append(difference[0, 0])
    along = np.array(added) @ np.linalg.inv(axes).T / 255
    np.testing.assert_allclose(along.std(0), std * np.array(augment.PCA_STD), rtol=0.15)


def test_scale_jitter_reaches_every_size():
    rng = np.random.default_rng(0)
    jitter = augment.scale_jitter(30, 34)
    sizes = [jitter(picture(), rng).size for _ in range(100)]
    assert {min(size) for size in sizes} == {30, 31, 32, 33, 34}
    assert {size: int(min(size) * 64 / 48) == size[0] for size in sizes} == dict.fromkeys(
        sizes, True
    )


def test_draft_decodes_less_and_sees_the_same():
    stream = io.BytesIO()
    picture(800, 600).save(stream, "JPEG", quality=95)
    ends = []
    for draft in (False, True):
        image = Image.open(io.BytesIO(stream.getvalue()))
        crop = augment.random_resized_crop(32, scale=(0.5, 1.0), draft=draft)
        ends.append(np.asarray(crop(image, np.random.default_rng(1)), np.float32))
        assert image.size == ((100, 75) if draft else (800, 600))
    assert 0 < np.abs(ends[0] - ends[1]).mean() < 6


# Data sets: the files as they are published, with few examples.


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


IMAGES = RNG.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
LABELS = np.arange(20) % 10


def write_mnist(root, pack=True):
    for part, size in (("train", 20), ("t10k", 7)):
        files = {"images-idx3": IMAGES[:size, :28, :28, 0], "labels-idx1": LABELS[:size]}
        for name, array in files.items():
            raw = idx(array.astype(np.uint8))
            path = root / f"{part}-{name}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(raw) if pack else raw)


def archive(path, folder, files):
    with tarfile.open(path, "w:gz") as out:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            out.addfile(member, io.BytesIO(raw))


def rows(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar(root, hundred, binary, protocol=2):
    """Five files of four examples to train on, one of three to test."""
    name = "cifar-100" if hundred else "cifar-10"
    parts = [slice(0, 20)] if hundred else [slice(i, i + 4) for i in range(0, 20, 4)]
    names = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    held_out = "test" if hundred else "test_batch"
    files = {}
    for part, file in zip([*parts, slice(0, 3)], [*names, held_out], strict=True):
        labels = LABELS[part].tolist()
        if binary:
            head = [[99, x] if hundred else [x] for x in labels]
            records = np.concatenate([np.array(head, np.uint8), rows(IMAGES[part])], 1)
            files[f"{file}.bin"] = records.tobytes()
        else:
            key = b"fine_labels" if hundred else b"labels"
            content = {b"data": rows(IMAGES[part]), key: labels, b"filenames": [b"x.png"]}
            files[file] = pickle.dumps(content, protocol)
    classes = [f"c{i}" for i in range(100 if hundred else 10)]
    if binary:
        meta = "fine_label_names.txt" if hundred else "batches.meta.txt"
        files[meta] = "\n".join(classes).encode() + b"\n\n"
    else:
        key = b"fine_label_names" if hundred else b"label_names"
        content = {key: [c.encode() for c in classes]}
        files["meta" if hundred else "batches.meta"] = pickle.dumps(content, protocol)
    folder = f"{name}-{'binary' if hundred else 'batches-bin'}" if binary else (
        f"{name}-{'python' if hundred else 'batches-py'}"
    )  # fmt: skip
    archive(root / f"{name}-{'binary' if binary else 'python'}.tar.gz", folder, files)
    return files


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(tmp_path, name, pack):
    write_mnist(tmp_path, pack)
    train, test = (load(f"{name}:{tmp_path}", split) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, IMAGES[:, :28, :28, :1])
    np.testing.assert_array_equal(test.labels, LABELS[:7])
    assert train.images.dtype == np.uint8
    assert train.classes[9] == ("9" if name == "mnist" else "Ankle boot")


@pytest.mark.parametrize("form", ["python", "python 3", "binary", "unpacked"])
@pytest.mark.parametrize("hundred", [False, True])
def test_cifar(tmp_path, hundred, form):
    write_cifar(tmp_path, hundred, form == "binary", 4 if form == "python 3" else 2)
    if form == "unpacked":
        (packed,) = tmp_path.glob("*.gz")
        subprocess.run(["tar", "xf", packed.name], cwd=tmp_path, check=True)
        packed.unlink()
    name = f"{'cifar100' if hundred else 'cifar10'}:{tmp_path}"
    train, test = load(name), load(name, "test")
    np.testing.assert_array_equal(train.images, IMAGES)
    np.testing.assert_array_equal(train.labels, LABELS)
    np.testing.assert_array_equal(test.images, IMAGES[:3])
    assert train.classes[:2] == ("c0", "c1") and len(train.classes) == (100 if hundred else 10)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = write_cifar(tmp_path, False, False)
    for broken in (
        pickle.dumps({b"data": Evil(), b"labels": []}),
        pickle.dumps({b"data": np.array([Evil()], object), b"labels": [1]}),
        pickle.dumps([1]), b"nonsense", pickle.dumps({b"labels": [1]}),
    ):  # fmt: skip
        archive("cifar-10-python.tar.gz", "cifar-10-batches-py", files | {"data_batch_2": broken})
        with pytest.raises(ValueError, match=r"tar\.gz: data_batch_2: found"):
            load("cifar10:.")
    assert not os.path.exists("made_by_a_pickle")


def write_folder(root, splits=("",), per_class=10, suffix=".jpg"):
    for split in splits:
        for c, name in enumerate(("cat", "dog", "owl")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                seed = 100 * c + i
                size = (40 + i, 36)
                picture(*size, seed=seed).save(root / split / name / f"{i:02}{suffix}")
    return root


def test_folder_of_classes(tmp_path):
    """Of each class every fifth is held out, or what lies in test or val."""
    flat = write_folder(tmp_path / "flat", suffix=".png")
    (flat / "cat" / "notes.txt").write_text("no image")
    (flat / ".cache").mkdir()
    train, test = load(f"folder:{flat}"), load(f"folder:{flat}", "test")
    assert train.classes == test.classes == ("cat", "dog", "owl")
    assert len(train) == 24 and len(test) == 6
    assert [os.path.basename(test.name(i)) for i in (0, 1)] == ["04.png", "09.png"]
    assert not {train.name(i) for i in range(24)} & {test.name(i) for i in range(6)}
    image, label = test[3]
    assert label == 1
    assert image.tobytes() == picture(49, 36, seed=109).tobytes()
    split = write_folder(tmp_path / "split", ("train", "val"), 3)
    assert [len(load(f"folder:{split}", s)) for s in ("train", "test")] == [9, 9]
    assert "/val/" in load(f"folder:{split}", "test").name(0)
    (split / "val" / "yak").mkdir()
    with pytest.raises(ValueError, match="found a class 'yak'"):
        load(f"folder:{split}", "test")


class Rows(list):
    """What the two libraries give for a split."""

    def __init__(self, count):
        super().__init__(
            {"id": i, "img": Image.fromarray(IMAGES[i]), "kind": int(LABELS[i])}
            for i in range(count)
        )
        self.features = {"id": object(), "img": Picture(), "kind": Names()}

    def select_columns(self, names):
        assert names == ["img", "kind"]
        return self


class Picture: ...


class Names:
    names = tuple("abcdefghij")


def test_hugging_face_and_tfds(monkeypatch):
    asked = []

    def hugging(name, config=None, **options):
        asked.append((name, config, options))
        return {"train": Rows(8), "validation": Rows(3)}

    fake = types.SimpleNamespace(load_dataset=hugging, Image=Picture, ClassLabel=Names)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    train, test = load("hf:org/set:small", revision="v1"), load("hf:org/set", "test")
    assert asked == [("org/set", "small", {"revision": "v1"}), ("org/set", None, {})]
    assert (len(train), len(test), test.name(2)) == (8, 3, "hf:org/set[2]")
    assert train.classes == tuple("abcdefghij")
    image, label = train[5]
    assert image.tobytes() == IMAGES[5].tobytes() and label == 5
    with pytest.raises(
        ValueError, match=r"img \(Picture\), kind \(Names\), expected id to be Names"
    ):
        load("hf:org/set", label="id")
    info = types.SimpleNamespace(supervised_keys=("img", "kind"), features={"kind": Names()})
    fake = types.SimpleNamespace(
        data_source=lambda name, **options: {"train": Rows(6)},
        builder=lambda name, **options: types.SimpleNamespace(info=info),
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    assert len(load("tfds:cats")) == 6
    with pytest.raises(ValueError, match="cats: found the splits train, expected 'test'"):
        load("tfds:cats", "test")
    for name, package in (("hf:x", "datasets"), ("tfds:x", "tensorflow-datasets")):
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
        with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
            load(name)


def test_digits_by_name():
    found, normalised = load("digits", "test", size=16, channels=3), digits("test", 16, 3)
    assert found.images.dtype == np.uint8 and found.images.shape == (355, 16, 16, 3)
    np.testing.assert_allclose(found.images / 127.5 - 1, normalised.images, atol=1 / 255)


def test_download(tmp_path, monkeypatch):
    """From a server of our own: what is not there comes, once, and is checked."""
    (tmp_path / "web").mkdir()
    write_mnist(tmp_path / "web")
    served = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            served.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path / "web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    hashes = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "web").iterdir()
    }
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    monkeypatch.setitem(sources.PUBLISHED, "mnist", (address, hashes))
    try:
        with pytest.raises(ValueError, match=r"found no train-images.*download=True fetches it"):
            load(f"mnist:{tmp_path}")
        for _ in range(2):
            assert len(load(f"mnist:{tmp_path / 'here'}", download=True)) == 20
        assert len(served) == 4
        hashes["t10k-labels-idx1-ubyte.gz"] = "0" * 64
        with pytest.raises(OSError, match="its SHA-256 is"):
            load(f"mnist:{tmp_path / 'there'}", "test", download=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifra10:x", "there is no 'cifra10': did you mean 'cifar10'?"),
        ("imagenet", "known are digits, mnist,"),
        ("digits:x", "expected 'digits' alone"),
        ("folder", "expected 'folder:' and where"),
        ("folder:nowhere", "nowhere: no such folder"),
        ("folder:.", "found no images in folders of classes"),
        ("cifar100:.", "found neither cifar-100-python.tar.gz nor cifar-100-python nor"),
    ],
)
def test_errors_of_names(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load(name)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="split: got 'valid'"):
        load("digits", "valid")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("images-idx3", lambda raw: raw[:-5], r"found \d+ bytes, expected 15680"),
        ("images-idx3", lambda raw: b"\x89PNG" + raw, "expected an idx file"),
        ("labels-idx1", lambda raw: raw[:8] + b"\x0b" + raw[9:], "labels up to 11"),
        ("labels-idx1", lambda raw: idx(np.zeros(5, np.uint8)), r"labels \(5,\)"),
        ("images-idx3", None, "a damaged gzip file"),
    ],
)
def test_errors_of_idx_files(tmp_path, file, change, message):
    write_mnist(tmp_path)
    path = tmp_path / f"train-{file}-ubyte.gz"
    raw = path.read_bytes()
    path.write_bytes(gzip.compress(change(gzip.decompress(raw))) if change else raw[:-30])
    with pytest.raises(ValueError, match=message):
        load(f"mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files: {k: v for k, v in files.items() if k != "data_batch_4.bin"},
            "found no data_b",
        ),
        (
            lambda files: files | {"data_batch_4.bin": b"x" * 99},
            "99 bytes, expected a multiple of 3073",
        ),
        (lambda files: files | {"batches.meta.txt": b"only\ntwo\n"}, "labels up to 9, expected"),
    ],
)
def test_errors_of_cifar(tmp_path, change, message):
    files = change(write_cifar(tmp_path, False, True))
    packed = tmp_path / "cifar-10-binary.tar.gz"
    archive(packed, "cifar-10-batches-bin", files)
    with pytest.raises(ValueError, match=message):
        load(f"cifar10:{tmp_path}")
    packed.write_bytes(packed.read_bytes()[:200])
    with pytest.raises(ValueError, match="found a damaged archive"):
        load(f"cifar10:{tmp_path}")


# Pipelines.


@pytest.fixture
def pipeline():
    """Makes pipelines, and ends their threads."""
    made = []

    def make(*args, **kwargs):
        made.append(Pipeline(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def numbered(n):
    """Images that are their number."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 6, 6, 3))
    return Dataset(images, np.arange(n), ())


def noisy(image, rng):
    """A small random change, to see whose draws it has."""
    return np.asarray(image, np.float32) + rng.uniform(-0.4, 0.4, (6, 6, 3)).astype(np.float32)


def assert_same(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype


MIX = augment.mix(23, mixup=0.5)
TRAIN = dict(transform=noisy, seed=7, drop_last=True)


def test_epochs_are_shuffled_and_augmented_by_seed(pipeline):
    one = pipeline(numbered(23), 4, **TRAIN)
    epochs = [list(one.epoch(e)) for e in range(2)]
    labels = [np.concatenate([batch["label"] for batch in batches]) for batches in epochs]
    for batches, order in zip(epochs, labels, strict=True):
        assert len(batches) == len(one) == 5
        assert len(set(order)) == 20
        pixels = np.concatenate([batch["image"] for batch in batches])
        np.testing.assert_array_equal(np.round(pixels[:, 0, 0, 0]), order)
        assert len(np.unique(pixels[:, 0, 0, 0] - order)) == 20  # each its own draws
    drawn = np.concatenate(
        [b["image"][:, 0, 0, 0] - b["label"] for batches in epochs for b in batches]
    )
    assert len(np.unique(drawn)) == 40  # anew in each epoch
    assert not np.array_equal(*labels)
    assert set(labels[0]) != set(labels[1])  # others are left out
    assert_same(
        epochs[0] + epochs[1], [*pipeline(numbered(23), 4, **TRAIN).epoch(0), *one.epoch(1)]
    )
    other = next(iter(pipeline(numbered(23), 4, **TRAIN | {"seed": 8})))
    assert not np.array_equal(other["label"], epochs[0][0]["label"])
    assert one.names(1, 2) == [f"image {i}" for i in epochs[1][2]["label"]]


def test_going_on_anywhere_gives_what_would_have_come(pipeline):
    whole = pipeline(numbered(23), 4, mix=MIX, **TRAIN)
    wanted = [*whole.epoch(0), *whole.epoch(1)]
    assert wanted[0]["label"].shape == (4, 23)
    for epoch, start in ((0, 0), (0, 3), (1, 0), (1, 4)):
        resumed = pipeline(numbered(23), 4, mix=MIX, **TRAIN)
        next(iter(resumed))  # to look at the shapes
        found = [*resumed.epoch(epoch, start), *(resumed.epoch(1) if epoch == 0 else ())]
        assert_same(found, wanted[5 * epoch + start :])
    ahead, behind = whole.epoch(0), whole.epoch(0)  # two at a time
    assert_same(
        [next(ahead), next(ahead), next(behind), next(ahead)], [*wanted[:2], wanted[0], wanted[2]]
    )


def test_a_worker_process_gives_the_same(pipeline):
    """It starts with the second batch, and goes on into the next epoch."""
    args = dict(transform=augment.random_crop(5, padding=1), seed=1)  # of no module that takes time
    threads = pipeline(numbered(6), 4, **args)
    wanted = [*threads.epoch(0), *threads.epoch(1)]
    process = pipeline(numbered(6), 4, workers=1, **args)
    assert_same([*process.epoch(0), *process.epoch(1)], wanted)


@pytest.mark.parametrize("examples", [23, 17, 9])
def test_every_example_counts_once_on_any_number_of_hosts(pipeline, examples):
    whole = list(pipeline(numbered(examples), 8))
    shares = [list(pipeline(numbered(examples), 8, host=h, hosts=4)) for h in range(4)]
    assert {len(share) for share in shares} == {math.ceil(examples / 8)} == {len(whole)}
    counted = []
    for parts in zip(whole, *shares, strict=True):
        one, *parts = parts
        joined = {key: np.concatenate([part[key] for part in parts]) for key in one}
        np.testing.assert_array_equal(joined["mask"], one["mask"])
        real = one["mask"] == 1
        assert_same(
            [{k: v[real] for k, v in joined.items()}], [{k: v[real] for k, v in one.items()}]
        )
        assert {part["image"].shape for part in parts} == {(2, 6, 6, 3)}
        counted += joined["label"][real].tolist()
    assert counted == list(range(examples))


def test_evaluation_goes_on_in_the_background(pipeline):
    """A second pass begins with what the first left prepared."""
    one = pipeline(numbered(10), 4)
    first = list(one)
    (live,) = one._live
    assert_same(one, first)
    assert one._live[0] is live
    half = iter(one)
    next(half), next(half)
    assert_same(one, first)


def test_hosts_train_on_shares_of_the_same_batches(pipeline):
    whole = pipeline(numbered(23), 6, **TRAIN)
    shares = [pipeline(numbered(23), 6, host=h, hosts=2, **TRAIN) for h in range(2)]
    for one, *parts in zip(whole.epoch(1), *(share.epoch(1) for share in shares), strict=True):
        assert_same([one], [{k: np.concatenate([part[k] for part in parts]) for k in one}])


def test_repeated_augmentation_is_timms(pipeline, monkeypatch):
    """Two of timm's processes see, step by step, the copies that our batch has."""
    one = pipeline(numbered(24), 8, seed=0, repeats=3, transform=noisy)
    order = np.concatenate([batch["label"] for batch in one.epoch(0)])
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor(
        np.random.default_rng((0, 0)).permutation(n)))  # fmt: skip
    parts = [list(RepeatAugSampler(range(24), 2, rank)) for rank in range(2)]
    for n in range(3):
        theirs = np.concatenate([part[4 * n : 4 * n + 4] for part in parts])
        assert sorted(theirs) == sorted(order[8 * n : 8 * n + 8])
    images = np.concatenate([batch["image"] for batch in one.epoch(0)])
    assert len(np.unique(images[:, 0, 0, 0])) == 24  # augmented each time


def test_broken_images_are_named(pipeline, tmp_path):
    root = write_folder(tmp_path, per_class=5)
    bad = [root / "cat" / "01.jpg", root / "dog" / "00.jpg", root / "owl" / "02.jpg"]
    bad[0].write_bytes(b"no image")
    bad[1].write_bytes(bad[1].read_bytes()[:400])  # cut off
    bad[2].write_bytes(b"")
    source = load(f"folder:{root}")
    transform = augment.compose(augment.random_resized_crop(16), augment.normalize())
    with pytest.raises(ValueError, match=r"cat/01\.jpg: found a broken image .*; skip_broken"):
        list(pipeline(source, 4, transform))
    one = pipeline(source, 4, transform, skip_broken=True)
    with pytest.warns(UserWarning, match="skipped") as told:
        batches = list(one)
    assert len(told) == 3
    assert set(one.broken) == set(map(str, bad))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.tolist() == [source.name(i) not in one.broken for i in range(len(source))]
    for batch in batches:
        assert np.abs(batch["image"]).max() > 0.1 and np.isfinite(batch["image"]).all()
    with warnings.catch_warnings(action="error"):  # each is told once
        assert_same(one, batches)
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the images can be read"):
        list(pipeline(source, 4, transform, skip_broken=True))


def test_a_transformations_own_mistake_is_not_the_images(pipeline):
    def fail(image, rng):
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        list(pipeline(numbered(5), 2, fail, skip_broken=True))
    ragged = pipeline(
        numbered(5), 2, lambda image, rng: image.resize((6 + image.getpixel((0, 0))[0], 6))
    )
    with pytest.raises(ValueError, match="expected images of one size"):
        list(ragged)


@pytest.mark.parametrize(("channels", "shape"), [(1, (2, 28, 28, 1)), (3, (2, 28, 28, 3))])
def test_channels(pipeline, tmp_path, channels, shape):
    write_mnist(tmp_path)
    grey, colour = load(f"mnist:{tmp_path}"), Dataset(IMAGES[:, :28, :28], LABELS, ())
    for source in (grey, colour):
        batch = next(iter(pipeline(source, 2, channels=channels)))
        assert batch["image"].shape == shape and batch["image"].dtype == np.uint8
    floats = digits("test")
    batch = next(iter(pipeline(floats, 2)))  # not a picture's values: left as they are
    np.testing.assert_array_equal(batch["image"], floats.images[:2])


def test_prefetch_places_some_ahead():
    placed, taken = [], []
    for x in prefetch(range(6), lambda x: placed.append(x) or x):
        taken.append(x)
        assert len(placed) == min(len(taken) + 2, 6)
    assert taken == list(range(6))


def test_the_benchmark_counts_waiting(pipeline, tmp_path):
    """Nothing is as busy as it could be when each example takes longer than a step."""
    benchmark.write_photos(tmp_path, 8)
    source = load(f"folder:{tmp_path}")
    assert source[0][0].size == (500, 375)

    def slow(image, rng):
        time.sleep(0.02)
        return image

    idle = pipeline(source, 1, slow, seed=0, drop_last=True, threads=1)
    busy, longest, _ = benchmark.measure(idle, 5, 0.002)
    assert busy < 0.5 and longest > 0.005


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pipeline(numbered(3), 0), "batch_size: got 0"),
        (lambda: Pipeline(numbered(3), 4, drop_last=True), "only 3 examples"),
        (lambda: Pipeline(numbered(3), 2, mix=MIX), "seed: got None"),
        (lambda: Pipeline(numbered(3), 2, repeats=2), "seed: got None"),
        (lambda: Pipeline(numbered(3), 2, repeats=0), "repeats: got 0"),
        (lambda: Pipeline(numbered(3), 2, seed=-1), "seed: got -1"),
        (lambda: Pipeline(numbered(3), 2, workers=-1), "workers: got -1"),
        (lambda: Pipeline(numbered(3), 3, host=0, hosts=2), "got 3 for 2 equal hosts"),
        (lambda: Pipeline(numbered(3), 2, host=2, hosts=2), "host: got 2"),
        (lambda: Pipeline(numbered(3), 2, channels=4), "channels: got 4"),
        (lambda: augment.random_resized_crop(8, scale=(0.5, 0.2)), r"scale: got \(0.5, 0.2\)"),
        (lambda: augment.resize(8, "cubic")(picture(), RNG), "interpolation: got 'cubic'"),
        (lambda: augment.random_crop(60)(picture(), RNG), r"got an image of \(64, 48\)"),
        (lambda: augment.color_jitter(hue=0.7), "hue: got"),
        (lambda: augment.color_jitter(-1), "brightness, contrast, saturation: got"),
        (lambda: augment.normalize(0.5, 0), "std: got 0"),
        (lambda: augment.normalize()(picture(mode="L"), RNG), "normalize: got 1 channels"),
        (lambda: augment.pca_noise()(picture(mode="L"), RNG), r"expected \[H, W, 3\]"),
        (lambda: augment.random_erasing(2), "random_erasing: got"),
        (lambda: augment.random_erasing(fill="rand"), "fill: got 'rand'"),
        (lambda: augment.mix(5), "expected one above 0"),
        (lambda: augment.mix(5, 1.0, p=2), "p: got"),
        (lambda: policies.rand_augment(magnitude=31), "magnitude: got 31"),
        (lambda: policies.trivial_augment(1), "bins: got 1"),
        (lambda: policies.auto_augment("svhn"), "policy: got 'svhn'"),
        (lambda: policies.timm_rand_augment("rand-x3"), "rand-x3: got 'x3'"),
        (lambda: policies.timm_rand_augment("augmix-m3"), "got 'augmix' in front"),
        (lambda: list(prefetch([], int, 0)), "ahead: got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_heavy_before_its_use():
    heavy = {"grain", "PIL", "sklearn", "torch"}
    code = f"import sys, flax_nets.train.data; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
