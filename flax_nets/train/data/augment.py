"""Augmentations, each a function (image, generator) -> image, from the papers and from today.

A recipe `compose`s some: of PIL images at first, of arrays from `pca_noise` or `normalize` on.

    compose(random_resized_crop(224), flip(), rand_augment(), normalize(), random_erasing(0.25))
    compose(resize(256), center_crop(224), normalize())  # to evaluate

They draw what torchvision's or timm's transformations of the same name draw, in the same order, and
give the same pixels for the same draws. `mix` is the one that takes a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageEnhance

from flax_nets.preprocess import MEAN, STD, Preprocess
from flax_nets.train.data.pipeline import Batch, Mix, Transform

Range = tuple[float, float]
Interpolation = Literal["nearest", "bilinear", "bicubic", "random"]  # "random": one of the last two
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": BILINEAR, "bicubic": BICUBIC}
# Of ImageNet's colours, for values in [0, 1]: variances' roots, and directions in columns, as the
# Torch port of ResNet publishes them (the AlexNet paper does not).
PCA_STD = (0.2175, 0.0188, 0.0045)
PCA = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def compose(*steps: Transform) -> Transform:
    """One transformation after the other.

    >>> image = Image.new("RGB", (500, 375))
    >>> compose(resize(256), center_crop(224))(image, np.random.default_rng(0)).size
    (224, 224)
    """

    def apply(image: Any, rng: np.random.Generator) -> Any:
        for step in steps:
            image = step(image, rng)
        return image

    return apply


def random_resized_crop(
    size: int,
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    interpolation: Interpolation = "bilinear",
    draft: bool = False,
) -> Transform:
    """A box of random area and shape, resized to size x size (Szegedy et al. 2014, section 6).

    Args:
      size: in pixels.
      scale: range of the area, as a share of the image's. Default 8% to all.
      ratio: range of width / height. Default 3/4 to 4/3.
      interpolation: Default "bilinear"; "random" is timm's, bilinear or bicubic.
      draft: decode a JPEG at 1/2, 1/4 or 1/8 where that leaves at least `size` pixels of the box.
        Faster for large images, and not bit for bit the same. Default False.
    """
    _range("scale", scale, 0, 1)
    _range("ratio", ratio, 1e-9, math.inf)

    def apply(image: Any, rng: np.random.Generator) -> Any:
        left, top, right, bottom = crop_box(image.size, scale, ratio, rng)
        method = _method(interpolation, rng)
        width, height = image.size
        if draft:
            wanted = (width * size / (right - left), height * size / (bottom - top))
            image.draft(None, (math.ceil(wanted[0]), math.ceil(wanted[1])))
        x, y = image.size[0] / width, image.size[1] / height
        box = (round(left * x), round(top * y), round(right * x), round(bottom * y))
        return image.crop(box).resize((size, size), method)

    return apply


def crop_box(
    size: tuple[int, int], scale: Range, ratio: Range, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) for `random_resized_crop`, in an image (width, height).

    Ten draws, and if none of them lies in the image, the largest central box with a shape in range.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = _integer(rng, height - h + 1), _integer(rng, width - w + 1)
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize(size: int, interpolation: Interpolation = "bilinear") -> Transform:
    """The shorter side becomes `size` pixels, the longer in proportion."""

    def apply(image: Any, rng: np.random.Generator) -> Any:
        return _resize(image, size, _method(interpolation, rng))

    return apply


def scale_jitter(
    low: int = 256, high: int = 512, interpolation: Interpolation = "bilinear"
) -> Transform:
    """The shorter side becomes `low` to `high` pixels, at random; then comes a `random_crop`.

    Simonyan and Zisserman 2014, section 3.1, have 256 to 512 for crops of 224.
    """
    _range("scale_jitter", (low, high), 1, math.inf)

    def apply(image: Any, rng: np.random.Generator) -> Any:
        return _resize(image, low + _integer(rng, high - low + 1), _method(interpolation, rng))

    return apply


def _resize(image: Any, size: int, method: Image.Resampling) -> Any:
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    return image.resize((size, long) if width <= height else (long, size), method)


def center_crop(size: int) -> Transform:
    """The middle, size x size pixels, with black around an image that is smaller."""

    def apply(image: Any, rng: np.random.Generator) -> Any:
        left, top = (_middle(side, size) for side in image.size)
        return image.crop((left, top, left + size, top + size))

    return apply


def _middle(side: int, size: int) -> int:
    return round((side - size) / 2) if side >= size else -((size - side) // 2)


def random_crop(
    size: int, padding: int = 0, mode: Literal["constant", "reflect", "edge"] = "constant"
) -> Transform:
    """size x size pixels from anywhere in the image, after `padding` pixels around it.

    For CIFAR 4 pixels of black are usual (He et al. 2015, section 4.2). Raises ValueError where the
    image is smaller.
    """

    def apply(image: Any, rng: np.random.Generator) -> Any:
        if padding:
            pixels = np.asarray(image)
            around = ((padding, padding),) * 2 + ((0, 0),) * (pixels.ndim - 2)
            image = Image.fromarray(np.pad(pixels, around, mode))
        width, height = image.size
        if min(width, height) < size:
            raise ValueError(f"random_crop: got an image of {image.size}, expected {size} at least")
        if width == height == size:
            return image
        top, left = _integer(rng, height - size + 1), _integer(rng, width - size + 1)
        return image.crop((left, top, left + size, top + size))

    return apply


def flip(p: float = 0.5) -> Transform:
    """Left and right swapped, with probability `p`."""
    _range("flip", (0, p), 0, 1)

    def apply(image: Any, rng: np.random.Generator) -> Any:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < p else image

    return apply


def color_jitter(
    brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Transform:
    """Each of them changed at random, in random order.

    Factors from 1 - x (or 0) to 1 + x; of the hue, shifts by up to `hue`, at most 0.5, of a turn.
    """
    _range("hue", (0, hue), 0, 0.5)
    _range("brightness, contrast, saturation", (0, min(brightness, contrast, saturation)), 0, 1e9)
    ranges = [(max(0.0, 1 - x), 1 + x) if x else None for x in (brightness, contrast, saturation)]
    ranges.append((-hue, hue) if hue else None)
    changes = (*(_enhance(name) for name in ("Brightness", "Contrast", "Color")), turn_hue)

    def apply(image: Any, rng: np.random.Generator) -> Any:
        order = rng.permutation(4)
        factors = [None if limits is None else rng.uniform(*limits) for limits in ranges]
        for which in order:
            if (factor := factors[which]) is not None:
                image = changes[which](image, factor)
        return image

    return apply


def _enhance(name: str) -> Callable[[Any, float], Any]:
    return lambda image, factor: getattr(ImageEnhance, name)(image).enhance(factor)


def turn_hue(image: Any, turn: float) -> Any:
    """The hue shifted by `turn` in [-0.5, 0.5]; a grey image stays as it is."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.int32(turn * 255).astype(np.uint8)  # it wraps around
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert(image.mode)


