"""Data sets by name, read from where they lie.

A source is what Grain calls a random access data source, and besides knows its classes and the name
of each example. Those that are small files become a `Dataset` in memory; images in folders, and
what Hugging Face and TensorFlow Datasets hold, are decoded one by one.
"""

from __future__ import annotations

import dataclasses
import difflib
import gzip
import importlib
import io
import math
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from flax_nets.train.data.memory import Dataset, digits

Split = Literal["train", "test"]
DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


class Missing(ValueError):
    """Files that can be downloaded are not there."""


class Source(Protocol):
    """What `Pipeline` reads."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """An image, a PIL image or an array [H, W, C], and its label."""

    def name(self, index: int) -> str:
        """What to call an example in a message."""


def load(name: str, split: Split = "train", *, download: bool = False, **options: Any) -> Source:
    """A data set by its name.

    - `digits`: `data.digits` in bytes, ink white on black, with its options `size` and `channels`.
    - `mnist:DIR`, `fashion_mnist:DIR`: four idx files, compressed or not.
    - `cifar10:DIR`, `cifar100:DIR`: the archive, for Python or binary, or what it unpacks to.
    - `folder:DIR`: a folder of images for each class, in DIR/train and DIR/test (or val), or in DIR
      itself: of each class, sorted by name, every fifth is held out then.
    - `hf:NAME`, `hf:NAME:CONFIG`: a data set of the Hugging Face hub, or a folder that the library
      `datasets` knows to read; options `image` and `label`, the columns (default: the first of
      that type), and those of `datasets.load_dataset`.
    - `tfds:NAME`: of TensorFlow Datasets, in a format with random access; options of
      `tfds.data_source`.

    Args:
      name: as above.
      split: "train" or "test"; "test" is the validation split where there is no other.
      download: fetch the files of MNIST, Fashion-MNIST or CIFAR into DIR if they are not there.

    Raises ValueError for an unknown name or split, and for files that are not what they should be;
    ModuleNotFoundError where a library is missing.

    >>> load("digits", "test").classes[:3]
    ('0', '1', '2')
    """
    if split not in ("train", "test"):
        raise ValueError(f'split: got {split!r}, expected "train" or "test"')
    kind, _, place = name.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KINDS)}"
        raise ValueError(f"data: there is no {kind!r}: {known}")
    if bool(place) == (kind == "digits"):
        expected = "'digits' alone" if place else f"'{kind}:' and where the data are"
        raise ValueError(f"data: got {name!r}, expected {expected}")
    try:
        return KINDS[kind](place, split, **options)
    except Missing as error:
        if not download:
            raise Missing(f"{error}; download=True fetches it") from None
    from flax_nets.weights.download import download as fetch

    address, files = PUBLISHED[kind]
    for file, sha256 in files.items():
        fetch(address + file, Path(place).expanduser() / file, sha256)
    return KINDS[kind](place, split, **options)


def _digits(place: str, split: Split, **options: Any) -> Dataset:
    found = digits(split, **options)
    images = np.round((found.images + 1) * 127.5).astype(np.uint8)
    return dataclasses.replace(found, images=images)


def _mnist(place: str, split: Split, classes: tuple[str, ...] = DIGITS) -> Dataset:
    part = "train" if split == "train" else "t10k"
    images, labels = (
        read_idx(_find(Path(place).expanduser(), f"{part}-{what}-idx{rank}-ubyte"))
        for what, rank in (("images", 3), ("labels", 1))
    )
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{place}: got images {images.shape} and labels {labels.shape}, expected [N, H, W] and "
            "[N]"
        )
    return _dataset(place, images[..., None], labels, classes)


def _fashion(place: str, split: Split) -> Dataset:
    return _mnist(place, split, CLOTHES)


def _find(folder: Path, name: str) -> Path:
    for spelled in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelled, folder / f"{spelled}.gz"):
            if path.is_file():
                return path
    raise Missing(f"{folder}: found no {name}, and no {name}.gz")


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes, uint8 of any shape, in an idx file (of LeCun's), compressed or not.

    Raises ValueError for anything else.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: found a damaged gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path}: found {raw[:4]!r} at its start, expected an idx file of bytes")
    start = 4 + 4 * raw[3]
    shape = np.frombuffer(raw, ">u4", raw[3], 4).tolist()
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path}: found {len(raw) - start} bytes, expected {math.prod(shape)} for {shape}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _dataset(
    place: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> Dataset:
    if not len(labels) or labels.max() >= len(classes) or labels.min() < 0:
        found = f"labels up to {labels.max()}" if len(labels) else "no labels"
        raise ValueError(f"{place}: found {found}, expected some from 0 to {len(classes) - 1}")
    return Dataset(images, labels.astype(np.int32), classes)


class _Cifar(NamedTuple):
    """One of the forms in which CIFAR is published."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str  # of the classes
    labels: bytes | int  # the key of the labels; in a binary file, their place in a record


