"""The `flax-nets` command: each of its commands is a function, imported when it is called."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

# Name -> (module, its function (arguments) -> exit code, one line of help).
COMMANDS = {
    "list": ("flax_nets.cli", "list_command", "the networks there are"),
    "summary": ("flax_nets.inspect.summary", "summary_command", "the modules of a network"),
    "predict": ("flax_nets.predict", "predict_command", "the classes of images"),
    "train": ("flax_nets.train.commands", "train_command", "train a network"),
    "eval": ("flax_nets.train.commands", "eval_command", "the accuracy of a checkpoint"),
    "plan": ("flax_nets.inspect.plan", "plan_command", "what a training step costs on a TPU"),
    "bench": ("flax_nets.inspect.bench", "bench_command", "how fast a network runs here"),
    "demo": ("flax_nets.demo", "demo_command", "a tour: convert, verify, evaluate, train, export"),
}
CACHED = ("predict", "train", "eval", "bench", "demo")  # what they compile is kept


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for a mistake of the caller's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        if name == "--version":
            from flax_nets import __version__

            print(__version__)
            return 0
        if name not in COMMANDS:
            raise ValueError(f"there is no command {name!r}: it is one of {', '.join(COMMANDS)}")
        if argv is None and name in CACHED:  # a program that calls us has its own settings
            keep_compiled()
        module, function, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), function)(rest)
    except SystemExit as done:  # argparse, after --help
        return int(done.code or 0)
    except ModuleNotFoundError as error:
        print(f"error: {error}: pip install 'flax-nets[train]'", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 2


def keep_compiled() -> None:
    """Let JAX keep what it compiles in compiled/ of `flax_nets.weights.cache.home()`.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.
    """
    import jax

    from flax_nets import processor
    from flax_nets.weights import cache

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    # One folder for each kind of processor: a home may be shared, and code of one crash on another.
    kind = f"{sys.platform} {platform.machine()} {processor.features()}"
    try:
        folder = cache.home() / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return  # no home, or one without room or rights: compile each time
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def usage() -> str:
    """The help of the command itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flax-nets COMMAND ...",
            "",
            "Classic vision networks in Flax, each equal to its PyTorch twin.",
            "",
            *lines,
            "",
            "flax-nets COMMAND --help tells more; python -m convert is the converter.",
            "What takes a second or more to compile is kept in ~/.cache/flax_nets/compiled (or in",
            "FLAX_NETS_HOME) for the next time; JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.",
        ]
    )


class Parser(argparse.ArgumentParser):
    """Of one command. A mistake is a ValueError, so that `main` reports all of them alike."""

    def __init__(self, command: str, description: str):
        prog = f"flax-nets {command}"
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """argparse's, and the help tells a default."""
        if options.get("default") not in (None, argparse.SUPPRESS):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def add_json(self) -> None:
        """The option that every command with figures has."""
        self.add_argument("--json", action="store_true", help="print figures for programs")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help)")


def list_command(argv: list[str]) -> int:
    """`flax-nets list`."""
    from flax_nets import registry

    parser = Parser("list", "List the names of the networks.")
    parser.add_argument("pattern", nargs="?", default="*", help='such as "resnet*"')
    parser.add_json()
    args = parser.parse_args(argv)
    names = registry.list_models(args.pattern)
    if not names:
        near = registry.suggest(args.pattern, registry.list_models())
        raise ValueError(f"no network's name matches {args.pattern!r}{near}")
    print(json.dumps(names) if args.json else "\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
