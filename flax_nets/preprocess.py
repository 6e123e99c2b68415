"""From an image to what a network takes, as torchvision and timm do it.

pre = flax_nets.preprocess.for_weights("resnet50", "DEFAULT")
logits = model(pre("cat.jpg"))                        # or pre(["cat.jpg", "dog.png"])

pre = flax_nets.preprocess.for_model(model)           # of the weights that the model was made with

Pillow resizes, with antialiasing, so that the pixels are those of the two libraries, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
Size = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Resize, crop, scale to [0, 1], normalise.

    Args:
      image_size: of what comes out, in pixels: (height, width), or one number for both.
        Default 224.
      resize_size: likewise, what the image is resized to before the crop. Default: by `crop_pct`.
      crop_pct: instead of it, the share of the resized image's side that the crop keeps, as timm
        has it. Default: 0.875.
      crop_mode: "center" resizes until the image covers `resize_size`, and crops; "squash" resizes
        to it, whatever the shape was; "border" resizes until the image fits into it, and fills up
        with the mean. Default "center".
      interpolation: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos". Default
        "bilinear".
      mean, std: of the channels, for pixels in [0, 1]; as many as the network has channels (one:
        images become grey). Default: ImageNet's.
      crop_offset: how half a pixel of the crop's place is rounded: "even" as torchvision and timm
        do, or "down" as transformers does. Default "even".

    Call: an image or a sequence of them -> [N, height, width, channels], float32. An image is a
    path, a PIL image, or an array of uint8, [H, W] or [H, W, C]; an array [N, H, W, C] is a
    sequence. Transparency is dropped and EXIF orientation ignored, as in both libraries.

    Raises ValueError for an argument that is none of these, and for a file that is no image, by its
    name.

    >>> import numpy as np
    >>> Preprocess(image_size=224, resize_size=256)(np.zeros((300, 400, 3), np.uint8)).shape
    (1, 224, 224, 3)
    """

    image_size: Size = 224
    resize_size: Size | None = None
    crop_pct: dataclasses.InitVar[float | None] = None
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    crop_offset: str = "even"

    def __post_init__(self, crop_pct: float | None) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        image_size, resize_size = _pair("image_size", self.image_size), self.resize_size
        if resize_size is not None and crop_pct is not None:
            raise ValueError(
                f"resize_size={resize_size} and crop_pct={crop_pct} say the same thing: give one"
            )
        if resize_size is None:
            share = 0.875 if crop_pct is None else crop_pct
            if not 0 < share <= 1:
                raise ValueError(f"crop_pct: got {share}, expected a number above 0 and up to 1")
            resize_size = tuple(math.floor(side / share) for side in image_size)
        put("image_size", image_size)
        put("resize_size", _pair("resize_size", resize_size))
        put("mean", tuple(map(float, self.mean)))
        put("std", tuple(map(float, self.std)))
        for name, known in (
            ("crop_mode", CROP_MODES),
            ("interpolation", INTERPOLATIONS),
            ("crop_offset", ("even", "down")),
        ):
            if getattr(self, name) not in known:
                got = getattr(self, name)
                raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(known)}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or 0 in self.std:
            raise ValueError(
                f"mean and std: got {self.mean} and {self.std}, expected 1 or 3 numbers each, and "
                "no deviation of 0"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of what comes out."""
        return *_pair("image_size", self.image_size), len(self.mean)

    def __call__(self, images: Any) -> np.ndarray:
        single = isinstance(images, str | os.PathLike) or not isinstance(images, Sequence)
        if isinstance(images, np.ndarray) and images.ndim == 4:
            single = False
        prepared = [self._one(image) for image in ([images] if single else images)]
        if not prepared:
            return np.zeros((0, *self.shape), np.float32)
        return np.stack(prepared)

    def _one(self, image: Any) -> np.ndarray:
        picture = open_image(image, "RGB" if len(self.mean) == 3 else "L")
        picture = self._crop(self._resize(picture))
        pixels = np.asarray(picture, np.float32).reshape(self.shape) / np.float32(255)
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _resize(self, picture: Any) -> Any:
        from PIL import Image

        width, height = picture.size
        goal_height, goal_width = _pair("resize_size", self.resize_size)
        if self.crop_mode == "squash":
            size = goal_width, goal_height
        elif self.crop_mode == "center" and goal_height == goal_width:  # torchvision rounds down
            short = min(width, height)
            size = int(goal_width * width / short), int(goal_width * height / short)
        else:
            best = min if self.crop_mode == "center" else max
            ratio = best(height / goal_height, width / goal_width)
            size = round(width / ratio), round(height / ratio)
        if 0 in size:
            raise ValueError(f"an image of {width} x {height} pixels is too thin for {self}")
        if size == picture.size:
            return picture
        return picture.resize(size, Image.Resampling[self.interpolation.upper()])

    def _crop(self, picture: Any) -> Any:
        from PIL import ImageOps

        height, width, _ = self.shape
        missing = max(width - picture.width, 0), max(height - picture.height, 0)
        if any(missing):
            border = (*(m // 2 for m in missing), *((m + 1) // 2 for m in missing))
            picture = ImageOps.expand(picture, border, fill=self._fill())
        half = round if self.crop_offset == "even" else math.floor
        left = half((picture.width - width) / 2)
        top = half((picture.height - height) / 2)
        return picture.crop((left, top, left + width, top + height))

    def _fill(self) -> int | tuple[int, ...]:
        if self.crop_mode != "border":
            return 0
        levels = tuple(round(255 * value) for value in self.mean)
        return levels if len(levels) > 1 else levels[0]


def open_image(image: Any, mode: str = "RGB") -> Any:
    """A PIL image of a path, of an array of uint8 [H, W] or [H, W, C], or of a PIL image.

    Raises ValueError that names the file, or the array's shape and type.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as opened:
                return opened.convert(mode)
        except FileNotFoundError as error:
            raise ValueError(f"{os.fspath(image)}: there is no such file") from error
        except Exception as error:  # a damaged file raises a dozen different types
            why = str(error).splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"{os.fspath(image)}: no image that can be read ({why[0]})") from error
    if isinstance(image, Image.Image):
        return image.convert(mode)
    if not hasattr(image, "__array__"):
        raise ValueError(f"an image: got {type(image).__name__}, expected a path, PIL's, or array")
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise ValueError(
            f"an image: got an array {array.shape} of {array.dtype}, expected uint8, "
            "[H, W] or [H, W, C] with 1, 3 or 4 channels"
        )
    return Image.fromarray(array).convert(mode)


