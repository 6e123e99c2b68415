"""`fit`: epochs of training, seen while they run, and resumable after any end."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import flax_nets
from flax_nets.functional import functional
from flax_nets.train import step as steps
from flax_nets.train.files import write_text
from flax_nets.train.mesh import make_mesh, replicate, shard, shard_state
from flax_nets.train.state import LossScale, TrainState

Row = dict[str, float]
LOOK = 0.25  # seconds between two looks at the figures


class Batches(Protocol):
    """What `fit` trains on: a number of batches per epoch, each of them a function of its place.

    It may have `hosts`: then batches are this host's share; otherwise they are whole, and each
    host takes its part. It may have `names(epoch, n)`: the examples of a batch, for messages.

    Attributes:
      batch_size: of all hosts together.
    """

    @property
    def batch_size(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch (from 0), from its `start`-th on."""


class Diverged(ValueError):
    """The loss, or a parameter, is NaN or infinite."""


class Preempted(SystemExit):
    """The run was told to go (SIGTERM), and has saved itself; the process ends with CODE."""

    CODE = 75  # EX_TEMPFAIL: come again

    def __init__(self, message: str):
        super().__init__(message)
        self.code = self.CODE


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
    keep_best: int = 1,
    settings: Mapping[str, Any] | None = None,
    resume_command: str = "",
    seed: int = 0,
    mesh: Mesh | None = None,
    steps_per_call: int = 1,
    loss_scale: LossScale | None = None,
    progress: bool = True,
    **step_options: Any,
) -> list[Row]:
    """Train `model` in place, and return one row of figures per epoch.

    A row has epoch (from 1), step, train_loss, train_accuracy (while training), test_loss,
    test_accuracy, seconds and images_per_second (the first epoch's include compiling). With
    `ema_decay` the averaged parameters are tested, and are what the model gets.

    With several hosts (`jax.distributed.initialize()` first) each calls it alike; `out` is a folder
    that all of them see.

    Args:
      model: from `create_model`.
      train, test: batches to train on, as a rule with `drop_last`, and to test on.
      optimizer: an optax transformation.
      epochs: how many in all, those before a resumption included.
      out: None, or a folder for checkpoints/, metrics.jsonl (the rows), the same in tensorboard/,
        curves.png, and config.json (the settings, versions and devices).
        With it SIGTERM ends the run after the step under way, saved, by `Preempted`.
      resume: go on from the newest good checkpoint in `out`, from the start where there is none.
        The end is bit for bit that of a run which nothing stopped. Default False.
      checkpoint_every: steps between checkpoints within an epoch, besides the one after each.
      keep, keep_best: how many checkpoints to keep, the newest, and of those after an epoch the
        best by test_accuracy. Default 3 and 1.
      settings: what the caller decided, in JSON's types, for config.json; a run resumes with the
        same ones only.
      resume_command: for resume.sh, where there is one.
      seed: of dropout. Default 0.
      mesh: the devices among which each batch is divided. Default: all there are.
      steps_per_call: steps that the device makes without hearing from the host, which checkpoints
        then wait for. Default 1.
      loss_scale: for networks that compute in float16. Default: none.
      progress: show a bar, and a line per epoch, on standard error. Default True.
      step_options: further arguments of `make_train_step`.

    Raises ValueError where `out` holds a run and `resume` is not set, or the run has other
    settings, and `Diverged`; OSError where a checkpoint cannot be written.

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
    for name, value in dict(epochs=epochs, steps_per_call=steps_per_call).items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    with ExitStack() as stack:
        apply, params, state = functional(model)
        ema = step_options.get("ema_decay") is not None
        first = TrainState.create(params, state, optimizer, seed, ema, loss_scale)
        train_step = steps.make_train_step(
            apply, optimizer, scan=steps_per_call > 1, **step_options
        )
        run = _Run(
            first, train_step, steps.make_eval_step(apply), train, test, mesh, steps_per_call
        )
        folder = None
        if out is not None:
            folder = stack.enter_context(_Folder(Path(out), keep, keep_best))
            folder.open(run, resume, settings or {}, resume_command)
        notice = stack.enter_context(_Notice(listen=folder is not None))
        bar = stack.enter_context(_Bar(progress, epochs, train, run.done))
        for epoch in range(run.done // len(train), epochs):
            bar.begin(epoch)
            for trained, before in run.train_epoch(epoch):
                bar.look(run)
                if folder and notice.reached():
                    folder.leave(run)
                every = checkpoint_every or len(train)
                if folder and trained // every > before // every:
                    folder.save(run)
            row = run.end_epoch(epoch)
            bar.end(row)
            if folder:
                folder.show(run.rows, last=epoch == epochs - 1)
                folder.save(run, row["test_accuracy"])
                if notice.reached() and epoch < epochs - 1:
                    folder.leave(run, saved=True)
        run.fill(model)
    return run.rows


class _Run:
    """The state of a run and its steps: `done` updates, the sums of the epoch under way, rows."""

    def __init__(
        self,
        first: TrainState,
        train_step: Any,
        eval_step: Any,
        train: Batches,
        test: Batches,
        mesh: Mesh | None,
        together: int,
    ):
        self.train, self.test, self.together = _shared(train), _shared(test), together
        self.train_step, self.eval_step = train_step, eval_step
        self.mesh = make_mesh() if mesh is None else mesh
        batch = next(iter(train))
        batch = self._stacked([batch]) if together > 1 else batch
        shapes = jax.eval_shape(train_step, first, batch)[1]
        sums = {name: jnp.zeros((), s.dtype) for name, s in shapes.items()}
        sums["broken"] = jnp.zeros((), jnp.int32)  # the first step whose loss was not finite
        self.state, self.sums = shard_state(first, self.mesh), replicate(sums, self.mesh)
        self.done, self.rows = 0, list[Row]()
        self.checkpoint = "there is no checkpoint"

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Train to the end of an epoch; (steps in it, steps in it before) after each call."""
        start, length = self.done % len(self.train), len(self.train)
        self.began, self.here = time.perf_counter(), 0
        batches = self.train.epoch(epoch, start)
        while start < length:
            # Calls begin at multiples, so that a resumed run makes those of one that never stopped.
            size = min(self.together - start % self.together, length - start)
            chosen = list(itertools.islice(batches, size))
            stacked = self.together > 1
            batch = shard(self._stacked(chosen), self.mesh, True) if stacked else chosen[0]
            batch = batch if stacked else shard(batch, self.mesh)
            self.state, metrics = self.train_step(self.state, batch)
            self.sums = _add(self.sums, metrics, np.int32(self.done))
            self.done, self.here, start = self.done + size, self.here + size, start + size
            if start < length:
                yield start, start - size

    @staticmethod
    def _stacked(batches: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def end_epoch(self, epoch: int) -> Row:
        """Test, note the figures, and start new sums."""
        trained = self.figures()
        seconds = time.perf_counter() - self.began
        params, state = self.state.evaluated
        tested = steps.evaluate(self.eval_step, params, state, self.test, self.mesh)
        if not math.isfinite(tested["loss"]):
            raise self._diverged(f"the held-out loss is {tested['loss']}", self.done)
        row: Row = {"epoch": epoch + 1, "step": self.done}
        for split, figures in (("train", trained), ("test", tested)):
            row |= {f"{split}_loss": figures["loss"], f"{split}_accuracy": figures["accuracy"]}
        images = self.here * self.train.batch_size
        self.rows.append(row | {"seconds": seconds, "images_per_second": images / seconds})
        self.sums = jax.tree.map(jnp.zeros_like, self.sums)
        return self.rows[-1]

    def figures(self, sums: steps.Metrics | None = None) -> dict[str, float]:
        """Loss and accuracy of the epoch up to `sums`, by default up to now: then it waits."""
        sums = self.sums if sums is None else sums
        figures = steps.summary(sums)
        if step := int(sums["broken"]):
            raise self._diverged("the loss is NaN or infinite", step)
        return figures

    def check(self) -> None:
        """Before it is saved: the loss shows what a step did only one step later."""
        self.figures()
        if not _finite(self.state.params):
            raise self._diverged("a parameter is NaN or infinite", self.done)

    def _diverged(self, what: str, step: int) -> Diverged:
        epoch, n = divmod(step - 1, len(self.train))
        batch = f"batch {n + 1} of epoch {epoch + 1}"
        names = getattr(self.train, "names", None)
        if names and (found := names(epoch, n)):
            batch += f": {', '.join(found[:4])}" + (", ..." if len(found) > 4 else "")
        return Diverged(
            f"{what} at step {step} ({batch}): lower the learning rate, warm it up, or clip the "
            f"gradients; {self.checkpoint}"
        )

    def fill(self, model: nnx.Module) -> None:
        """Give the trained numbers to the model."""
        for tree in replicate(self.state.evaluated, self.mesh):
            nnx.update(model, tree)


@jax.jit
def _add(sums: steps.Metrics, metrics: steps.Metrics, done: jax.Array) -> steps.Metrics:
    """The sums with those of the steps after `done`, one or several."""
    metrics = jax.tree.map(jnp.atleast_1d, metrics)
    broken = ~jnp.isfinite(metrics["loss"])
    step = jnp.where(broken.any(), done + 1 + jnp.argmax(broken).astype(jnp.int32), 0)
    new = {name: sums[name] + jnp.sum(value) for name, value in metrics.items()}
    return new | {"broken": jnp.where(sums["broken"] == 0, step, sums["broken"])}


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


def _is_ready(x: Any) -> bool:
    return x.is_ready()


def _shared(batches: Batches) -> Batches:
    """Batches of which each host gets its share."""
    hosts = jax.process_count()
    given = getattr(batches, "hosts", None)
    if given not in (None, hosts):
        raise ValueError(f"the batches are made for {given} hosts, and there are {hosts}")
    if given is not None or hosts == 1:
        return batches
    if batches.batch_size % hosts:
        raise ValueError(f"a batch of {batches.batch_size} does not divide among {hosts} hosts")
    return _Share(batches)


@dataclasses.dataclass
class _Share:
    """This host's part of batches that are whole on each."""

    whole: Batches

    @property
    def batch_size(self) -> int:
        return self.whole.batch_size

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._part, self.whole)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        return map(self._part, self.whole.epoch(epoch, start))

    def _part(self, batch: dict[str, Any]) -> dict[str, Any]:
        size = self.batch_size // jax.process_count()
        begin = size * jax.process_index()
        return {name: value[begin : begin + size] for name, value in batch.items()}