CIFAR = {
    "cifar10": (
        _Cifar(
            "cifar-10-python.tar.gz", "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",),
            "batches.meta", b"labels",
        ),
        _Cifar(
            "cifar-10-binary.tar.gz", "cifar-10-batches-bin",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",),
            "batches.meta.txt", 0,
        ),
    ),
    "cifar100": (
        _Cifar(
            "cifar-100-python.tar.gz", "cifar-100-python", ("train",), ("test",),
            "meta", b"fine_labels",
        ),
        _Cifar(
            "cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), ("test.bin",),
            "fine_label_names.txt", 1,
        ),
    ),
}  # fmt: skip


def _cifar10(place: str, split: Split) -> Dataset:
    return _cifar(place, split, CIFAR["cifar10"])


def _cifar100(place: str, split: Split) -> Dataset:
    return _cifar(place, split, CIFAR["cifar100"])


def _cifar(place: str, split: Split, forms: tuple[_Cifar, ...]) -> Dataset:
    root = Path(place).expanduser()
    for form in forms:
        wanted = (*(form.train if split == "train" else form.test), form.names)
        if (root / form.folder).is_dir():
            where, found = root / form.folder, _from_folder(root / form.folder, wanted)
        elif (root / form.archive).is_file():
            where, found = root / form.archive, _from_archive(root / form.archive, form, wanted)
        else:
            continue
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"{where}: found no {missing[0]}")
        read = _read_binary if isinstance(form.labels, int) else _read_pickle
        parts = [read(found[name], form, f"{where}: {name}") for name in wanted[:-1]]
        images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
        images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        classes = _class_names(found[form.names], form, f"{where}: {form.names}")
        return _dataset(place, np.ascontiguousarray(images), labels, classes)
    names = " nor ".join(name for form in forms for name in (form.archive, form.folder))
    raise Missing(f"{root}: found neither {names}")