def for_weights(
    name: str, weights: str | os.PathLike[str] = "DEFAULT", test_size: bool = False
) -> Preprocess:
    """What some weights of the network `name` expect.

    Args:
      name: a network's.
      weights: whatever `create_model` takes. Of weights that were published, as the table says; of
        a repository or a path, as `preprocessor_config.json` or `config.json` beside them say.
      test_size: at the size at which timm evaluates them, where it has one. Default False: the size
        that they were trained at, which is timm's own default too.

    Nothing is downloaded for weights in the table. Raises ValueError where nobody says it: then a
    `Preprocess` has to be made by hand.

    >>> from flax_nets import preprocess
    >>> preprocess.for_weights("resnet50", "IMAGENET1K_V2").resize_size
    (232, 232)
    """
    from flax_nets.weights import published, source

    if isinstance(weights, str):
        try:
            entry = published.find(name, weights)
        except ValueError:
            pass
        else:
            return entry.test if test_size and entry.test else entry.preprocess
    path = source.fetch(name, weights)
    found = beside(path)
    if found is None:
        raise ValueError(
            f"{path}: neither preprocessor_config.json nor config.json beside it says what images "
            "it expects; flax_nets.preprocess.Preprocess can be made by hand"
        )
    return found


def for_model(model: Any) -> Preprocess:
    """What a model from `create_model` expects: what its weights do, at the model's own size.

    Where nothing says it (random weights, a lone checkpoint) it is the network's usual: that of its
    best-known published weights, else its image size with ImageNet's mean and deviation, and for
    one channel plain values from 0 to 1.
    """
    spec = model.spec
    height, width, channels = spec.input_shape
    found = None
    if spec.weights is not None:
        try:
            found = for_weights(spec.name, spec.weights)
        except ValueError:
            found = None
    return found or usual(spec.name, (height, width), channels)


