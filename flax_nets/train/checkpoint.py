"""Checkpoints of a run: whole ones only, the last few of them, through Orbax.

Orbax writes a checkpoint under another name and renames it. What it cannot see is a file that the
machine, or somebody, damaged afterwards. So beside each checkpoint stands a list of its files with
their sizes and checksums, written last; a checkpoint counts if it agrees with its list.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flax_nets.train.files import write_text

log = logging.getLogger("flax_nets")


class Checkpoints:
    """The checkpoints in a folder, one per step, of any pytree of arrays.

    Args:
      folder: made if it is not there.
      keep: how many to keep, the newest. Default 3.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1")
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # A training step gives its buffers away: what is saved must be on disk before the next.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, good or torn, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any) -> None:
        """Save `tree` as the checkpoint of `step`, and forget the oldest beyond `keep`."""
        self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)
        if jax.process_index() == 0:
            content = {"arrays": _arrays(tree), "files": _files(self._path(step))}
            write_text(self._list_of(step), json.dumps(content))
            for old in self.folder.glob("*.json"):
                if not self._path(int(old.stem)).is_dir():
                    old.unlink()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, tree) of the newest good checkpoint; None where there is none at all.

        Args:
          like: a tree of arrays of the same shapes, whose dtypes and shardings the result gets.

        One that is torn is passed over with a warning, and moved to `torn-<step>`. Raises
        ValueError where all are torn, or where the newest good one is of another network.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = self._problem(step)
            if problem is None:
                tree = self._load(step, like)
                self._set_aside_after(step)
                return step, tree
            log.warning("%s is torn (%s), passing over it", self._path(step), problem)
        if steps:
            raise ValueError(f"{self.folder}: every checkpoint there ({steps}) is torn")
        return None

    def close(self) -> None:
        """Stop Orbax's threads."""
        self._manager.close()

    def _set_aside_after(self, step: int) -> None:
        late = [s for s in self.steps() if s > step]
        if late and jax.process_index() == 0:
            for torn in late:
                aside = self.folder / f"torn-{torn}"
                shutil.rmtree(aside, ignore_errors=True)
                self._path(torn).rename(aside)
        self._manager.reload()

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _list_of(self, step: int) -> Path:
        return self.folder / f"{step}.json"

    def _problem(self, step: int) -> str | None:
        try:
            listed = json.loads(self._list_of(step).read_text())["files"]
        except (OSError, ValueError) as error:
            return f"its list of files cannot be read: {error}"
        found = _files(self._path(step))
        wrong = [name for name in sorted(listed | found) if listed.get(name) != found.get(name)]
        return f"{', '.join(wrong)}: missing, cut short or changed" if wrong else None

    def _load(self, step: int, like: Any) -> Any:
        held, wanted = json.loads(self._list_of(step).read_text())["arrays"], _arrays(like)
        wrong = [
            f"{name}: {held.get(name, 'missing')}, expected {wanted.get(name, 'no such array')}"
            for name in sorted(held | wanted)
            if held.get(name) != wanted.get(name)
        ]
        if wrong:
            raise ValueError(
                f"{self._path(step)} is a checkpoint of another network or optimizer: "
                + "; ".join(wrong[:5])
                + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))


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
