"""`python -m convert`: checkpoints between libraries, and a look at what is in one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from flax import nnx

import convert
import flax_nets
from convert.identify import decide

PROGRAMS: dict[
    str, Callable[[nnx.Module, str], None]
] = {  # DST -> what writes a network, not its names
    ".onnx": convert.to_onnx,
    ".stablehlo": convert.to_stablehlo,
    ".orbax": convert.to_orbax,
}


class Parser(argparse.ArgumentParser):
    """A mistake is a ValueError, so that `main` reports all of them alike, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 for a network that is not equal, 2 for a mistake.

    The caller's mistakes are one line on stderr; a checkpoint that does not fit has a line for each
    key at fault.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["inspect"]:
            return inspect(_inspect_parser().parse_intermixed_args(argv[1:]))
        return port(_parser().parse_intermixed_args(argv))  # DST may follow options
    except SystemExit as done:  # argparse, after --help
        return int(done.code or 0)
    except BrokenPipeError:  # whoever reads, as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def port(args: argparse.Namespace) -> int:
    """Read SRC as a checkpoint of a network, check it, and write DST."""
    _check(args)
    tensors = convert.read(args.src, ema=args.ema)
    source = tensors if args.ema else args.src  # beside a path there may be a configuration
    name = args.model or decide(tensors, args.src)
    wide = any(value.dtype == np.float64 for value in tensors.values())
    with jax.enable_x64(wide or jax.config.read("jax_enable_x64")):
        model = flax_nets.create_model(name, weights=source, num_classes=args.num_classes)
        return _port(args, name, source, model)


def _port(args: argparse.Namespace, name: str, source: Any, model: nnx.Module) -> int:
    """The same, once the network is there; `source` is what its numbers came from."""
    result: dict[str, object] = {"model": name, "source": args.src}
    report = None
    if args.verify:
        quiet = args.json or not sys.stderr.isatty()
        reference = args.against or (source if args.num_classes is None else convert.export(model))
        report = convert.verify(model, reference, progress=(lambda s: None) if quiet else _say)
        result["verify"] = report.to_dict()
        if args.plot:
            report.plot(args.plot)
    written = ""
    if args.dst and (report is None or report):
        tensors = _write(args, model)
        result["written"] = {"path": args.dst, "dialect": args.to, "tensors": tensors}
        written = f"wrote {args.dst}: {_size(Path(args.dst)) / 2**20:.1f} MiB"
        written += f", {tensors} tensors, {args.to} names" if tensors else ""
    elif args.dst:
        written = f"{args.dst} is not written"
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        fits = f"{args.src} is a checkpoint of {name}; give DST to write it, or --verify"
        print(
            *filter(None, [written, str(report) if report is not None else ""]) or [fits], sep="\n"
        )
    return 0 if report is None or report else 1


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is read or computed."""
    for name in ("against", "plot"):
        if getattr(args, name) and not args.verify:
            raise ValueError(f"--{name} goes with --verify")
    for name in (args.dst, args.plot):
        if name and not Path(name).absolute().parent.is_dir():
            raise ValueError(f"{name}: there is no directory {Path(name).parent}")
    suffix = Path(args.dst).suffix if args.dst else ""
    if args.dst and suffix not in {*convert.formats.WRITABLE, *PROGRAMS}:
        known = ", ".join(sorted({*convert.formats.WRITABLE, *PROGRAMS}))
        raise ValueError(f"{args.dst}: suffix {suffix!r}; expected one of {known}")
    if args.to != "native" and suffix in PROGRAMS:
        raise ValueError(f"--to names tensors, and {args.dst} will hold a network of ours")
    if args.shard_size and suffix != ".safetensors":
        raise ValueError(f"--shard-size is for .safetensors, not {args.dst}")


def _write(args: argparse.Namespace, model: nnx.Module) -> int:
    """Write DST; returns how many named tensors are in it."""
    suffix = Path(args.dst).suffix
    if suffix in PROGRAMS:
        PROGRAMS[suffix](model, args.dst)
        return 0
    state_dict = convert.export(model, args.to)
    convert.write(args.dst, state_dict, shard_size=args.shard_size)
    return len(state_dict)


def _size(path: Path) -> int:
    """Bytes of what was written there: a file, a directory, or the shards of an index."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    if path.exists():
        return path.stat().st_size
    index = json.loads(path.with_name(f"{path.name}.index.json").read_text())
    return sum(os.path.getsize(path.with_name(n)) for n in set(index["weight_map"].values()))


def inspect(args: argparse.Namespace) -> int:
    """Say what SRC holds."""
    found = convert.inspect(args.src, ema=args.ema)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0


def _say(step: str) -> None:
    print(f"verifying: {step} ...", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m convert",
        description="Port a PyTorch checkpoint: read it as a checkpoint of one of our networks, "
        "check every name and shape, compare with PyTorch, and write it for any library.",
        epilog="python -m convert inspect SRC says what is in a checkpoint.",
        allow_abbrev=False,
    )
    _add_source(parser)
    parser.add_argument(
        "dst",
        metavar="DST",
        nargs="?",
        help="what to write, by its suffix: .pth, .safetensors, .npz, .orbax, .onnx, .stablehlo",
    )
    parser.add_argument("--model", help="its network (flax-nets list); default: what it fits")
    parser.add_argument("--num-classes", type=int, help="another number of classes: a fresh head")
    parser.add_argument("--verify", action="store_true", help="compare with PyTorch in float64")
    parser.add_argument(
        "--against", metavar="REF", help="verify: the checkpoint that PyTorch gets (default: SRC)"
    )
    parser.add_argument("--plot", metavar="PNG", help="verify: draw the errors of all stages")
    parser.add_argument("--to", default="native", metavar="DIALECT", help="whose names DST gets")
    parser.add_argument("--shard-size", metavar="SIZE", help="of a .safetensors, such as 500MB")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m convert inspect",
        description="Say what a checkpoint holds: its format, the likely networks, its tensors.",
        allow_abbrev=False,
    )
    _add_source(parser)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a checkpoint: .pth, .safetensors, .npz, .orbax")
    parser.add_argument("--ema", action="store_true", help="take its averaged weights")
    parser.add_argument("--json", action="store_true", help="print figures for programs")


if __name__ == "__main__":
    sys.exit(main())