def usual(name: str, image_size: tuple[int, int], channels: int) -> Preprocess:
    """For weights of which nobody says what they expect."""
    from flax_nets.weights.published import of

    known = of(name)
    if channels != 3:
        return Preprocess(image_size, crop_pct=1.0, mean=(0.0,), std=(1.0,))
    if not known:
        return Preprocess(image_size)
    found = next((w for w in known if w.default), known[0]).preprocess
    return found if found.image_size == image_size else _scaled(found, image_size)


def _scaled(found: Preprocess, image_size: tuple[int, int]) -> Preprocess:
    sizes = zip(found.resize_size, found.image_size, image_size, strict=True)  # type: ignore[arg-type]
    resize = tuple(round(new * before / after) for before, after, new in sizes)
    return dataclasses.replace(found, image_size=image_size, resize_size=resize)


def beside(path: str | os.PathLike[str]) -> Preprocess | None:
    """What the configuration beside a checkpoint says: transformers' or timm's; None without one.

    Raises ValueError for one that says something else than `Preprocess` can do.
    """
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    ours = read_json(folder / "preprocessor_config.json")
    if ours:
        return _of_transformers(folder, ours)
    config = read_json(folder / "config.json").get("pretrained_cfg")
    return _of_timm(config) if isinstance(config, Mapping) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is none; ValueError that names a damaged one."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def _of_timm(config: Mapping[str, Any]) -> Preprocess:
    return Preprocess(
        image_size=config.get("input_size", (3, 224, 224))[1:],
        crop_pct=config.get("crop_pct") or 0.875,
        crop_mode=config.get("crop_mode") or "center",
        interpolation=config.get("interpolation") or "bicubic",
        mean=config.get("mean") or MEAN,
        std=config.get("std") or STD,
    )


def _of_transformers(folder: Path, config: Mapping[str, Any]) -> Preprocess:
    """Its image processors for ViT, ConvNeXt (which its ResNets use) and MobileNet v1 and v2."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    kind = kind.removesuffix("FeatureExtractor").removesuffix("ImageProcessor")
    if kind not in ("ViT", "DeiT", "ConvNext", "MobileNetV1", "MobileNetV2"):
        raise ValueError(
            f"{folder / 'preprocessor_config.json'}: the image processor {kind!r} is not known; "
            "expected ViT's, DeiT's, ConvNext's, MobileNetV1's or MobileNetV2's"
        )
    usual = {"ConvNext": 384, "MobileNetV1": 256, "MobileNetV2": 256, "DeiT": 256}.get(kind, 224)
    size = _edges(config.get("size", usual))
    resample = config.get("resample", 3 if kind in ("ConvNext", "DeiT") else 2)
    mode = "center" if kind.startswith("MobileNet") else "squash"
    image_size = size
    if kind == "ConvNext" and min(size) < 384:
        mode, crop_pct = "center", config.get("crop_pct") or 0.875
        size = int(size[0] / crop_pct), int(size[1] / crop_pct)
    elif config.get("do_center_crop", kind in ("DeiT", "MobileNetV1", "MobileNetV2")):
        image_size = _edges(config.get("crop_size", 224))
    half = (0.5, 0.5, 0.5)
    return Preprocess(
        image_size=image_size,
        resize_size=size,
        crop_mode=mode,
        interpolation={0: "nearest", 1: "lanczos", 3: "bicubic"}.get(resample, "bilinear"),
        mean=config.get("image_mean") or half,
        std=config.get("image_std") or half,
        crop_offset="down",
    )


def _edges(size: Any) -> tuple[int, int]:
    """(height, width) of transformers' sizes: a number, or a dict by height or shortest edge."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        return (edge, edge) if edge else (size["height"], size["width"])
    return _pair("size", size)


def _pair(name: str, size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"{name}: got {size!r}, expected a number of pixels, or height and width")
    return pair
