"""Dataclasses as the options of a command: tyro reads them, and a mistake is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

Panels = Mapping[str, tuple[str, ...]]
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def parse(
    command: str,
    text: str,
    argv: Sequence[str],
    *defaults: Any,
    panels: Panels,
    required: Collection[str] = (),
) -> list[Any]:
    """The `defaults`, dataclasses, changed by the options in `argv`.

    Args:
      command: of flax-nets.
      text: above the options in its help.
      panels: "title: a sentence" -> fields, which the help shows together. Every field must be in
        one; the help of each is what the docstring of its class says.
      required: fields that have no default.

    Raises ValueError for a mistake in `argv`, and SystemExit after --help.
    """
    import tyro

    known = {field.name: default for default in defaults for field in dataclasses.fields(default)}
    listed = [name for names in panels.values() for name in names]
    if sorted(listed) != sorted(known):
        raise TypeError(f"panels: missing or twice {set(known) ^ set(listed)}")
    made = [_panel(title, names, known, required) for title, names in panels.items()]
    whole = dataclasses.make_dataclass("Options", made)
    said, prog = io.StringIO(), f"flax-nets {command}"
    config = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(said):
            found: Any = tyro.cli(whole, prog=prog, description=text, args=argv, config=config)
    except SystemExit as done:
        if not done.code:
            raise
        raise ValueError(f"{_one_line(said.getvalue())} ({prog} --help)") from None
    given = {
        name: getattr(getattr(found, field.name), name)
        for field, names in zip(dataclasses.fields(found), panels.values(), strict=True)
        for name in names
    }
    return [
        type(default)(**{field.name: given[field.name] for field in dataclasses.fields(default)})
        for default in defaults
    ]


def _panel(
    title: str, names: tuple[str, ...], known: Mapping[str, Any], required: Collection[str]
) -> tuple[str, Any]:
    """A field of the whole: a dataclass of some of the options."""
    rows: list[Any] = []
    for name in names:
        default, cls = getattr(known[name], name), type(known[name])
        hint = typing.get_type_hints(cls)[name]
        needed = name in required
        plain = needed or default is None or default is False or default == ()
        shown = _option(hint, _about(cls, name), plain)
        rows.append((name, shown) if needed else (name, shown, dataclasses.field(default=default)))
    heading, _, sentence = title.partition(": ")
    panel = dataclasses.make_dataclass(heading, rows, kw_only=True)
    panel.__doc__ = sentence
    return heading, panel


def _option(hint: Any, about: str, plain: bool) -> Any:
    """The type with its help; `plain` where no default is worth telling."""
    import tyro

    options: dict[str, Any] = {"help": about}
    if hint is bool and plain:  # off by default: no option to switch it off
        hint = tyro.conf.FlagCreatePairsOff[bool]
    inner = [t for t in typing.get_args(hint) if t is not type(None)]
    if typing.get_origin(hint) is tuple:  # of any length
        options["metavar"] = f"{METAVARS[inner[0]]} ..."
    elif typing.get_origin(hint) in (types.UnionType, typing.Union):  # with None, which goes unsaid
        inside = typing.get_args(inner[0])
        chosen = typing.get_origin(inner[0]) is Literal
        words = [METAVARS[t] for t in inside or inner] if not chosen else []
        options["metavar"] = " ".join(words) or "{" + ",".join(inside) + "}"
    elif hint in METAVARS:
        options["metavar"] = METAVARS[hint]
    if plain:  # tyro says itself what is required
        options["help_behavior_hint"] = ""
    return Annotated[hint, tyro.conf.arg(**options)]


def _about(cls: type, name: str) -> str:
    """What the docstring of a dataclass says of a field."""
    found = re.search(rf"^  {name}: (.*(?:\n    .*)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    if not found:
        raise TypeError(f"{cls.__name__} does not say what {name} is")
    return " ".join(found[1].split())


def _one_line(printed: str) -> str:
    """What stands in the box that tyro draws, without its last words on --help."""
    lines = re.sub(r"\x1b\[[\d;]*m|-{4,}", "", printed).splitlines()  # colours, rules of ASCII
    inside = [line.strip("│| ─") for line in lines if not line.startswith(("╭", "╰", "+"))]
    text = " ".join(line for line in inside if line)
    return re.split(" (?:For full helptext|Argument helptext)", text)[0]
