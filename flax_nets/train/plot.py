"""Pictures of a run: matplotlib's figures without its global state and without a window system."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import flax_nets
from flax_nets.train.data import Dataset

INK, GREY, RULE = "#22262b", "#8a8f98", "#e3e5e8"
BLUE, GREEN, RED = "#2f6db5", "#2e8b57", "#c8413b"
Rows = Sequence[Mapping[str, float]]


def save_curves(path: str | os.PathLike[str], rows: Rows) -> None:
    """Loss and accuracy by epoch, as a PNG."""
    figure = _figure(9, 3.4)
    loss, accuracy = figure.subplots(1, 2)
    draw_curves(loss, accuracy, rows)
    figure.savefig(path)


def draw_curves(loss: Any, accuracy: Any, rows: Rows) -> None:
    """The same, each into its matplotlib axes."""
    epochs = [row["epoch"] for row in rows]
    for axes, what, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for split, label, colour in (("train", "training", GREY), ("test", "held out", BLUE)):
            values = [scale * row[f"{split}_{what}"] for row in rows]
            axes.plot(epochs, values, color=colour, lw=2, label=label, marker="o", ms=3.5)
        _title(axes, "Loss" if what == "loss" else "Accuracy, %")
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
        axes.grid(axis="y", color=RULE, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
    loss.legend(frameon=False, fontsize=9)


def save_demo(
    path: str | os.PathLike[str],
    model: Any,
    held_out: Dataset,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    rows: Rows,
) -> None:
    """The picture of `flax-nets demo`, as a PNG.

    Args:
      model: the LeNet-5 after training.
      held_out: the data set that it is tested on.
      before, after: "loss", "accuracy" and "probabilities" [N, 10] on it.
      rows: of `fit`.
    """
    labels = held_out.labels
    answers = [figures["probabilities"].argmax(1) for figures in (before, after)]
    wrong = [answer != labels for answer in answers]
    # The hardest first: both wrong, one wrong, then those that the network is least sure of.
    order = np.lexsort((after["probabilities"].max(1), -wrong[1].astype(int), -sum(wrong)))
    learned = [i for i in order if wrong[0][i] and not wrong[1][i]] or list(order)

    figure = _figure(13, 10)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.8))
    image, answer = held_out.images[learned[0]], after["probabilities"][learned[0]]
    _draw_inside(top, model, image, answer, labels[learned[0]])
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 1.25))
    _draw_digits(left.subplots(), held_out, answers, order[:36])
    curves, matrix = right.subfigures(2, 1, height_ratios=(1, 1.75))
    loss, accuracy = curves.subplots(1, 2)
    draw_curves(loss, accuracy, rows)
    for axes, value in ((loss, before["loss"]), (accuracy, 100 * before["accuracy"])):
        axes.axhline(value, color=GREEN, lw=1.3, ls="--", label="PyTorch's checkpoint, held out")
    loss.legend(frameon=False, fontsize=8)
    _draw_confusion(matrix.subplots(), labels, answers[1])
    figure.savefig(path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=120, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=INK, fontweight="bold")


def _draw_inside(
    figure: Any, model: Any, image: np.ndarray, probabilities: np.ndarray, label: int
) -> None:
    """One digit on its way through the network."""
    maps = flax_nets.features(model, jnp.asarray(image[None]), ["conv1", "conv2"])
    first, second = (np.tanh(np.asarray(maps[name])[0]) for name in ("conv1", "conv2"))
    seen, conv1, conv2, bars = figure.subplots(1, 4, width_ratios=(1, 1.5, 2, 1.5))
    _image(seen, image[..., 0], "gray_r")
    _title(seen, f"A held-out {label} ...")
    _image(conv1, _tiles(first, 2), "RdBu_r")
    _title(conv1, "... in the 6 maps of conv1 ...")
    _image(conv2, _tiles(second, 3), "RdBu_r")
    _title(conv2, "... in the 16 maps of conv2 ...")
    answer = int(probabilities.argmax())
    colours = [RULE] * 10
    colours[answer] = GREEN if answer == label else RED
    bars.bar(range(10), probabilities, color=colours)
    _title(bars, f"... is a {answer}, says Flax: {probabilities[answer]:.0%}")
    bars.set_ylim(0, 1.02)
    bars.set_box_aspect(1 / 1.5)
    bars.set_xticks(range(10))
    bars.set_yticks([])
    bars.tick_params(labelsize=9, length=0, labelcolor=INK)
    bars.spines[["top", "right", "left"]].set_visible(False)
    bars.spines["bottom"].set_color(GREY)


def _draw_digits(
    axes: Any, held_out: Dataset, answers: Sequence[np.ndarray], shown: np.ndarray
) -> None:
    """A square of digits, above each the answers of the network before and after training."""
    side, above, gap = held_out.images.shape[1], 12, 6
    columns = math.isqrt(len(shown))
    for n, i in enumerate(shown):
        y, x = (side + above + gap) * (n // columns), (side + gap) * (n % columns)
        box = (x, x + side, y + side, y)
        axes.imshow(held_out.images[i, ..., 0], cmap="gray_r", vmin=-1, vmax=1, extent=box)
        for answer, dx, weight in zip(answers, (-5, 5), ("normal", "bold"), strict=True):
            colour = GREEN if answer[i] == held_out.labels[i] else RED
            said = dict(color=colour, fontweight=weight, fontsize=11, ha="center", va="center")
            axes.text(x + side / 2 + dx, y - above / 2, str(answer[i]), **said)
        axes.plot(*_outline(x, y, side), color=colour, lw=1.6)
    axes.set_xlim(-1, columns * (side + gap) - gap + 1)
    axes.set_ylim(columns * (side + above + gap) - gap - above + 1, -above - 1)
    axes.set_axis_off()
    _title(axes, "The hardest held-out digits: PyTorch's answer, then Flax's")


def _outline(x: float, y: float, side: float) -> tuple[Sequence[float], Sequence[float]]:
    right, low = x + side, y + side
    return (x, right, right, x, x), (y, y, low, low, y)


def _draw_confusion(axes: Any, labels: np.ndarray, answers: np.ndarray) -> None:
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, answers), 1)
    axes.imshow(np.sqrt(counts), cmap="Blues", vmax=1.25 * np.sqrt(counts.max()))
    for row, column in zip(*np.nonzero(counts), strict=True):
        said = dict(color="white" if row == column else RED, fontweight="bold", fontsize=9)
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", **said)
    _title(axes, f"Answers of Flax now: {np.trace(counts)} of {len(labels)} right")
    axes.set_xlabel("answer", fontsize=9, color=INK)
    axes.set_ylabel("digit", fontsize=9, color=INK)
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.tick_params(labelsize=9, length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)


def _tiles(maps: np.ndarray, rows: int) -> np.ndarray:
    """Maps [H, W, C] side by side in `rows` rows, with gaps that nothing is drawn in."""
    height, width, channels = maps.shape
    columns, gap = -(-channels // rows), max(1, width // 10)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for c in range(channels):
        y, x = (height + gap) * (c // columns), (width + gap) * (c % columns)
        sheet[y : y + height, x : x + width] = maps[..., c]
    return sheet


def _image(axes: Any, values: np.ndarray, colours: str) -> None:
    """Values from -1 to 1."""
    axes.imshow(values, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
