"""Orbax directories: JAX's own checkpoints, here of names or of a model's trees in Flax's layouts.

Orbax is imported when one is read or written: it takes a second, and other files need none of it.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import CheckpointError

_MARK = "_METADATA"  # in every directory that holds a tree
_ITEM = "default"  # where Orbax's CheckpointManager puts it


def within(path: Path) -> Path | None:
    """The directory with the tree: `path` itself or its item, or None where neither has one."""
    return next((d for d in (path, path / _ITEM) if (d / _MARK).is_file()), None)


def load(path: Path) -> dict[str, np.ndarray]:
    """Name -> array in PyTorch's names and layouts, whichever of the two the directory holds."""
    ocp = _package()
    directory = (within(path) or path).absolute()
    try:
        checkpointer = ocp.PyTreeCheckpointer()
        shown = checkpointer.metadata(directory)
        tree = getattr(getattr(shown, "item_metadata", shown), "tree", shown)
        import jax  # with Orbax it is there

        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = checkpointer.restore(directory, restore_args=arguments)
    except Exception as error:  # of a damaged directory, from four packages
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            path, f"a damaged Orbax directory ({reason})", "a whole one"
        ) from error
    if not isinstance(found, dict) or not found:
        raise CheckpointError(path, f"an Orbax tree of {type(found).__name__}", "names or params")
    if isinstance(found.get("params"), dict):
        from convert import rules  # only trees in Flax's layouts need to know the layers

        return rules.named(found["params"]) | rules.named(found.get("state") or {})
    others = [str(k) for k, v in found.items() if not isinstance(v, np.ndarray)]
    if others:
        expected = 'name -> array, or a tree with "params"'
        raise CheckpointError(path, f"an Orbax tree with {', '.join(others[:5])}", expected)
    return found


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """A directory that `orbax.checkpoint` restores. It appears under its name when it is complete.

    Raises FileExistsError where `path` is something else than an Orbax directory.
    """
    if path.exists() and not (path.is_dir() and within(path)):
        raise FileExistsError(f"{path} is there already, and no Orbax directory")
    target = Path(os.path.realpath(path))
    drafts = [target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}") for _ in range(2)]
    new, old = drafts
    try:
        _package().PyTreeCheckpointer().save(new.absolute(), dict(tree))
        if target.exists():
            target.rename(old)  # a directory cannot be replaced by one
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        for draft in drafts:
            shutil.rmtree(draft, ignore_errors=True)


def _package() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Orbax directories take a package: pip install 'flax-nets[train]'"
        ) from error
    return orbax.checkpoint
