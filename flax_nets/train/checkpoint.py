"""Checkpoints of a run: whole ones only, the last few and the best of them, through Orbax.

All hosts write, and training goes on meanwhile. A checkpoint is written under another name, and
gets its own when it is complete. What this cannot show is a file that the machine, or somebody,
damaged afterwards. So beside each checkpoint stands a list of its files with their sizes and
checksums; a checkpoint counts if it agrees with its list.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_nets.train.files import write_text

log = logging.getLogger("flax_nets")
UNFINISHED = ".new"


class Checkpoints:
    """The checkpoints in a folder, one per step, of any pytree of arrays.

    Several hosts need one folder that all of them see, and call each method at the same time.

    Args:
      folder: made if it is not there.
      keep: how many to keep, the newest. Default 3.
      keep_best: how many of those with the highest scores to keep besides. Default 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, keep_best: int = 1):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1")
        if keep_best < 0:
            raise ValueError(f"keep_best: got {keep_best}, expected at least 0")
        self.folder, self.keep, self.keep_best = Path(folder).absolute(), keep, keep_best
        self._first = jax.process_index() == 0
        if self._first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
        _meet("checkpoints")
        self._writer = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, good or torn, in ascending order."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def best(self) -> int | None:
        """The step with the highest score; of several the last. None where none has a score."""
        scored = self._scored()
        return scored[-1] if scored else None

    def save(self, step: int, tree: Any, score: float | None = None) -> None:
        """Save `tree` as the checkpoint of `step`, in the background.

        When this returns the arrays may be given away. Whatever it replaces stays until the new
        one is complete. Raises OSError where this one or the one before cannot be written: those
        there are stay as they are.
        """
        self.wait()
        if "cpu" in {d.platform for x in jax.tree.leaves(tree) for d in x.devices()}:
            tree = jax.tree.map(jnp.copy, tree)  # Orbax looks at memory that a step reuses
        content = {"score": score, "arrays": _arrays(tree)}
        try:
            self._writer.save(self._unfinished(step), tree, force=True)
        except Exception as error:
            raise self._not_written(step, error) from error
        self._pending = self._thread.submit(self._finish, step, content)

    def wait(self) -> None:
        """Wait until what `save` began is on disk. Raises what `save` raises."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any] | None:
        """(step, tree) of the newest good checkpoint; None where there is none at all.

        Args:
          like: a tree of arrays of the same shapes, whose dtypes and shardings the result gets.
          step: that one, such as `best()`, instead of the newest.

        One that is torn is passed over with a warning, and where it is newer than a good one moved
        to `torn-<step>`. Raises ValueError where all are torn, or where the newest good one is of
        another network.
        """
        self.wait()
        steps = self.steps() if step is None else [step]
        good = -1
        if self._first:
            good = self._newest_good(steps)
            if good >= 0 and step is None:
                self._set_aside_after(good)
        if jax.process_count() > 1:
            good = int(multihost_utils.broadcast_one_to_all(np.int32(good)))
        if good >= 0:
            return good, self._load(good, like)
        if steps:
            raise ValueError(f"{self.folder}: every checkpoint there ({steps}) is torn")
        return None

    def close(self) -> None:
        """Wait for the last one, and stop the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / str(step)

    def _finish(self, step: int, content: dict[str, Any]) -> None:
        """In the background: give a complete checkpoint its list and its name; forget old ones."""
        try:
            self._writer.wait_until_finished()
            if not self._first:
                return
            files = _files(self._unfinished(step))
            write_text(self._list_of(step), json.dumps(content | {"files": files}))
            shutil.rmtree(self.path(step), ignore_errors=True)
            self._unfinished(step).rename(self.path(step))
            self._forget()
        except Exception as error:
            raise self._not_written(step, error) from error

    def _not_written(self, step: int, error: Exception) -> OSError:
        if self._first:
            self._remove_unfinished()
        held = self.steps()
        last = f"the last good one is {self.path(held[-1])}" if held else "there is none before it"
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        return OSError(f"the checkpoint {self.path(step)} could not be written; {last}: {reason}")

    def _forget(self) -> None:
        """All but the last and the best, then lists that are nobody's."""
        scored = self._scored()
        kept = self.steps()[-self.keep :] + scored[max(0, len(scored) - self.keep_best) :]
        for step in set(self.steps()).difference(kept):
            self._list_of(step).unlink(missing_ok=True)  # first: a remainder shall not count
            shutil.rmtree(self.path(step), ignore_errors=True)
        for old in self.folder.glob("*.json"):
            if not self.path(int(old.stem)).is_dir():
                old.unlink()

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _scored(self) -> list[int]:
        """Steps in ascending order of score, then of time."""
        lists = ((step, self._read_list(step)) for step in self.steps())
        scores = [(x["score"], step) for step, x in lists if x.get("score") is not None]
        return [step for _, step in sorted(scores)]

    def _newest_good(self, steps: list[int]) -> int:
        for path in self.folder.glob("*.json"):  # a folder lost, or a kill before it had its name
            if int(path.stem) > max(self.steps(), default=-1):
                log.warning("%s is torn (it is not there), passing over it", path.with_suffix(""))
        for step in reversed(steps):
            problem = self._problem(step)
            if problem is None:
                return step
            log.warning("%s is torn (%s), passing over it", self.path(step), problem)
        return -1

    def _set_aside_after(self, step: int) -> None:
        for torn in [s for s in self.steps() if s > step]:
            aside = self.folder / f"torn-{torn}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(torn).rename(aside)

    def _unfinished(self, step: int) -> Path:
        return self.folder / f"{step}{UNFINISHED}"

    def _list_of(self, step: int) -> Path:
        return self.folder / f"{step}.json"

    def _read_list(self, step: int) -> dict[str, Any]:
        """What stands beside a checkpoint; nothing where that cannot be read."""
        try:
            content = json.loads(self._list_of(step).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _problem(self, step: int) -> str | None:
        listed = self._read_list(step).get("files")
        if listed is None:
            return f"its list of files, {self._list_of(step).name}, is missing or cut short"
        found = _files(self.path(step))
        wrong = [name for name in sorted(listed | found) if listed.get(name) != found.get(name)]
        return f"{', '.join(wrong)}: missing, cut short or changed" if wrong else None

    def _load(self, step: int, like: Any) -> Any:
        held, wanted = self._read_list(step)["arrays"], _arrays(like)
        wrong = [
            f"{name}: {held.get(name, 'missing')}, expected {wanted.get(name, 'no such array')}"
            for name in sorted(held | wanted)
            if held.get(name) != wanted.get(name)
        ]
        if wrong:
            raise ValueError(
                f"{self.path(step)} is a checkpoint of another network or optimizer: "
                + "; ".join(wrong[:5])
                + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._writer.restore(self.path(step), target)


def _meet(name: str) -> None:
    """All hosts wait for each other."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _arrays(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _files(folder: Path) -> dict[str, list[int]]:
    """Path below `folder` -> [bytes, CRC-32]."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            crc = 0
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    crc = zlib.crc32(block, crc)
            found[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    return found