def _from_folder(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _from_archive(path: Path, form: _Cifar, names: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == form.folder and name in names and member.isfile():
                    stream = archive.extractfile(member)
                    found[name] = stream.read() if stream else b""
                if len(found) == len(names):
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: found a damaged archive ({error})") from error
    return found


def _read_binary(raw: bytes, form: _Cifar, where: str) -> tuple[np.ndarray, np.ndarray]:
    width = 3072 + (2 if form.labels == 1 else 1)  # CIFAR-100 has a coarse label before the fine
    if not raw or len(raw) % width:
        raise ValueError(f"{where}: found {len(raw)} bytes, expected a multiple of {width}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, width)
    return records[:, -3072:], records[:, int(form.labels)]


def _read_pickle(raw: bytes, form: _Cifar, where: str) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(raw, where)
    try:
        images, labels = content[b"data"].array(), np.array(content[form.labels], np.int64)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: found no images and labels of CIFAR ({error!r})") from error
    if images.shape != (len(labels), 3072):
        raise ValueError(f"{where}: found images {images.shape}, expected {(len(labels), 3072)}")
    return images, labels


def _class_names(raw: bytes, form: _Cifar, where: str) -> tuple[str, ...]:
    if isinstance(form.labels, int):
        return tuple(raw.decode().split())
    key = form.labels.removesuffix(b"s") + b"_names"
    try:
        return tuple(name.decode() for name in _unpickle(raw, where)[key])
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: found no names of classes ({error!r})") from error


class _Inert:
    """Stands for each thing of numpy's that a pickle calls: it only keeps what it is given."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """uint8, of what numpy's pickle of an array says."""
        _, shape, dtype, fortran, raw = self.state
        if dtype.args[0] not in ("u1", b"u1"):
            raise TypeError(f"an array of {dtype.args[0]!r}")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _encode(text: Any, encoding: Any) -> bytes:
    return str(text).encode("latin-1")  # how Python 3 writes bytes for Python 2


class _Unpickler(pickle.Unpickler):
    """Runs no code: the few names it knows stand for things of ours."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Inert
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"{module}.{name} is not loaded: it could run code")


def _unpickle(raw: bytes, where: str) -> dict[Any, Any]:
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(f"{where}: found no pickle of CIFAR ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: found a {type(content).__name__}, expected CIFAR's dict")
    return content


@dataclasses.dataclass(frozen=True)
class Folder:
    """Images in files, read when asked for, and decoded by whoever uses them.

    As torchvision does, it takes no notice of an orientation in EXIF.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """A PIL image that is not decoded yet, and its label."""
        from PIL import Image

        with open(self.files[index], "rb") as stream:  # at once, so that no file stays open
            return Image.open(io.BytesIO(stream.read())), self.labels[index]

    def name(self, index: int) -> str:
        """The path."""
        return self.files[index]


def _folder(place: str, split: Split) -> Folder:
    root = Path(place).expanduser()
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if not (train := root / "train").is_dir():
        return _class_folders(root, _folders(root), lambda nth: (nth % 5 == 4) == (split == "test"))
    classes = _folders(train)
    if split == "train":
        return _class_folders(train, classes)
    held_out = [root / name for name in ("test", "val", "validation", "valid")]
    found = [path for path in held_out if path.is_dir() and _folders(path)]
    if not found:
        raise ValueError(f"{root}: found train, and neither test nor val with folders of classes")
    if unknown := set(_folders(found[0])) - set(classes):
        raise ValueError(f"{found[0]}: found a class {min(unknown)!r}, which {train} has not")
    return _class_folders(found[0], classes)


def _folders(root: Path) -> list[str]:
    return sorted(x.name for x in root.iterdir() if x.is_dir() and not x.name.startswith("."))


def _class_folders(
    root: Path, classes: list[str], chosen: Callable[[int], bool] = lambda nth: True
) -> Folder:
    """The images below root/CLASS, those whose number within their class is `chosen`."""
    files, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(
            os.path.join(folder, file)
            for folder, _, names in os.walk(root / name, followlinks=True)
            for file in names
            if os.path.splitext(file)[1].lower() in IMAGE_FILES
        )
        for nth, path in enumerate(paths):
            if chosen(nth):
                files.append(path)
                labels.append(label)
    if not files:
        raise ValueError(f"{root}: found no images in folders of classes, such as {root}/cat/1.jpg")
    return Folder(tuple(files), tuple(labels), tuple(classes))


@dataclasses.dataclass(frozen=True)
class Records:
    """Records of another library: rows[i] is a mapping with an image and a label."""

    rows: Any
    image: str
    label: str
    classes: tuple[str, ...]
    place: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """What the library makes of the image, and its label."""
        row = self.rows[index]
        return row[self.image], int(row[self.label])

    def name(self, index: int) -> str:
        """The data set's name, and the example's number."""
        return f"{self.place}[{index}]"


def _hugging_face(
    place: str, split: Split, image: str = "", label: str = "", **options: Any
) -> Records:
    datasets = _library("datasets", "hf")
    name, _, config = place.partition(":")
    splits = datasets.load_dataset(name, config or None, **options)
    rows = splits[_choose(place, split, splits)]
    image = _column(place, rows.features, datasets.Image, image)
    label = _column(place, rows.features, datasets.ClassLabel, label)
    classes = tuple(rows.features[label].names)
    return Records(rows.select_columns([image, label]), image, label, classes, f"hf:{place}")


def _column(place: str, features: Mapping[str, Any], kind: type, given: str) -> str:
    """The `given` column, or else the first of that kind."""
    for name, feature in features.items():
        if isinstance(feature, kind) and given in (name, ""):
            return name
    listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    wanted = f"{given} to be" if given else "one of"
    raise ValueError(f"{place}: found the columns {listed}, expected {wanted} {kind.__name__}")


def _tfds(place: str, split: Split, **options: Any) -> Records:
    tfds = _library("tensorflow_datasets", "tfds")
    splits = tfds.data_source(place, **options)
    info = tfds.builder(place, **{k: v for k, v in options.items() if k == "data_dir"}).info
    image, label = info.supervised_keys or ("image", "label")
    rows = splits[_choose(place, split, splits)]
    return Records(rows, image, label, tuple(info.features[label].names), f"tfds:{place}")


def _choose(place: str, split: Split, splits: Iterable[str]) -> str:
    wanted = ("train",) if split == "train" else ("test", "validation", "val", "valid")
    for name in wanted:
        if name in splits:
            return name
    raise ValueError(f"{place}: found the splits {', '.join(splits)}, expected {wanted[0]!r}")


def _library(name: str, kind: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.replace("_", "-")
        raise ModuleNotFoundError(
            f"data sets named {kind}:... need {package}: pip install {package}", name=error.name
        ) from error


KINDS: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion_mnist": _fashion,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "folder": _folder,
    "hf": _hugging_face,
    "tfds": _tfds,
}

_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/"
# Kind -> (where, file -> its SHA-256, as TensorFlow Datasets has recorded it).
PUBLISHED = {
    "mnist": ("https://storage.googleapis.com/cvdf-datasets/mnist/", {
        "train-images-idx3-ubyte.gz":
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz":
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz":
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz":
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }),
    "fashion_mnist": (_FASHION, {
        "train-images-idx3-ubyte.gz":
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz":
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz":
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz":
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    }),
    "cifar10": (_CIFAR_HOME, {
        "cifar-10-binary.tar.gz":
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    }),
    "cifar100": (_CIFAR_HOME, {
        "cifar-100-binary.tar.gz":
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    }),
}  # fmt: skip