class _Notice:
    """Whether the process has been told to go (SIGTERM); a second time ends it at once."""

    def __init__(self, listen: bool):
        self.given, self.calls = False, 0
        self.alone = jax.process_count() == 1
        # With several hosts JAX listens, and lets them all hear of it after the same step.
        self.listen = listen and (
            threading.current_thread() is threading.main_thread()
            if self.alone
            else jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]
        )

    def __enter__(self) -> _Notice:
        if self.listen and self.alone:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.listen and self.alone:
            signal.signal(signal.SIGTERM, self.before or signal.SIG_DFL)

    def _note(self, *_: Any) -> None:
        self.given = True
        signal.signal(signal.SIGTERM, self.before or signal.SIG_DFL)

    def reached(self) -> bool:
        """To be asked once after each call of the step."""
        self.calls += 1
        if self.listen and not self.alone:
            self.given = multihost_utils.reached_preemption_sync_point(self.calls)
        return self.given


class _Folder:
    """What a run leaves on disk; of several hosts the first writes all but checkpoints."""

    def __init__(self, path: Path, keep: int, keep_best: int):
        from flax_nets.train.checkpoint import Checkpoints  # and Orbax, which takes its time

        path.mkdir(parents=True, exist_ok=True)
        self.path, self.writes = path, jax.process_index() == 0
        self.board: Any = None
        self.checkpoints = Checkpoints(path / "checkpoints", keep, keep_best)
        self.plotted = time.perf_counter()

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *error: Any) -> None:
        self.checkpoints.close()
        if self.board:
            self.board.close()

    def open(self, run: _Run, resume: bool, settings: Mapping[str, Any], command: str) -> None:
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
        self.write("config.json", json.dumps({"settings": settings, **_environment()}, indent=2))
        if command:
            self.write("resume.sh", command + "\n")

    def restore(self, run: _Run) -> None:
        """The newest good checkpoint, and the rows up to it."""
        found = self.checkpoints.restore({"state": run.state, "sums": run.sums})
        if found is None:
            return
        run.done, saved = found
        run.state, run.sums = saved["state"], saved["sums"]
        self.note(run)
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        run.rows[:] = [row for row in map(json.loads, lines) if row["step"] <= run.done]

    def save(self, run: _Run, score: float | None = None) -> None:
        """Begin a checkpoint. Its rows come first: they are there when it is."""
        run.check()
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.rows))
        self.checkpoints.save(run.done, {"state": run.state, "sums": run.sums}, score)
        self.note(run)

    def note(self, run: _Run) -> None:
        """Let messages name the newest checkpoint."""
        run.checkpoint = f"the last good checkpoint is {self.checkpoints.path(run.done)}"

    def leave(self, run: _Run, saved: bool = False) -> None:
        """Save, say so, and end the process."""
        if not saved:
            self.save(run)
        self.checkpoints.wait()
        message = f"stopped by SIGTERM after step {run.done}, saved in {self.path}: resume it"
        print(message, file=sys.stderr)
        raise Preempted(message)

    def show(self, rows: list[Row], last: bool) -> None:
        """The last row for TensorBoard; the curves, not too often."""
        if self.writes:
            self._log(rows[-1])
        if self.writes and (last or time.perf_counter() - self.plotted > 10):
            from flax_nets.train.plot import save_curves

            save_curves(self.path / "curves.png", rows)
            self.plotted = time.perf_counter()

    def _log(self, row: Row) -> None:
        if self.board is None:
            from tensorboardX import SummaryWriter

            # A run that was killed may have logged what it now comes to again.
            self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=row["step"])
        for name, value in row.items():
            split, _, what = name.partition("_")
            tag = f"{what}/{split}" if split in ("train", "test") else f"run/{name}"
            if name != "step":
                self.board.add_scalar(tag, value, row["step"])
        self.board.flush()

    def write(self, name: str, text: str) -> None:
        if self.writes:
            write_text(self.path / name, text)


def _environment() -> dict[str, Any]:
    """What a run ran in."""
    versions = {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    versions |= {"flax_nets": flax_nets.__version__, "python": platform.python_version()}
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return dict(
        versions=versions,
        platform=platform.platform(),
        devices=[f"{count} x {kind}" for kind, count in sorted(kinds.items())],
        processes=jax.process_count(),
    )


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

        shown = shown and jax.process_index() == 0
        console = Console(stderr=True, quiet=not shown)
        self.epochs, self.train, self.looked = epochs, train, time.perf_counter()
        self.coming: steps.Metrics | None = None
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
        """At the figures, now and then, once they are here; they stop a run that has diverged."""
        if self.coming is None:
            # Hosts look at different times: one that stopped here would leave the others waiting.
            if time.perf_counter() - self.looked > LOOK and jax.process_count() == 1:
                self.coming = run.sums
                for value in self.coming.values():
                    value.copy_to_host_async()
            return
        if not all(_is_ready(value) for value in self.coming.values()):
            return
        figures, self.coming = run.figures(self.coming), None
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
