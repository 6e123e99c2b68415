"""`flax-nets demo`: a network that PyTorch trained, converted, proven equal, trained on, and back.

Everything here is what a program of yours would call.
"""

from __future__ import annotations

import hashlib
import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import convert
import flax_nets
from flax_nets import train
from flax_nets.cli import Parser
from flax_nets.train.data import Batches, Dataset, digits, shift
from flax_nets.train.loop import Row, fit

MODEL, LIMIT, LEAST = "lenet5", 1e-12, 0.97
ASSETS = resources.files("flax_nets") / "assets"  # made by benchmarks/make_demo_checkpoint.py


def demo_command(argv: list[str]) -> int:
    """`flax-nets demo`; exit code 1 where the network is not the same one, or not a good one."""
    parser = Parser(
        "demo",
        "Convert a LeNet-5 that PyTorch trained on handwritten digits, check it against PyTorch's "
        "own outputs, evaluate it, train it on in Flax, and write it back for PyTorch.",
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FOLDER", default="flax_nets_demo", help="for what it makes")
    add("--epochs", type=int, metavar="N", default=20, help="of training in Flax")
    parser.add_json()
    args = parser.parse_args(argv)
    if args.epochs < 1:
        raise ValueError(f"--epochs: got {args.epochs}, expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    figures = demo(args.out, args.epochs, quiet=args.json)
    if args.json:
        print(json.dumps(figures, indent=2))
    return 0 if figures["ok"] else 1


def demo(out: Path, epochs: int = 20, quiet: bool = False) -> dict[str, Any]:
    """The tour. Returns its figures, and writes a `.pth` and a picture into `out`."""
    from rich.console import Console

    began, console = time.perf_counter(), Console(quiet=quiet, highlight=False)

    def say(number: int, what: str) -> None:
        console.print(f"[bold]{number}[/]  {what}")

    with resources.as_file(ASSETS / "lenet5_digits.pth") as path:
        held_out = digits("test")
        model = flax_nets.create_model(MODEL, weights=path)
        converted = conversion(model, path)
        say(1, f"convert: {path.name}, {converted['tensors']} tensors, into Flax")
        verified = verification(path, held_out)
    say(2, f"verify: {len(held_out)} digits in float64, against what PyTorch answered")
    before = evaluation(model, held_out)
    say(3, f"evaluate: on the held-out digits {before['accuracy']:.2%} right")
    say(4, f"train: {epochs} epochs, the digits shifted by up to 2 pixels")
    rows = training(model, held_out, epochs, progress=not quiet)
    after = evaluation(model, held_out)
    written = out / "lenet5_digits_flax.pth"
    convert.write(written, convert.export(model))
    say(5, f"write: {written}, which torch.load opens")
    picture = out / "demo.png"
    from flax_nets.train.plot import save_demo

    save_demo(picture, model, held_out, before, after, rows)
    figures = {
        "ok": converted["identical"] and verified["equal"] and before["accuracy"] >= LEAST,
        "model": MODEL,
        "convert": converted,
        "verify": verified,
        "before": {name: before[name] for name in ("accuracy", "loss", "right", "count")},
        "after": {name: after[name] for name in ("accuracy", "loss", "right", "count")},
        "epochs": epochs,
        "steps": int(rows[-1]["step"]),
        "images_per_second": rows[-1]["images_per_second"],
        "files": [str(written), str(picture)],
        "seconds": time.perf_counter() - began,
    }
    console.print(table(figures))
    return figures


def conversion(model: nnx.Module, path: Path) -> dict[str, Any]:
    """Sizes, and whether the way there and back changed no bit."""
    there, back = convert.read(path), convert.export(model)
    same = [key in back and there[key].tobytes() == back[key].tobytes() for key in there]
    return {
        "tensors": len(there),
        "parameters": int(sum(value.size for value in there.values())),
        "identical": all(same) and len(there) == len(back),
    }


def verification(path: Path, held_out: Dataset) -> dict[str, Any]:
    """Against the stored outputs of PyTorch: max|ours - theirs| / max|theirs|, in float64."""
    with resources.as_file(ASSETS / "lenet5_digits.npz") as stored, np.load(stored) as file:
        theirs, images, torch = file["logits"], str(file["images"]), str(file["torch"])
    if hashlib.sha256(held_out.images.tobytes()).hexdigest() != images:
        raise ValueError(
            "scikit-learn's digits are not those that PyTorch saw: pip install -U scikit-learn"
        )
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = flax_nets.create_model(MODEL, weights=path, param_dtype=jnp.float64)
        apply, params, state = flax_nets.functional(model)
        ours = np.asarray(jax.jit(apply)(params, state, jnp.asarray(held_out.images, float))[0])
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    same = int(np.sum(ours.argmax(1) == theirs.argmax(1)))
    return {
        "torch": torch,
        "max_error": error,
        "limit": LIMIT,
        "same_predictions": same,
        "count": len(theirs),
        "equal": error <= LIMIT and same == len(theirs),
    }


def evaluation(model: nnx.Module, held_out: Dataset) -> dict[str, Any]:
    """Figures on the held-out digits, and the probabilities [N, 10]."""
    apply, params, state = flax_nets.functional(model)
    step = train.make_eval_step(apply)
    figures = train.evaluate(step, params, state, Batches(held_out, batch_size=128))
    logits, _ = jax.jit(apply)(params, state, jnp.asarray(held_out.images))
    probabilities = np.asarray(jax.nn.softmax(logits))
    right = int(np.sum(probabilities.argmax(1) == held_out.labels))
    return {**figures, "right": right, "count": len(held_out), "probabilities": probabilities}


def training(model: nnx.Module, held_out: Dataset, epochs: int, progress: bool) -> list[Row]:
    """Train in place, with the jitted step."""
    batches = Batches(digits("train"), 32, seed=0, drop_last=True, augment=shift(2))
    warmup = len(batches)  # an epoch: the full rate at once would undo some of what it has learned
    rising = train.schedules.linear(0.05, start_factor=0.01, total_iters=warmup)
    falling = train.schedules.cosine(0.05, t_max=max(epochs - 1, 1) * len(batches))
    rate = train.schedules.sequential([rising, falling], milestones=[warmup])
    optimizer = train.sgd(rate, momentum=0.9, weight_decay=5e-4)
    return fit(model, batches, Batches(held_out, 128), optimizer, epochs, progress=progress)


def table(figures: dict[str, Any]) -> Any:
    """The end of the tour."""
    from rich.table import Table

    made, verified = figures["convert"], figures["verify"]
    before, after = figures["before"], figures["after"]
    error = verified["max_error"]
    rows = Table(title="\nPyTorch -> Flax -> PyTorch", title_justify="left", show_header=False)
    rows.add_column(style="bold")
    rows.add_column()
    for name, value in (
        ("network", f"LeNet-5, {made['parameters']:,} parameters in {made['tensors']} tensors"),
        ("there and back", "every bit the same" if made["identical"] else "[red]CHANGED[/]"),
        (
            f"against PyTorch {verified['torch'].split('+')[0]}",
            f"largest error {error:.1e} of the largest, float64"
            + ("" if error <= LIMIT else f"  [red]above {LIMIT:g}[/]"),
        ),
        ("same predictions", f"{verified['same_predictions']} of {verified['count']}"),
        ("PyTorch's checkpoint", _accuracy(before)),
        (f"after {figures['epochs']} epochs in Flax", _accuracy(after)),
        ("training speed", f"{figures['images_per_second']:,.0f} images per second"),
        ("all of it took", f"{figures['seconds']:.0f} s"),
        ("for torch.load", figures["files"][0]),
        ("the picture", figures["files"][1]),
    ):
        rows.add_row(name, value)
    return rows


def _accuracy(figures: dict[str, Any]) -> str:
    return f"{figures['accuracy']:.2%} ({figures['right']} of {figures['count']} digits)"
