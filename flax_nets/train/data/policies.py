"""AutoAugment, RandAugment and TrivialAugment, on PIL images, as torchvision and as timm do them.

The two libraries differ: in the range and in the direction of the magnitudes, in the operations,
and in the probability of each. A published recipe means one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from flax_nets.train.data.pipeline import Transform

Fill = int | Sequence[int]
NEAREST, AFFINE = Image.Resampling.NEAREST, Image.Transform.AFFINE
BLENDS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # timm draws one of them
TIMM_FILL = (128, 128, 128)


def _affine(matrix: Callable[[float], tuple[float, ...]]) -> Callable[..., Any]:
    def apply(image: Any, m: float, method: Image.Resampling, fill: Any) -> Any:
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix(m), method, fillcolor=fill
        )

    return apply


def _rotate(image: Any, degrees: float, method: Image.Resampling, fill: Any) -> Any:
    return image.rotate(degrees, method, fillcolor=fill)


def _enhance(name: str) -> Callable[..., Any]:
    return lambda image, factor, *_: getattr(ImageEnhance, name)(image).enhance(factor)


def _posterize(image: Any, bits: float, *_: Any) -> Any:
    """The highest `bits` of 8. Of none it is black, which Pillow's own refuses since release 13."""
    kept = 256 - (1 << (8 - int(bits)))
    return image.point([i & kept for i in range(256)] * len(image.getbands()))


def _solarize_add(image: Any, add: int, *_: Any) -> Any:
    """`add` to the values below 128."""
    table = [min(255, i + add) if i < 128 else i for i in range(256)]
    return image.point(table * len(image.getbands()))


# Name -> (image, magnitude, interpolation, fill) -> image. A matrix tells where each pixel comes
# from, so that a positive translation moves the image left or up.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "Identity": lambda image, *_: image,
    "ShearX": _affine(lambda m: (1, m, 0, 0, 1, 0)),
    "ShearY": _affine(lambda m: (1, 0, 0, m, 1, 0)),
    "TranslateX": _affine(lambda m: (1, 0, m, 0, 1, 0)),
    "TranslateY": _affine(lambda m: (1, 0, 0, 0, 1, m)),
    "Rotate": _rotate,
    "Brightness": _enhance("Brightness"),
    "Color": _enhance("Color"),
    "Contrast": _enhance("Contrast"),
    "Sharpness": _enhance("Sharpness"),
    "Posterize": _posterize,
    "Solarize": lambda image, threshold, *_: ImageOps.solarize(image, threshold),
    "SolarizeAdd": _solarize_add,
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
}
ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")


# torchvision's: magnitude 0 does nothing, the last one most.


class _Space:
    """What a magnitude from 0 to bins - 1 means for an operation, and whether it has a sign."""

    def __init__(self, bins: int, size: tuple[int, int], wide: bool = False):
        self.bins, self.dropped_bits = bins, 6 if wide else 4
        self.tops = {"ShearX": 0.99, "ShearY": 0.99, "Rotate": 135.0}
        self.tops |= {"TranslateX": 32.0, "TranslateY": 32.0} | dict.fromkeys(ENHANCEMENTS, 0.99)
        if not wide:
            sides = {"TranslateX": 150 / 331 * size[0], "TranslateY": 150 / 331 * size[1]}
            self.tops = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0} | sides
            self.tops |= dict.fromkeys(ENHANCEMENTS, 0.9)

    def __call__(self, name: str, level: int) -> tuple[float, bool]:
        if name in self.tops:
            return _part(self.tops[name], level, self.bins), True
        if name == "Posterize":
            return 8 - round(level * self.dropped_bits / (self.bins - 1)), False
        if name == "Solarize":
            return 255 - _part(255.0, level, self.bins), False
        return 0.0, False


def _part(top: float, level: int, bins: int) -> float:
    """top * level / (bins - 1), rounded like `torch.linspace`: so each pixel is torchvision's."""
    top = float(np.float32(top))
    step = float(np.float32(top) / np.float32(bins - 1))
    low = level < bins // 2
    return float(np.float32(step * level if low else top - step * (bins - 1 - level)))


def _apply(image: Any, name: str, magnitude: float, method: Image.Resampling, fill: Fill) -> Any:
    """With torchvision's meaning of the magnitude."""
    if name in ENHANCEMENTS:
        magnitude += 1
    elif name in ("TranslateX", "TranslateY"):
        magnitude = -int(magnitude)
    return OPERATIONS[name](image, magnitude, method, _filling(image, fill))


def _filling(image: Any, fill: Fill) -> Any:
    """A colour of the image's mode."""
    bands = len(image.getbands())
    colour = (fill,) * bands if isinstance(fill, int) else tuple(fill)[:bands]
    return colour if bands > 1 else colour[0]


