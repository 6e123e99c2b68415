"""`python -m convert`: checkpoints between libraries, and a look at what is in one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake of the caller's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    inspecting = argv[:1] == ["inspect"]
    try:
        if inspecting:
            return inspect(_inspect_parser().parse_args(argv[1:]))
        return port(_parser().parse_args(argv))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def port(args: argparse.Namespace) -> int:
    """Read SRC as a checkpoint of a network, check it, and write DST."""
    import flax_nets

    model = flax_nets.create_model(args.model, weights=args.src, param_dtype=None)
    result: dict[str, object] = {"model": args.model, "source": args.src}
    report = None
    if args.verify:
        quiet = args.json or not sys.stderr.isatty()
        report = convert.verify(model, args.src, progress=(lambda s: None) if quiet else _say)
        result["verify"] = report.to_dict()
        if not args.json:
            print(report)
    if args.dst and (report is None or report):
        state_dict = convert.export(model, args.to)
        convert.write(args.dst, state_dict)
        result["written"] = {"path": args.dst, "dialect": args.to, "tensors": len(state_dict)}
        if not args.json:
            size = sum(v.nbytes for v in state_dict.values())
            mebibytes = f"{size / 2**20:.1f} MiB"
            print(f"wrote {args.dst}: {len(state_dict)} tensors, {mebibytes}, {args.to} names")
    if not args.dst and not args.verify and not args.json:
        print(f"{args.src} is a checkpoint of {args.model}; give DST to write it, or --verify")
    if args.json:
        print(json.dumps(result, indent=2))
    return 0 if report is None or report else 1


def inspect(args: argparse.Namespace) -> int:
    """Print name, shape and type of every tensor in SRC."""
    tensors = convert.read(args.src)
    if args.json:
        rows = {k: {"shape": v.shape, "dtype": str(v.dtype)} for k, v in tensors.items()}
        print(json.dumps(rows, indent=2))
        return 0
    width = max((len(k) for k in tensors), default=0)
    for key, value in tensors.items():
        print(f"{key:{width}}  {value.dtype!s:9} {tuple(value.shape)}")
    numbers = sum(int(np.prod(v.shape)) for v in tensors.values())
    print(f"{len(tensors)} tensors, {numbers:,} numbers")
    return 0


def _say(step: str) -> None:
    print(f"verifying: {step} ...", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Port a PyTorch checkpoint: read it as a checkpoint of one of our networks, "
        "check every name and shape, compare with PyTorch, and write it for any library.",
        epilog="python -m convert inspect SRC lists what is in a checkpoint.",
    )
    parser.add_argument("src", metavar="SRC", help="a checkpoint: .pth, .safetensors, .npz")
    parser.add_argument("dst", metavar="DST", nargs="?", help="a file to write, by its suffix")
    parser.add_argument("--model", required=True, help="its network (flax-nets list)")
    parser.add_argument("--verify", action="store_true", help="compare with PyTorch in float64")
    parser.add_argument("--to", default="native", metavar="DIALECT", help="whose names DST gets")
    parser.add_argument("--json", action="store_true", help="print figures for programs")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert inspect", description="List the tensors of a checkpoint."
    )
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("--json", action="store_true", help="print figures for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
