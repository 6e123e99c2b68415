"""Write the table of published weights, `flax_nets/weights/*.json`.

    python -m benchmarks.make_weights_table

Everything in it is what the installed torchvision and timm say of the weights of the networks in
`tests/data/names.txt`. The package itself reads the files and needs neither library.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from benchmarks import libraries
from convert.formats.files import replacing
from flax_nets import weights

ROOT = Path(__file__).parents[1]
FOLDER = Path(weights.__file__).parent
NAMES = (ROOT / "tests" / "data" / "names.txt").read_text().split()
CLASSES = {  # timm's tags do not name the classes; their numbers do
    1000: "imagenet-1k",
    11221: "imagenet-21k-p",
    21843: "imagenet-21k",
    115217: "bamboo",
}
Row = dict[str, Any]


def main() -> None:
    """Write all of it."""
    write(FOLDER / "torchvision.json", torchvision_rows())
    write(FOLDER / "timm.json", timm_rows(count_parameters))
    write(FOLDER / "classes.json", {"imagenet-1k": categories()})


def names(library: str) -> list[str]:
    """The networks in scope of "torchvision" or "timm"."""
    return [n.removeprefix(f"{library}/") for n in NAMES if n.startswith(f"{library}/")]


def torchvision_rows() -> dict[str, Row]:
    """Name -> row, for every weights of torchvision's."""
    found = {}
    for model in names("torchvision"):
        every = torchvision.models.get_model_weights(model)
        for entry in every:
            meta, preset = entry.meta, entry.transforms()
            accuracy = meta["_metrics"]["ImageNet-1K"]
            known = all(map(math.isfinite, accuracy.values()))
            categories = meta["categories"]
            found[f"torchvision/{model}.{entry.name}"] = {
                "model": model,
                "default": entry is every.DEFAULT,
                "url": entry.url,
                "sha256": in_name(entry.url),
                "preprocess": {
                    "image_size": preset.crop_size * 2,
                    "resize_size": preset.resize_size * 2,
                    "interpolation": preset.interpolation.value,
                    "antialias": preset.antialias,
                    "crop_mode": "center",
                    "mean": preset.mean,
                    "std": preset.std,
                },
                "classes": None if categories is None else "imagenet-1k",
                "num_classes": 1000,
                "accuracy": accuracy if known else None,
                "num_params": meta["num_params"],
                "license": meta.get("license"),
                "arguments": {"transform_input": True} if transforms_input(model) else {},
            }
    return found


def timm_rows(parameters: Callable[[str, int], int] | None = None) -> dict[str, Row]:
    """Name -> row, for every weights of timm's. `parameters` counts those of a network."""
    found = {}
    for model in names("timm"):
        first = get_pretrained_cfg(model)
        for name, config in get_arch_pretrained_cfgs(model).items():
            if not (config.hf_hub_id or config.url):  # random weights
                continue
            row = {
                "model": model,
                "default": config.tag == first.tag,
                "preprocess": {
                    "image_size": config.input_size[1:],
                    "crop_pct": config.crop_pct,
                    "interpolation": config.interpolation,
                    "antialias": True,  # it resizes by Pillow
                    "crop_mode": config.crop_mode,
                    "mean": config.mean,
                    "std": config.std,
                },
                "classes": CLASSES[config.num_classes] if config.num_classes else None,
                "num_classes": config.num_classes,
                "accuracy": None,  # in its repository, not in the package
                "num_params": parameters and parameters(model, config.num_classes),
                "license": config.license,
                "arguments": {},
            }
            if config.hf_hub_id:
                row["hub"] = config.hf_hub_id
            else:
                row |= {"url": config.url, "sha256": in_name(config.url)}
            if config.test_input_size or config.test_crop_pct:
                row["test"] = {
                    "image_size": (config.test_input_size or config.input_size)[1:],
                    "crop_pct": config.test_crop_pct or config.crop_pct,
                }
            found[f"timm/{name}"] = row
    return found


def categories() -> list[str]:
    """The thousand classes, in the order of the logits."""
    return torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]


def count_parameters(model: str, num_classes: int) -> int:
    """Of a network of timm's, which is built of shapes alone."""
    built = libraries.build(f"timm/{model}", num_classes=num_classes)
    return sum(p.numel() for p in built.parameters())


def in_name(url: str) -> str | None:
    """The first digits of the SHA-256, which both libraries write into a file's name."""
    found = re.search(r"-([0-9a-f]{8,})\.", url.rpartition("/")[2])
    return found and found[1]


def transforms_input(model: str) -> bool:
    """Whether torchvision's builder switches `transform_input` on where it loads weights."""
    builder = inspect.unwrap(torchvision.models.get_model_builder(model))
    return '"transform_input", True' in inspect.getsource(builder)


def dump(rows: Row) -> str:
    """JSON with a line for each entry, so that a change shows what changed."""
    lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in rows.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(path: Path, rows: Row) -> None:
    with replacing(path) as stream:
        stream.write(dump(rows).encode())


if __name__ == "__main__":
    print(f"torchvision {torchvision.__version__}, timm {timm.__version__}")
    main()
