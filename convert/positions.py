"""Position embeddings of a Vision Transformer for another image size, as each library does it.

All of them resize the grid of patches by bicubic interpolation and keep the other tokens; they
differ in the rest. Written with one matrix per axis, in float64.
"""

from __future__ import annotations

import math

import numpy as np

# Library -> (the kernel's free parameter, what stays in place, whether shrinking averages):
# torchvision's `interpolate_embeddings`, timm's `resample_abs_pos_embed`, and the
# `interpolate_pos_encoding` of transformers.
METHODS = {
    "torchvision": (-0.75, "corners", False),
    "timm": (-0.5, "borders", True),
    "transformers": (-0.75, "borders", False),
}


def resize(positions: np.ndarray, tokens: int, side: int, method: str) -> np.ndarray:
    """Positions [1, tokens + n * n, width] -> [1, tokens + side * side, width], of the same dtype.

    Args:
      tokens: how many come first that are no patches (class and distillation token).
      side: patches along each side of the new image.
      method: a key of `METHODS`.

    Raises ValueError where the patches make no square.
    """
    patches, width = positions.shape[1] - tokens, positions.shape[-1]
    old = math.isqrt(max(patches, 0))
    if old**2 != patches or not old:
        raise ValueError(f"{patches} positions of patches make no square: they cannot be resized")
    grid = positions[0, tokens:].astype(np.float64).reshape(old, old, width)
    weights = matrix(old, side, method)
    grid = np.einsum("yh,xw,hwc->yxc", weights, weights, grid, optimize=True)
    resized = grid.reshape(1, side * side, width).astype(positions.dtype)
    return np.concatenate([positions[:, :tokens], resized], 1)


def matrix(old: int, new: int, method: str) -> np.ndarray:
    """The weights [new, old] of bicubic interpolation along one axis; each row sums to 1."""
    a, fixed, averages = METHODS[method]
    if fixed == "corners":
        centres = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    else:
        centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    stretch = max(old / new, 1.0) if averages else 1.0
    reach = math.ceil(2 * stretch) + 1
    weights = np.zeros((new, old))
    for row, centre in zip(weights, centres, strict=True):
        columns = np.arange(math.floor(centre) - reach, math.floor(centre) + reach + 1)
        found = cubic((columns - centre) / stretch, a)
        if averages:  # what lies outside counts for nothing, or else for the nearest pixel
            found = np.where((columns >= 0) & (columns < old), found, 0.0)
        np.add.at(row, columns.clip(0, old - 1), found / found.sum())
    return weights


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981), whose slope at 1 is `a`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
