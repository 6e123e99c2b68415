"""`fit`: epochs of training, seen while they run, and resumable after any end."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import flax_nets
from flax_nets.functional import functional
from flax_nets.train import step as steps
from flax_nets.train.data import Batches
from flax_nets.train.files import write_text
from flax_nets.train.mesh import make_mesh, replicate, shard
from flax_nets.train.state import TrainState

Row = dict[str, float]
LOOK = 0.25  # seconds between two looks at the figures: each waits for the device


class Diverged(ValueError):
    """The loss, or a parameter, is NaN or infinite."""


def fit(
    model: nnx.Module,
    train: Batches,
    test: Batches,
    optimizer: optax.GradientTransformation,
    epochs: int,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    keep: int = 3,
    settings: Mapping[str, Any] | None = None,
    resume_command: str = "",
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: bool = True,
    **step_options: Any,
) -> list[Row]:
    """Train `model` in place, and return one row of figures per epoch.

    A row has epoch (from 1), step, train_loss, train_accuracy (while training), test_loss,
    test_accuracy, seconds and images_per_second (the first epoch's include compiling). With
    `ema_decay` the averaged parameters are tested, and are what the model gets.

    Args:
      model: from `create_model`.
      train, test: batches to train on, as a rule with `drop_last`, and to test on.
      optimizer: an optax transformation.
      epochs: how many in all, those before a resumption included.
      out: None, or a folder for checkpoints/, metrics.jsonl (the rows), curves.png, config.json.
      resume: go on from the newest good checkpoint in `out`, from the start where there is none.
        The end is bit for bit that of a run which nothing stopped. Default False.
      checkpoint_every: steps between checkpoints within an epoch, besides the one after each.
      keep: how many checkpoints to keep. Default 3.
      settings: what the caller decided, in JSON's types, for config.json; a run resumes with the
        same ones only.
      resume_command: for resume.sh, where there is one.
      seed: of dropout. Default 0.
      mesh: the devices among which each batch is divided. Default: all there are.
      progress: show a bar, and a line per epoch, on standard error. Default True.
      step_options: further arguments of `make_train_step`.

    Raises ValueError where `out` holds a run and `resume` is not set, or the run has other
    settings, and `Diverged`.

    >>> import flax_nets
    >>> from flax_nets import train
    >>> from flax_nets.train.data import Batches, digits
    >>> model = flax_nets.create_model("lenet5")
    >>> batches = Batches(digits("train"), 64, seed=0, drop_last=True)
    >>> held_out = Batches(digits("test"), 64)
    >>> rows = train.fit(model, batches, held_out, train.adam(2e-3), epochs=1, progress=False)
    >>> rows[0]["test_accuracy"] > 0.7
    True
    """
    if epochs < 1:
        raise ValueError(f"epochs: got {epochs}, expected at least 1")
    with ExitStack() as stack:
        run = _Run(model, train, test, optimizer, seed, mesh, step_options)
        folder = None if out is None else stack.enter_context(_Folder(Path(out), keep))
        if folder:
            folder.open(run, resume, settings or {})
            if resume_command:
                write_text(folder.path / "resume.sh", resume_command + "\n")
        bar = stack.enter_context(_Bar(progress, epochs, train, run.done))
        for epoch in range(run.done // len(train), epochs):
            bar.begin(epoch)
            for trained in run.train_epoch(epoch):
                bar.look(run)
                if folder and checkpoint_every and trained % checkpoint_every == 0:
                    folder.save(run)
            bar.end(run.end_epoch(epoch))
            if folder:
                folder.draw(run.rows, last=epoch == epochs - 1)
                folder.save(run)
        run.fill(model)
    return run.rows


class _Run:
    """The state of a run and its steps: `done` updates, the sums of the epoch under way, rows."""

    def __init__(
        self,
        model: nnx.Module,
        train: Batches,
        test: Batches,
        optimizer: optax.GradientTransformation,
        seed: int,
        mesh: Mesh | None,
        options: dict[str, Any],
    ):
        self.train, self.test = train, test
        self.mesh = make_mesh() if mesh is None else mesh
        apply, params, state = functional(model)
        self.train_step = steps.make_train_step(apply, optimizer, **options)
        self.eval_step = steps.make_eval_step(apply)
        ema = options.get("ema_decay") is not None
        first = TrainState.create(params, state, optimizer, key=seed, ema=ema)
        shapes = jax.eval_shape(self.train_step, first, next(iter(train)))[1]
        sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        self.state, self.sums = replicate((first, sums), self.mesh)
        self.done, self.rows = 0, list[Row]()

    def train_epoch(self, epoch: int) -> Iterator[int]:
        """Train to the end of an epoch, giving after each step its number within the epoch."""
        start = self.done % len(self.train)
        self.began, self.here = time.perf_counter(), 0
        for i, batch in enumerate(self.train.epoch(epoch, start), start + 1):
            self.state, metrics = self.train_step(self.state, shard(batch, self.mesh))
            self.sums = steps.add_metrics(self.sums, metrics)
            self.done, self.here = self.done + 1, self.here + 1
            if i < len(self.train):
                yield i

    def end_epoch(self, epoch: int) -> Row:
        """Test, note the figures, and start new sums."""
        trained = self.figures()
        seconds = time.perf_counter() - self.began
        batches = (shard(batch, self.mesh) for batch in self.test)
        params, state = self.state.evaluated
        tested = steps.evaluate(self.eval_step, params, state, batches)
        self.check(tested["loss"])
        row: Row = {"epoch": epoch + 1, "step": self.done}
        for split, figures in (("train", trained), ("test", tested)):
            row |= {f"{split}_loss": figures["loss"], f"{split}_accuracy": figures["accuracy"]}
        images = self.here * self.train.batch_size
        self.rows.append(row | {"seconds": seconds, "images_per_second": images / seconds})
        self.sums = jax.tree.map(jnp.zeros_like, self.sums)
        return self.rows[-1]

    def figures(self) -> dict[str, float]:
        """Loss and accuracy of the epoch so far. It waits for the device."""
        figures = steps.summary(self.sums)
        self.check(figures["loss"])
        return figures

    def check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")

    def check_params(self) -> None:
        """Before they are saved: the loss shows what a step did only one step later."""
        if not _finite(self.state.params):
            raise self._diverged("a parameter is NaN or infinite")

    def _diverged(self, what: str) -> Diverged:
        epoch = (self.done - 1) // len(self.train) + 1
        return Diverged(
            f"{what} at step {self.done} (epoch {epoch}): lower the learning rate, warm it up, or "
            "clip the gradients"
        )

    def fill(self, model: nnx.Module) -> None:
        """Give the trained numbers to the model."""
        for tree in self.state.evaluated:
            nnx.update(model, tree)


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


class _Folder:
    """What a run leaves on disk."""

    def __init__(self, path: Path, keep: int):
        from flax_nets.train.checkpoint import Checkpoints  # and Orbax, which takes its time

        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep)
        self.plotted = time.perf_counter()

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *error: Any) -> None:
        self.checkpoints.close()

    def open(self, run: _Run, resume: bool, settings: Mapping[str, Any]) -> None:
        """Take up what is there, or begin."""
        config = self.path / "config.json"
        if held := self.checkpoints.steps():
            if not resume:
                raise ValueError(
                    f"{self.path} holds a run of {held[-1]} steps already: resume it, or choose "
                    "another folder"
                )
            before = json.loads(config.read_text())["settings"]
            changed = [
                f"{name} was {before.get(name)} and is {settings.get(name)}"
                for name in sorted({*settings, *before})
                if before.get(name) != settings.get(name)
            ]
            if changed:
                raise ValueError(f"{self.path} holds another run: {', '.join(changed)}")
            self.restore(run)
        versions = {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
        versions["flax_nets"] = flax_nets.__version__
        write_text(config, json.dumps({"settings": settings, "versions": versions}, indent=2))

    def restore(self, run: _Run) -> None:
        """The newest good checkpoint, and the rows up to it."""
        found = self.checkpoints.restore({"state": run.state, "sums": run.sums})
        if found is None:
            return
        run.done, saved = found
        run.state, run.sums = saved["state"], saved["sums"]
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        run.rows[:] = [row for row in map(json.loads, lines) if row["step"] <= run.done]

    def save(self, run: _Run) -> None:
        run.check_params()
        self.write_rows(run.rows)  # first: a checkpoint's rows are there when it is
        self.checkpoints.save(run.done, {"state": run.state, "sums": run.sums})

    def draw(self, rows: list[Row], last: bool) -> None:
        """The curves, not too often."""
        if last or time.perf_counter() - self.plotted > 10:
            from flax_nets.train.plot import save_curves

            save_curves(self.path / "curves.png", rows)
            self.plotted = time.perf_counter()

    def write_rows(self, rows: list[Row]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(self.path / "metrics.jsonl", text)


class _Bar:
    """The progress of a run on standard error: a bar where that is a terminal, lines anywhere."""

    def __init__(self, shown: bool, epochs: int, train: Batches, done: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True, quiet=not shown)
        self.epochs, self.train, self.looked = epochs, train, time.perf_counter()
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self.task = self.progress.add_task(
            "", total=epochs * len(train), completed=done, epoch=epochs, figures="compiling"
        )

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def begin(self, epoch: int) -> None:
        self.progress.update(self.task, epoch=epoch + 1)

    def look(self, run: _Run) -> None:
        """At the figures so far, now and then; they stop a run that has diverged."""
        if time.perf_counter() - self.looked < LOOK:
            return
        figures = run.figures()
        speed = (self.progress.tasks[0].speed or 0) * self.train.batch_size
        text = f"loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.2%}"
        text += f"  {speed:,.0f} images/s" if speed else ""
        self.progress.update(self.task, completed=run.done, figures=text)
        self.looked = time.perf_counter()

    def end(self, row: Row) -> None:
        self.progress.update(self.task, completed=row["step"])
        self.progress.console.print(
            f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}  "
            f"loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}   held out: "
            f"loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:.2%}   "
            f"{row['images_per_second']:,.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )
