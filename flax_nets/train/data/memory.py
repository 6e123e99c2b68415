"""Data sets in memory, and batches of them whose order is a function of seed, epoch and position.

The handwritten digits are those that scikit-learn bundles: 1,797 images of the UCI collection
"Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images [N, H, W, C] in uint8, or float32 when normalised; labels [N] int32; class names."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """An image [H, W, C] and its label."""
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        """What to call an example in a message."""
        return f"image {index}"


def digits(split: Literal["train", "test"], size: int = 32, channels: int = 1) -> Dataset:
    """Real handwritten digits: 1,442 to train on, 355 held out.

    Of each class, in the file's order, every fifth image (the 5th, the 10th, ...) is held out, so
    the same hands wrote both parts. An image is 8 x 8 counts from 0 to 16, of the inked among 4 x 4
    pixels of a scan. They are divided by 8, less 1: -1 is paper and 1 is ink. Then they are resized
    (`resize`) and repeated for each channel. At 32 pixels, the size of the scans, all of that is
    exact in float32: any machine and framework gets the same bits.

    Args:
      split: "train" or "test".
      size: height and width in pixels. Default 32, LeNet-5's.
      channels: Default 1.

    Raises ValueError for another split, or for a size or a number of channels below 1.

    >>> digits("test").images.shape
    (355, 32, 32, 1)
    """
    if split not in ("train", "test"):
        raise ValueError(f'split: got {split!r}, expected "train" or "test"')
    if size < 1 or channels < 1:
        raise ValueError(f"got size={size} and channels={channels}, expected at least 1 of each")
    counts, labels = _load_digits()
    nth = np.empty(len(labels), np.int64)  # which one of its class an image is
    for digit in range(10):
        nth[labels == digit] = np.arange(np.sum(labels == digit))
    chosen = (nth % 5 == 4) == (split == "test")
    images = resize(counts[chosen] / 8 - 1, size).astype(np.float32)
    return Dataset(
        np.repeat(images[..., None], channels, axis=-1),
        labels[chosen].astype(np.int32),
        tuple("0123456789"),
    )


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, [N, H, W] -> [N, size, size], in the images' dtype.

    Pixels are areas, so that the centre of pixel i lies at i + 1/2, and edges extend outwards:
    `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
    """
    for axis in (1, 2):
        old = images.shape[axis]
        centre = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
        low = np.floor(centre).astype(np.int64)
        high = np.minimum(low + 1, old - 1)
        share = (centre - low).astype(images.dtype).reshape((-1,) + (1,) * (2 - axis))
        near, far = images.take(low, axis), images.take(high, axis)
        images = near * (1 - share) + far * share
    return images


Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def shift(pixels: int, fill: float = -1.0) -> Augment:
    """An augmentation for `Batches`: each image moved by up to `pixels`, at random, both ways.

    What comes in from outside is `fill`. Default -1, the paper around a digit.
    """
    if pixels < 0:
        raise ValueError(f"shift: got {pixels} pixels, expected at least 0")

    def move(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n, height, width, _ = images.shape
        around = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
        padded = np.pad(images, around, constant_values=fill)
        down, right = rng.integers(0, 2 * pixels + 1, (2, n, 1))
        rows, columns = down + np.arange(height), right + np.arange(width)
        return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]

    return move


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.images, loaded.target


@dataclasses.dataclass(frozen=True)
class Batches:
    """A data set in batches {"image", "label", "mask"}, all of one shape.

    Where the last batch of an epoch is short it is filled up with zeros, and `mask` [N] says so:
    1 for an example, 0 for filling. Training drops it instead (`drop_last`), since batch norm would
    take the filling for data; as every epoch is shuffled anew, it drops others each time.

    Args:
      data: the data set.
      batch_size: N.
      seed: of the order, a new one in every epoch; None: the data set's own order. Default None.
      drop_last: Default False.
      augment: (images, generator) -> images, such as `shift(4)`; needs a seed. Default: none.

    Raises ValueError for a batch size below 1 or one that leaves no batch, and for an augmentation
    without a seed.
    """

    data: Dataset
    batch_size: int
    seed: int | None = None
    drop_last: bool = False
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size: got {self.batch_size}, expected at least 1")
        if not len(self):
            raise ValueError(
                f"batch size: got {self.batch_size}, and there are only {len(self.data)} examples"
            )
        if self.augment and self.seed is None:
            raise ValueError("seed: got None, expected a number, since there is an augmentation")

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.data), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches of an epoch, from its `start`-th on.

        Each is a function of (seed, epoch, its number) alone.
        """
        order = np.arange(len(self.data))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        for i in range(start, len(self)):
            batch = self._batch(order[i * self.batch_size : (i + 1) * self.batch_size])
            if self.augment and self.seed is not None:
                rng = np.random.default_rng((self.seed, epoch, i + 1))  # (..., 0) is the order's
                batch["image"] = self.augment(batch["image"], rng)
            yield batch

    def _batch(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        missing = self.batch_size - len(chosen)

        def fill(x: np.ndarray) -> np.ndarray:
            return np.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) if missing else x

        return {
            "image": fill(self.data.images[chosen]),
            "label": fill(self.data.labels[chosen]),
            "mask": fill(np.ones(len(chosen), np.float32)),
        }