RAND = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
        "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")  # fmt: skip


def rand_augment(
    operations: int = 2,
    magnitude: int = 9,
    bins: int = 31,
    method: Image.Resampling = NEAREST,
    fill: Fill = 0,
) -> Transform:
    """torchvision's `RandAugment` (Cubuk et al. 2019): `operations` of 14, drawn anew each time.

    Args:
      operations: how many, one after the other. Default 2.
      magnitude: of all of them, from 0 to bins - 1. Default 9.
      bins: Default 31.
      method: interpolation. Default: nearest.
      fill: the colour of what comes in from outside. Default: black.
    """
    if not 0 <= magnitude < bins or bins < 2:
        raise ValueError(f"magnitude: got {magnitude}, expected 0 to {bins - 1}")

    def apply(image: Any, rng: np.random.Generator) -> Any:
        space = _Space(bins, image.size)
        for _ in range(operations):
            name = RAND[int(rng.integers(0, len(RAND)))]
            value, signed = space(name, magnitude)
            if signed and rng.integers(0, 2):
                value = -value
            image = _apply(image, name, value, method, fill)
        return image

    return apply


def trivial_augment(
    bins: int = 31, method: Image.Resampling = NEAREST, fill: Fill = 0
) -> Transform:
    """torchvision's `TrivialAugmentWide` (Müller and Hutter 2021): one of 14, of any magnitude.

    Args:
      bins: how many magnitudes there are. Default 31.
      method, fill: as in `rand_augment`.
    """
    if bins < 2:
        raise ValueError(f"bins: got {bins}, expected at least 2")

    def apply(image: Any, rng: np.random.Generator) -> Any:
        space = _Space(bins, image.size, wide=True)
        name = RAND[int(rng.integers(0, len(RAND)))]
        level = 0
        if name not in ("Identity", "AutoContrast", "Equalize"):
            level = int(rng.integers(0, bins))
        value, signed = space(name, level)
        if signed and rng.integers(0, 2):
            value = -value
        return _apply(image, name, value, method, fill)

    return apply


# AutoAugment's policies (Cubuk et al. 2018, Tables 9 and 7): two operations in a line, each with
# its probability in tenths and its magnitude from 0 to 9.
POLICIES = {
    "imagenet": """
        Posterize 4 8, Rotate 6 9
        Solarize 6 5, AutoContrast 6 0
        Equalize 8 0, Equalize 6 0
        Posterize 6 7, Posterize 6 6
        Equalize 4 0, Solarize 2 4
        Equalize 4 0, Rotate 8 8
        Solarize 6 3, Equalize 6 0
        Posterize 8 5, Equalize 10 0
        Rotate 2 3, Solarize 6 8
        Equalize 6 0, Posterize 4 6
        Rotate 8 8, Color 4 0
        Rotate 4 9, Equalize 6 0
        Equalize 0 0, Equalize 8 0
        Invert 6 0, Equalize 10 0
        Color 6 4, Contrast 10 8
        Rotate 8 8, Color 10 2
        Color 8 8, Solarize 8 7
        Sharpness 4 7, Invert 6 0
        ShearX 6 5, Equalize 10 0
        Color 4 0, Equalize 6 0
        Equalize 4 0, Solarize 2 4
        Solarize 6 5, AutoContrast 6 0
        Invert 6 0, Equalize 10 0
        Color 6 4, Contrast 10 8
        Equalize 8 0, Equalize 6 0
    """,
    "cifar10": """
        Invert 1 0, Contrast 2 6
        Rotate 7 2, TranslateX 3 9
        Sharpness 8 1, Sharpness 9 3
        ShearY 5 8, TranslateY 7 9
        AutoContrast 5 0, Equalize 9 0
        ShearY 2 7, Posterize 3 7
        Color 4 3, Brightness 6 7
        Sharpness 3 9, Brightness 7 9
        Equalize 6 0, Equalize 5 0
        Contrast 6 7, Sharpness 6 5
        Color 7 7, TranslateX 5 8
        Equalize 3 0, AutoContrast 4 0
        TranslateY 4 3, Sharpness 2 6
        Brightness 9 6, Color 2 8
        Solarize 5 2, Invert 0 0
        Equalize 2 0, AutoContrast 6 0
        Equalize 2 0, Equalize 6 0
        Color 9 9, Equalize 6 0
        AutoContrast 8 0, Solarize 2 8
        Brightness 1 3, Color 7 0
        Solarize 4 5, AutoContrast 9 0
        TranslateY 9 9, TranslateY 7 9
        AutoContrast 9 0, Solarize 8 3
        Equalize 8 0, Invert 1 0
        TranslateY 7 9, AutoContrast 9 0
    """,
}