def pca_noise(
    std: float = 0.1,
    eigenvalues: Sequence[float] = PCA_STD,
    eigenvectors: Sequence[Sequence[float]] = PCA,
) -> Transform:
    """AlexNet's: a random sum of the principal components of the colours is added to all pixels.

    (Krizhevsky et al. 2012, section 4.1: p_i * alpha_i * lambda_i with alpha from a normal
    distribution of standard deviation 0.1.) What comes out is a float32 array on the scale of
    0 to 255, not clipped.

    Args:
      std: Default 0.1.
      eigenvalues, eigenvectors: [3] and [3, 3], vectors in columns, for colours in [0, 1]. Default:
        ImageNet's.
    """
    values, vectors = np.asarray(eigenvalues), np.asarray(eigenvectors)

    def apply(image: Any, rng: np.random.Generator) -> np.ndarray:
        pixels = np.asarray(image, np.float32)
        if pixels.shape[2:] != (3,):
            raise ValueError(f"pca_noise: got an image {pixels.shape}, expected [H, W, 3]")
        noise = vectors @ (rng.normal(0, std, 3) * values) * 255
        return pixels + noise.astype(np.float32)

    return apply


def normalize(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Transform:
    """(x / 255 - mean) / std in float32 [H, W, C], of a PIL image or an array from 0 to 255.

    Args:
      mean, std: per channel, for values in [0, 1]; one number serves all. Default: ImageNet's.
    """
    mean32, std32 = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not np.all(std32 > 0):
        raise ValueError(f"std: got {std}, expected numbers above 0")

    def apply(image: Any, rng: np.random.Generator) -> np.ndarray:
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        channels = pixels.size // (height * width)
        if not {mean32.size, std32.size} <= {1, channels}:
            raise ValueError(f"normalize: got {channels} channels, and mean {mean} and std {std}")
        x = pixels.reshape(height, -1).astype(np.float32)  # rows at once, 5 times as fast
        x /= np.float32(255)
        x -= np.resize(mean32, x.shape[1])
        x /= np.resize(std32, x.shape[1])
        return x.reshape(height, width, channels)

    return apply


def prepare(preprocess: Preprocess) -> Transform:
    """What `flax_nets.preprocess` does: to evaluate a network as its weights expect it."""

    def apply(image: Any, rng: np.random.Generator) -> np.ndarray:
        pixels: np.ndarray = preprocess(image)[0]
        return pixels

    return apply


def random_erasing(
    p: float = 0.5,
    area: Range = (0.02, 0.33),
    ratio: Range = (0.3, 3.3),
    fill: Literal["zeros", "pixels"] = "zeros",
) -> Transform:
    """A random box of a normalised image filled, with probability `p` (Zhong et al. 2017).

    Args:
      p: Default 0.5.
      area, ratio: ranges of its share of the image's area, and of height / width. Default:
        torchvision's. timm's are (0.02, 1/3) and (0.3, 1/0.3).
      fill: "zeros", the mean colour, or "pixels", normal noise. Default "zeros".
    """
    _range("random_erasing", (0, p), 0, 1)
    if fill not in ("zeros", "pixels"):
        raise ValueError(f'fill: got {fill!r}, expected "zeros" or "pixels"')

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() >= p:
            return image
        height, width, _ = image.shape
        for _ in range(10):
            size = height * width * rng.uniform(*area)
            shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            h, w = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
            if h < height and w < width:
                top, left = _integer(rng, height - h + 1), _integer(rng, width - w + 1)
                image = image.copy()
                box = image[top : top + h, left : left + w]
                box[...] = 0 if fill == "zeros" else rng.normal(0, 1, box.shape)
                break
        return image

    return apply


def mix(
    num_classes: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    *,
    p: float = 1.0,
    switch: float = 0.5,
    label_smoothing: float = 0.0,
) -> Mix:
    """mixup and cutmix, for `Pipeline`: each example mixed with its counterpart from the other end.

    (Zhang et al. 2017, Yun et al. 2019.) timm's `Mixup` by batches: one share lambda for all, and
    labels [N, num_classes] that say how much of which class there is. With cutmix they count the
    pixels.

    Args:
      num_classes: of the labels.
      mixup, cutmix: alpha of the distribution Beta(alpha, alpha) of lambda; 0: never.
      p: how many of the batches are mixed. Default: all.
      switch: how many of those by cutmix, where there are both. Default: half.
      label_smoothing: as a share of 1. Default 0. The loss must not smooth them again.
    """
    if min(mixup, cutmix) < 0 or not mixup + cutmix:
        raise ValueError(f"mix: got mixup={mixup} and cutmix={cutmix}, expected one above 0")
    for name, value in (("p", p), ("switch", switch), ("label_smoothing", label_smoothing)):
        _range(name, (0, value), 0, 1)

    def apply(batch: Batch, rng: np.random.Generator) -> Batch:
        image, share = batch["image"], 1.0
        if rng.random() < p:
            cut = cutmix > 0 and (not mixup or rng.random() < switch)
            share = rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup)
            if cut:
                image, share = _cut(image, share, rng)
            else:
                image = image * np.float32(share) + image[::-1] * np.float32(1 - share)
        label = np.full((len(image), num_classes), label_smoothing / num_classes, np.float32)
        label[np.arange(len(image)), batch["label"]] += 1 - label_smoothing
        label = label * np.float32(share) + label[::-1] * np.float32(1 - share)
        return batch | {"image": image, "label": label}

    return apply


def _cut(images: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A box of 1 - share of each image from its counterpart; the share that is left in truth."""
    height, width = images.shape[1:3]
    side = math.sqrt(1 - share)
    h, w = int(height * side), int(width * side)
    y, x = _integer(rng, height), _integer(rng, width)
    top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
    left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _method(interpolation: Interpolation, rng: np.random.Generator) -> Image.Resampling:
    if interpolation == "random":
        return (BILINEAR, BICUBIC)[_integer(rng, 2)]
    if interpolation not in FILTERS:
        expected = ", ".join([*FILTERS, "random"])
        raise ValueError(f"interpolation: got {interpolation!r}, expected {expected}")
    return FILTERS[interpolation]


def _integer(rng: np.random.Generator, below: int) -> int:
    return int(rng.integers(0, below))


def _range(name: str, given: Range, low: float, high: float) -> None:
    if not low <= given[0] <= given[1] <= high:
        raise ValueError(f"{name}: got {given}, expected numbers from {low} to {high}, rising")
