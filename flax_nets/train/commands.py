"""`flax-nets train` and `flax-nets eval`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax

import convert
import flax_nets
from flax_nets import registry
from flax_nets.cli import Parser
from flax_nets.train import data, optim, schedules
from flax_nets.train.loop import fit
from flax_nets.train.step import evaluate, make_eval_step

DATA = {"digits": data.digits}
# Name -> (the optimizer, its momentum where it has one).
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float | None]] = {
    "sgd": (optim.sgd, 0.9),
    "adam": (optim.adam, None),
    "adamw": (optim.adamw, None),
    "rmsprop": (optim.rmsprop, 0.0),
    "rmsprop_tf": (optim.rmsprop_tf, 0.9),
    "lamb": (optim.lamb, None),
}
FREE = ("out", "resume", "json", "quiet", "keep", "checkpoint_every", "epochs")  # at a resumption


def train_command(argv: list[str]) -> int:
    """`flax-nets train`."""
    args = _train_parser().parse_args(argv)
    classes = len(DATA[args.data]("test").classes)
    model = _model(args, num_classes=classes, dropout=args.dropout, rngs=args.seed)
    images = _images(args, model, "train")
    augment = data.shift(args.shift) if args.shift else None
    train = data.Batches(images, args.batch_size, args.seed, drop_last=True, augment=augment)
    test = data.Batches(_images(args, model, "test"), args.batch_size)
    optimizer = _optimizer(args, len(train))
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    again = argv if args.resume else [*argv, "--resume"]
    rows = fit(
        model,
        train,
        test,
        optimizer,
        args.epochs,
        out=args.out,
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        keep=args.keep,
        settings=settings,
        resume_command=f"cd {shlex.quote(os.getcwd())} && flax-nets train {shlex.join(again)}",
        seed=args.seed,
        progress=not args.quiet,
        label_smoothing=args.label_smoothing,
        accumulate=args.accumulate,
        ema_decay=args.ema_decay,
    )
    weights = args.out / "weights.safetensors"
    convert.write(weights, convert.export(model))
    if args.json:
        print(json.dumps({"out": str(args.out), "weights": str(weights), **rows[-1]}))
    else:
        print(
            f"{rows[-1]['test_accuracy']:.2%} of the held-out images right; wrote {weights} "
            f"(PyTorch's names), {args.out / 'metrics.jsonl'} and {args.out / 'curves.png'}"
        )
    return 0


def eval_command(argv: list[str]) -> int:
    """`flax-nets eval`."""
    parser = Parser("eval", "Evaluate a checkpoint on a data set: each image counts once.")
    _add_inputs(parser)
    parser.add_argument("--weights", metavar="FILE", required=True, help="a checkpoint")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="which part")
    parser.add_json()
    args = parser.parse_args(argv)
    model = _model(args)
    batches = data.Batches(_images(args, model, args.split), args.batch_size)
    told, there = model.spec.complete["num_classes"], len(batches.data.classes)
    if told != there:
        raise ValueError(
            f"{args.weights} tells {told} classes apart, and {args.data} has {there}: "
            f"flax-nets train --weights {args.weights} trains a new head"
        )
    apply, params, state = flax_nets.functional(model)
    figures = evaluate(make_eval_step(apply), params, state, batches)
    if args.json:
        named = {name: getattr(args, name) for name in ("model", "weights", "data", "split")}
        print(json.dumps(named | figures))
    else:
        print(
            f"{args.model} on {args.data} ({args.split}): {figures['accuracy']:.2%} of "
            f"{figures['count']:.0f} images right, loss {figures['loss']:.4f}"
        )
    return 0


def _add_inputs(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", required=True, help="a network, see flax-nets list")
    add("--data", choices=DATA, default="digits", help="a data set")
    add("--batch-size", type=int, metavar="N", default=64, help="images at a time")
    add(
        "--image-size", type=int, metavar="PIXELS", help="height and width (default: the network's)"
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")


def _train_parser() -> Parser:
    parser = Parser(
        "train",
        "Train a network. The folder of the run gets checkpoints, metrics.jsonl with a row per "
        "epoch, curves.png, config.json, resume.sh, and in the end weights.safetensors.",
    )
    _add_inputs(parser)
    add = parser.add_argument
    add("--out", type=Path, metavar="RUN", required=True, help="the folder of the run")
    add("--resume", action="store_true", help="go on where the run in RUN stopped, if there is one")
    add("--weights", metavar="FILE", help="a checkpoint to start from")
    add("--epochs", type=int, metavar="N", default=10, help="passes over the data")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="as PyTorch or timm defines it")
    add("--lr", type=float, default=0.05, help="the learning rate at its highest")
    add("--momentum", type=float, help="(default: 0.9 for sgd and rmsprop_tf, 0 for rmsprop)")
    add("--weight-decay", type=float, metavar="X", help="(default: the optimizer's)")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="of the learning rate")
    add("--warmup-epochs", type=int, metavar="N", default=0, help="of a rate rising from 1/100")
    add("--clip", type=float, metavar="NORM", help="bound on the global norm of the gradients")
    add("--label-smoothing", type=float, metavar="X", default=0.0, help="share for all classes")
    add("--shift", type=int, metavar="PIXELS", default=0, help="move each image at random")
    add("--accumulate", type=int, metavar="N", default=1, help="parts a batch is computed in")
    add("--ema-decay", type=float, metavar="X", help="test and keep averages of the parameters")
    add("--dropout", type=float, metavar="RATE", help="(default: the network's)")
    add("--seed", type=int, default=0, help="of initial values, order and dropout")
    add("--checkpoint-every", type=int, metavar="STEPS", help="besides the one after each epoch")
    add("--keep", type=int, metavar="N", default=3, help="checkpoints to keep")
    add("--quiet", action="store_true", help="no progress on standard error")
    parser.add_json()
    return parser


def _model(args: argparse.Namespace, **overrides: Any) -> Any:
    known = registry.resolve(args.model).complete
    if args.image_size and "image_size" in known:
        overrides["image_size"] = args.image_size
    given = {name: value for name, value in overrides.items() if value is not None}
    return flax_nets.create_model(args.model, weights=args.weights, dtype=args.dtype, **given)


def _images(args: argparse.Namespace, model: Any, split: Any) -> data.Dataset:
    side, _, channels = model.spec.input_shape
    return DATA[args.data](split, args.image_size or side, channels)


def _optimizer(args: argparse.Namespace, steps: int) -> optax.GradientTransformation:
    """The optimizer, its learning rate by update: `steps` to an epoch."""
    if args.epochs < 1:
        raise ValueError(f"--epochs: got {args.epochs}, expected at least 1")
    if not args.lr > 0:
        raise ValueError(f"--lr: got {args.lr}, expected a number above 0")
    if not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(
            f"--warmup-epochs: got {args.warmup_epochs}, expected 0 to less than {args.epochs}"
        )
    total, warmup = args.epochs * steps, args.warmup_epochs * steps
    rate: Any = args.lr
    if args.schedule == "cosine":
        rate = schedules.cosine(args.lr, total - warmup)
    if warmup:
        main = schedules.multi_step(args.lr, []) if args.schedule == "constant" else rate
        rising = schedules.linear(args.lr, start_factor=0.01, total_iters=warmup)
        rate = schedules.sequential([rising, main], [warmup])
    make, momentum = OPTIMIZERS[args.optimizer]
    if args.momentum is not None and momentum is None:
        raise ValueError(f"--momentum: {args.optimizer} has none")
    options = {"momentum": momentum if args.momentum is None else args.momentum}
    options |= {"weight_decay": args.weight_decay}
    optimizer = make(rate, **{name: value for name, value in options.items() if value is not None})
    if args.clip is None:
        return optimizer
    return optax.chain(optim.clip_by_global_norm(args.clip), optimizer)
