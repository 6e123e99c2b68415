"""`flax-nets predict`: the classes of images, with their probabilities."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_nets.cli import Parser

BATCH = 16
PLOTTED = 40  # images at most


def predict_command(argv: list[str]) -> int:
    """`flax-nets predict`."""
    args = _parser().parse_args(argv)
    if args.top < 1:
        raise ValueError(f"--top: got {args.top}, expected at least 1")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise ValueError(
            f"--plot: got {args.plot}, expected a name that ends in .png, .pdf or .svg"
        )
    paths = find_images(args.images)
    model, names = load(args.model, args.weights)
    rows = []
    for row in predict(model, paths, names, args.top):
        rows.append(row)
        if "error" in row:
            print(f"error: {row['error']}", file=sys.stderr)
        elif not args.json:
            print(_text(row))
    right = [row for row in rows if "error" not in row]
    if args.plot and right:
        save_plot(args.plot, right[:PLOTTED])
    if args.json:
        print(json.dumps({"model": args.model, "weights": model.spec.weights, "images": rows}))
    elif args.plot and right:
        print(f"wrote {args.plot}: {min(len(right), PLOTTED)} of {len(right)} images")
    return 2 if any("error" in row for row in rows) else 0


def find_images(given: Sequence[str]) -> list[str]:
    """The files meant by paths, directories (the images right in them) and glob patterns."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    found: list[str] = []
    for path in given:
        if os.path.isdir(path):
            inside = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in suffixes)
            files = [str(p) for p in inside if p.is_file()]
        elif os.path.exists(path) or not set("*?[") & set(path):
            files = [path]
        else:
            files = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not files:
            raise ValueError(f"{path}: no images there")
        found += files
    return list(dict.fromkeys(found))


def load(name: str, weights: str) -> tuple[Any, Callable[[int], str]]:
    """A model, and a function from the index of a class to its name."""
    import flax_nets

    model: Any = flax_nets.create_model(name, weights=weights)
    if not model.spec.complete["num_classes"]:
        raise ValueError(f"{weights} has no head: it gives features, and tells no classes apart")
    return model, class_names(model.spec.weights)


def class_names(weights: str) -> Callable[[int], str]:
    """By the table for published weights, by config.json beside others; else "class 7"."""
    from flax_nets import preprocess
    from flax_nets.weights import published

    known: Mapping[Any, str] | Sequence[str] | None
    if weights in published.table():
        classes = published.table()[weights].classes
        known = published.class_names(classes) if classes else None
    else:
        config = preprocess.read_json(Path(weights).parent / "config.json")
        known = config.get("id2label") or config.get("label_names")
    if isinstance(known, Mapping):
        named = {str(index): str(name) for index, name in known.items()}
    else:
        named = {str(index): str(name) for index, name in enumerate(known or ())}
    return lambda index: named.get(str(index), f"class {index}")


def predict(
    model: Any, paths: Sequence[str], names: Callable[[int], str], top: int = 5
) -> Iterator[dict[str, Any]]:
    """A row for each path.

    A row is {"image", "classes": [{"index", "name", "probability"}, ...]}, the likeliest first, or
    {"image", "error"} for a file that is no image.
    """
    import jax
    import jax.numpy as jnp

    import flax_nets

    prepare = flax_nets.preprocess.for_model(model)
    apply, params, state = flax_nets.functional(model)

    @jax.jit
    def answer(params: Any, state: Any, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(apply(params, state, x)[0].astype(jnp.float32))

    batch = min(BATCH, len(paths))
    for start in range(0, len(paths), batch):
        group = paths[start : start + batch]
        images = np.zeros((batch, *prepare.shape), np.float32)
        errors = {}
        for i, path in enumerate(group):
            try:
                images[i] = prepare(path)[0]
            except ValueError as error:
                errors[i] = str(error)
        probabilities = np.asarray(answer(params, state, images))
        for i, path in enumerate(group):
            if i in errors:
                yield {"image": path, "error": errors[i]}
                continue
            best = np.argsort(-probabilities[i], kind="stable")[:top].tolist()
            classes = [
                {"index": k, "name": names(k), "probability": float(probabilities[i, k])}
                for k in best
            ]
            yield {"image": path, "classes": classes}


def save_plot(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each image beside its classes, as a picture of matplotlib's."""
    from matplotlib.figure import Figure

    from flax_nets.preprocess import open_image

    figure = Figure(figsize=(9, 2.6 * len(rows)), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1, 1.6))
    for (left, right), row in zip(grid, rows, strict=True):
        picture = open_image(row["image"])
        picture.thumbnail((480, 480))
        left.imshow(np.asarray(picture))
        left.set_title(Path(row["image"]).name, fontsize=9)
        left.axis("off")
        classes = row["classes"][::-1]
        values = [100 * c["probability"] for c in classes]
        bars = right.barh(range(len(classes)), values, color="#2f6db5")
        right.set_yticks(range(len(classes)), [c["name"] for c in classes], fontsize=9)
        right.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=8)
        right.set_xlim(0, 115)
        right.set_xticks([])
        right.spines[["top", "right", "bottom"]].set_visible(False)
    draft = Path(path).with_name(f".draft-{Path(path).name}")
    try:
        figure.savefig(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _text(row: Mapping[str, Any]) -> str:
    lines = [f"{c['probability']:7.2%}  {c['name']}" for c in row["classes"]]
    return "\n".join([row["image"], *lines])


def _parser() -> Parser:
    parser = Parser(
        "predict",
        "Name what is in images. Published weights are downloaded once, and bring the names of "
        "their classes and the way images are prepared; beside a checkpoint, config.json and "
        "preprocessor_config.json tell these.",
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", help="files, directories of them, or patterns")
    add("--model", metavar="NAME", required=True, help="a network, see flax-nets list")
    add(
        "--weights",
        metavar="WEIGHTS",
        default="DEFAULT",
        help="published ones by name, hf-hub:ORG/NAME, an address, or a file",
    )
    add("--top", type=int, metavar="N", default=5, help="how many classes to print")
    add("--plot", metavar="FILE", help="draw the images with their classes, into a .png")
    parser.add_json()
    return parser