def policy(name: str) -> list[list[tuple[str, float, int]]]:
    """AutoAugment's pairs of (operation, probability, magnitude)."""
    if name not in POLICIES:
        raise ValueError(f"policy: got {name!r}, expected {' or '.join(POLICIES)}")
    lines = POLICIES[name].strip().splitlines()
    pairs = [[step.split() for step in line.split(",")] for line in lines]
    return [[(op, int(tenths) / 10, int(level)) for op, tenths, level in pair] for pair in pairs]


def auto_augment(
    name: Literal["imagenet", "cifar10"] = "imagenet",
    method: Image.Resampling = NEAREST,
    fill: Fill = 0,
) -> Transform:
    """torchvision's `AutoAugment` (Cubuk et al. 2018): one of 25 pairs that a search has found.

    Args:
      name: the data set they were found on. Default "imagenet".
      method, fill: as in `rand_augment`.
    """
    pairs = policy(name)

    def apply(image: Any, rng: np.random.Generator) -> Any:
        space = _Space(10, image.size)
        pair = pairs[int(rng.integers(0, len(pairs)))]
        chances, signs = rng.random(2), rng.integers(0, 2, 2)
        for (operation, probability, level), chance, sign in zip(pair, chances, signs, strict=True):
            if chance <= probability:
                value, signed = space(operation, level)
                value = -value if signed and sign == 0 else value
                image = _apply(image, operation, value, method, fill)
        return image

    return apply


# timm's: of Google's implementation for EfficientNet, with additions.

TIMM = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
        "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX",
        "TranslateY")  # fmt: skip


def timm_rand_augment(config: str = "rand-m9-mstd0.5-inc1", fill: Fill = TIMM_FILL) -> Transform:
    """timm's `rand_augment_transform`: two of 15 operations, each applied with probability 1/2.

    Args:
      config: "rand" and, joined by "-", m: the magnitude (default 10), n: how many operations
        (default 2), p: the probability of each (default 0.5), mstd: the standard deviation of the
        magnitude (default 0; above 100: uniform from 0), mmax: its maximum (default 10), inc1: more
        magnitude is more change for all operations (default: not for all).
      fill: Default: grey. timm's training script fills with the mean colour of normalisation.

    >>> image = Image.new("RGB", (32, 32))
    >>> timm_rand_augment("rand-m7-mstd0.5-inc1")(image, np.random.default_rng(0)).size
    (32, 32)
    """
    given = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "mmax": 10.0, "inc": 0.0}
    first, *parts = config.split("-")
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", part)
        if not match or match[1] not in given:
            raise ValueError(f"{config}: got {part!r}, expected a number behind {', '.join(given)}")
        given[match[1]] = float(match[2])
    if first != "rand":
        raise ValueError(f"{config}: got {first!r} in front, expected 'rand'")
    most, increasing = given["mmax"] or 10.0, bool(given["inc"])

    def apply(image: Any, rng: np.random.Generator) -> Any:
        for choice in rng.integers(0, len(TIMM), int(given["n"])):
            if given["p"] < 1 and rng.random() > given["p"]:
                continue
            level = given["m"]
            if given["mstd"] > 100:
                level = rng.uniform(0, level)
            elif given["mstd"]:
                level = rng.normal(level, given["mstd"])
            name, share = TIMM[choice], max(0.0, min(level, most)) / 10
            value = _timm_value(name, share, increasing, image.size, rng)
            moves = name.startswith(("Rotate", "Shear", "Translate"))
            method = BLENDS[int(rng.integers(0, 2))] if moves else NEAREST
            image = OPERATIONS[name](image, value, method, _filling(image, fill))
        return image

    return apply


def _timm_value(
    name: str, share: float, increasing: bool, size: tuple[int, int], rng: np.random.Generator
) -> float:
    """What a tenth of the magnitude means for an operation."""

    def signed(value: float) -> float:
        return -value if rng.random() > 0.5 else value

    if name == "Rotate":
        return signed(share * 30.0)
    if name in ("ShearX", "ShearY"):
        return signed(share * 0.3)
    if name in ("TranslateX", "TranslateY"):
        return signed(share * 0.45) * size[name == "TranslateY"]
    if name in ENHANCEMENTS:
        return max(0.1, 1 + signed(share * 0.9)) if increasing else share * 1.8 + 0.1
    if name == "Posterize":
        bits = int(share * 4)
        return min(8, 4 - bits if increasing else bits)
    if name == "Solarize":
        threshold = min(256, int(share * 256))
        return 256 - threshold if increasing else threshold
    return min(128, int(share * 110))  # SolarizeAdd; the others have no magnitude
