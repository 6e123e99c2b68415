"""`flax-nets train` and `flax-nets eval`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax_nets
from flax_nets import registry
from flax_nets.train import recipes
from flax_nets.train.recipes import Recipe
from flax_nets.train.recipes._options import parse

FREE = (  # what may differ at a resumption; of the recipe `epochs` may
    "out", "resume", "keep", "checkpoint_every", "workers", "download", "fsdp", "coordinator",
    "num_processes", "process_id", "quiet", "json", "epochs",
)  # fmt: skip
# The options of `train` as its help shows them.
PANELS = {
    "run: Where the data come from, and what is left.": (
        "out", "recipe", "data", "download", "skip_broken", "workers", "resume", "seed",
        "checkpoint_every", "keep", "quiet", "json",
    ),
    "device: All that there are take part.": (
        "fsdp", "steps_per_call", "coordinator", "num_processes", "process_id",
    ),
    "network: What is trained.": (
        "model", "arguments", "weights", "freeze", "dropout", "dtype",
    ),
    "image: What is done to them.": (
        "image_size", "test_size", "augment", "prepare", "mean", "std", "shift", "repeats",
        "mixup", "cutmix", "mix_probability",
    ),
    "training: How much of it, and towards what.": (
        "batch_size", "test_batch", "epochs", "accumulate", "batch_norm_groups", "loss",
        "label_smoothing", "target_threshold", "aux_weight", "ema_decay",
    ),
    "optimizer: How gradients become updates.": (
        "optimizer", "lr", "lr_factors", "momentum", "nesterov", "betas", "alpha", "eps",
        "weight_decay", "decay", "decay_exclude", "clip",
    ),
    "schedule: Of the learning rate. Epochs may be fractions of one.": (
        "schedule", "milestones", "gamma", "decay_epochs", "lr_min", "warmup_epochs",
        "warmup_factor", "stairs",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run takes its data, what it leaves, and which devices it has.

    Args:
      out: the folder of the run.
      recipe: where the defaults of the options from model on come from, one of those above. Where
        neither it nor a model is given, the digits have lenet5_digits.
      data: digits, mnist:DIR, fashion_mnist:DIR, cifar10:DIR, cifar100:DIR, folder:DIR, hf:NAME or
        tfds:NAME.
      download: fetch MNIST, Fashion-MNIST or CIFAR into DIR if it is not there.
      skip_broken: go on where an image cannot be read.
      workers: processes that decode images, 0 for threads of this one.
      resume: go on where the run in OUT stopped, if there is one.
      seed: of initial values, order, augmentation and dropout.
      checkpoint_every: steps between checkpoints, besides the one after each epoch.
      keep: how many checkpoints.
      steps_per_call: updates that the device makes without hearing from the host, which checkpoints
        then wait for; faster where a step is short.
      fsdp: how many devices share one copy of the large tensors.
      coordinator: HOST:PORT of the first of several processes, or auto where the cluster tells it
        (Slurm, cloud TPUs). Default: JAX_COORDINATOR_ADDRESS, else this process is the only one.
      num_processes: how many there are, of all hosts.
      process_id: which of them this is, from 0.
      quiet: no progress on standard error.
      json: print figures for programs.
    """

    out: Path
    recipe: str | None = None
    data: str = "digits"
    download: bool = False
    skip_broken: bool = False
    workers: int = 0
    resume: bool = False
    seed: int = 0
    checkpoint_every: int | None = None
    keep: int = 3
    steps_per_call: int = 1
    fsdp: int = 1
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    quiet: bool = False
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate a checkpoint on a data set: each image counts once.

    Args:
      model: a network, see flax-nets list.
      weights: a checkpoint, or published weights by name.
      run: instead of these, a folder that flax-nets train has left.
      recipe: prepare the images as this recipe does.
      arguments: of the network's constructor, each as NAME=VALUE.
      data: digits, mnist:DIR, fashion_mnist:DIR, cifar10:DIR, cifar100:DIR, folder:DIR, hf:NAME or
        tfds:NAME. Default: digits, or the run's.
      split: which part.
      batch_size: images at a time.
      image_size: height and width in pixels. Default: the network's.
      dtype: to compute in. Default: float32, or the run's.
      skip_broken: go on where an image cannot be read.
      workers: processes that decode images, 0 for threads of this one.
      json: print figures for programs.
    """

    model: str | None = None
    weights: str | None = None
    run: Path | None = None
    recipe: str | None = None
    arguments: tuple[str, ...] = ()
    data: str | None = None
    split: Literal["train", "test"] = "test"
    batch_size: int = 64
    image_size: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    skip_broken: bool = False
    workers: int = 0
    json: bool = False


def train_command(argv: list[str]) -> int:
    """`flax-nets train`."""
    run, recipe = _parse_train(argv)
    registry.resolve(recipe.model)  # a wrong name fails before anything takes time
    _join_hosts(run)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails in Orbax, our error tells
    import jax

    import convert
    from flax_nets.train import data
    from flax_nets.train.mesh import make_mesh
    from flax_nets.train.recipes import _build as build

    options: dict[str, Any] = dict(workers=run.workers, skip_broken=run.skip_broken)
    held_out = data.load(run.data, "test", download=run.download)
    model = build.create(recipe, num_classes=len(held_out.classes), seed=run.seed)
    train = build.batches(recipe, run.data, "train", model, training=True, seed=run.seed, **options)
    test = build.batches(
        recipe, run.data, "test", model, training=False, source=held_out, **options
    )
    again = argv if run.resume else [*argv, "--resume"]
    rows = build.fit(
        recipe,
        model,
        (train, test),
        seed=run.seed,
        out=run.out,
        resume=run.resume,
        checkpoint_every=run.checkpoint_every,
        keep=run.keep,
        settings=_settings(run, recipe),
        resume_command=f"cd {shlex.quote(os.getcwd())} && flax-nets train {shlex.join(again)}",
        mesh=make_mesh(fsdp=run.fsdp),
        steps_per_call=run.steps_per_call,
        progress=not run.quiet,
    )
    if jax.process_index() > 0:
        return 0
    weights = run.out / "weights.safetensors"
    convert.write(weights, convert.export(model))
    figures = rows[-1] | _skipped(run.skip_broken, train, test)
    if run.json:
        print(json.dumps({"out": str(run.out), "weights": str(weights), **figures}))
    else:
        print(
            f"{rows[-1]['test_accuracy']:.2%} of the held-out images right; wrote {weights} "
            f"(PyTorch's names), {run.out / 'metrics.jsonl'} and {run.out / 'curves.png'}"
            f"{_said(figures)}"
        )
    return 0


def eval_command(argv: list[str]) -> int:
    """`flax-nets eval`."""
    about, _, _ = (Eval.__doc__ or "").partition("\n")
    everything = {"checkpoint: What to evaluate, and on what.": tuple(Eval.__dataclass_fields__)}
    (args,) = parse("eval", about, argv, Eval(), panels=everything)
    from flax_nets.train import data
    from flax_nets.train.recipes import _build as build
    from flax_nets.train.step import evaluate, make_eval_step

    recipe, name = _what_to_evaluate(args)
    source, model = data.load(name, args.split), build.create(recipe)
    options: dict[str, Any] = dict(workers=args.workers, skip_broken=args.skip_broken)
    batches = build.batches(
        recipe, name, args.split, model, training=False, source=source, **options
    )
    told, there = model.spec.complete["num_classes"], len(source.classes)
    if told != there:
        raise ValueError(
            f"{recipe.weights} tells {told} classes apart, and {name} has {there}: "
            f"flax-nets train --weights {recipe.weights} trains a new head"
        )
    apply, params, state = flax_nets.functional(model)
    figures = evaluate(make_eval_step(apply), params, state, batches)
    figures |= _skipped(args.skip_broken, batches)
    if args.json:
        named = dict(model=recipe.model, weights=recipe.weights, data=name, split=args.split)
        print(json.dumps(named | figures))
    else:
        print(
            f"{recipe.model} on {name} ({args.split}): {figures['accuracy']:.2%} of "
            f"{figures['count']:.0f} images right, loss {figures['loss']:.4f}"
            f"{_said(figures)}"
        )
    return 0


def _skipped(asked: bool, *batches: Any) -> dict[str, Any]:
    """How many images could not be read, where that was asked for."""
    names = {name for found in batches for name in getattr(found, "broken", ())}
    return {"broken": len(names)} if asked else {}


def _said(figures: Mapping[str, Any]) -> str:
    return f"; broken images skipped: {figures['broken']}" if "broken" in figures else ""


def _parse_train(argv: list[str]) -> tuple[Run, Recipe]:
    """The options, those of the recipe with the defaults of the one that is named."""
    named = _value_of("--recipe", argv)
    own = named is None and _value_of("--model", argv) is None and _value_of("--out", argv)
    if own and _value_of("--data", argv) in (None, "digits"):
        named, argv = "lenet5_digits", ["--recipe", "lenet5_digits", *argv]
    default, text, required = Recipe(model=""), "Train a network.", {"out", "model"}
    if named is not None:
        default, required = recipes.load(named), {"out"}
        text = re.sub("\n(?=Expected|Hardware)", "\n\n", recipes.about(named))  # a line each
    text += (
        "\n\nThe folder of the run gets checkpoints, metrics.jsonl with a row per epoch, the same "
        "for TensorBoard, curves.png, config.json, resume.sh, and in the end weights.safetensors."
        f"\n\nRecipes: {', '.join(recipes.names())}."
    )
    options = (Run(out=Path()), default)
    run, recipe = parse("train", text, argv, *options, panels=PANELS, required=required)
    return run, recipe


def _value_of(option: str, argv: list[str]) -> str | None:
    """The value of an option, wherever it stands; of several the last."""
    found = None
    for here, after in zip(argv, [*argv[1:], ""], strict=False):
        if here == option:
            found = after
        elif here.startswith(f"{option}="):
            found = here.partition("=")[2]
    return found


def _join_hosts(run: Run) -> None:
    """Several processes: let JAX know the others before it touches a device."""
    if run.coordinator is None and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        if run.num_processes is not None or run.process_id is not None:
            raise ValueError("num_processes and process_id: expected a coordinator beside them")
        return
    import jax

    address = None if run.coordinator == "auto" else run.coordinator
    jax.distributed.initialize(address, run.num_processes, run.process_id)


def _settings(run: Run, recipe: Recipe) -> dict[str, Any]:
    """What a resumption must not change, in JSON's types."""
    every = dataclasses.asdict(run) | dataclasses.asdict(recipe)
    kept = {name: value for name, value in every.items() if name not in FREE}
    return json.loads(json.dumps(kept | {"recipe": run.recipe}))


def _what_to_evaluate(args: Eval) -> tuple[Recipe, str]:
    """The recipe, whose weights are those to evaluate, and the data set."""
    if args.run is not None:
        settings = json.loads((args.run / "config.json").read_text())["settings"]
        known = {field.name for field in dataclasses.fields(Recipe)}
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
            if name in known
        }
        recipe, source = Recipe(**given), args.data or settings["data"]
        weights: str | None = str(args.run / "weights.safetensors")
    else:
        recipe, source = Recipe(model="", prepare=()), args.data or "digits"
        weights = args.weights
        if args.recipe is not None:
            recipe = recipes.load(args.recipe)
    changes: dict[str, Any] = {"weights": weights, "test_batch": args.batch_size}
    for name in ("model", "arguments", "dtype"):
        changes[name] = getattr(args, name) or getattr(recipe, name)
    if args.image_size:
        changes |= {"image_size": args.image_size, "test_size": args.image_size}
    if not changes["model"] or not weights:
        raise ValueError("expected --model and --weights, or --run (flax-nets eval --help)")
    return dataclasses.replace(recipe, **changes), source
