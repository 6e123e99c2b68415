"""Loading a checkpoint: time and memory, ours against PyTorch's.

    python -m benchmarks.convert                                # a few small networks
    python -m benchmarks.convert --models lenet5 resnet50 vit_h_14 --repeats 5 --out convert

For each network random weights are written as a `.pth`, by PyTorch, into a temporary directory
(2.5 GB for `vit_h_14`; `--folder` says where). Each measurement is a process of its own, the sides
in turn, so that neither profits from a quieter machine; the file is in the page cache for both.

- read: `convert.read` against `torch.load(mmap=True, weights_only=True)`: a dict of mapped tensors.
- load: into a network that is built already: `convert.load` against `load_state_dict`, after either
  read the file; beside them `copy`, a plain copy of the same bytes in NumPy.
- memory: the peak of RssAnon above what it was after the imports, from reading to the loaded
  network, over the size of the weights. It is sampled while it happens.
- cold: from the start of the process, imports and building the network included, to a network
  with the checkpoint's numbers: `create_model(name, weights=path)` against torchvision's (else the
  twin's) class, built without drawing weights, and `load_state_dict(assign=True)`.

Medians, and ratios ours / theirs: below 1 we are ahead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

QUICK = ("lenet5", "resnet18", "mobilenet_v2", "vit_tiny_patch16_224")
SIDES = ("torch", "ours", "copy")
WHAT = ("read", "load", "cold")


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("no RssAnon in /proc/self/status: this benchmark needs Linux")


class Peak:
    """The largest value of `anonymous` while the block runs, above what it was before."""

    def __enter__(self) -> Peak:
        self.before = self.largest = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.001):
            self.largest = max(self.largest, anonymous())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.value = max(self.largest, anonymous()) - self.before


def make(name: str, path: pathlib.Path) -> int:
    """Write random weights under PyTorch's names; returns their bytes."""
    import numpy as np
    import torch

    from convert import rules
    from flax_nets import registry
    from flax_nets.create import build

    rng = np.random.default_rng(0)
    tensors = {}
    for entry in rules.entries(build(registry.resolve(name))):
        shape = entry.torch_shape
        if entry.rule.flax == "count":
            tensors[entry.key] = torch.tensor(7)
        else:  # of one sign: a variance must not be negative
            tensors[entry.key] = torch.from_numpy(rng.random(shape, np.float32))
    torch.save(tensors, path)
    return sum(t.nbytes for t in tensors.values())


def torch_side(name: str, path: str) -> dict[str, float]:
    import torch

    from flax_nets import registry  # for the twin's class and arguments, before the baseline

    spec = registry.resolve(name)
    cls = spec.cls("torch_ref")
    with torch.device("meta"):
        network = cls(**spec.arguments)
    network = network.to_empty(device="cpu")
    for parameter in network.parameters():
        parameter.data.zero_()  # there, as a network's that was in use
    with Peak() as peak:
        start = time.perf_counter()
        state_dict = torch.load(path, mmap=True, weights_only=True)
        read = time.perf_counter()
        network.load_state_dict(state_dict, strict=True)
        loaded = time.perf_counter()
    return {"read": read - start, "load": loaded - read, "memory": peak.value}


def ours_side(name: str, path: str) -> dict[str, float]:
    import jax

    import convert
    from flax_nets import registry
    from flax_nets.create import build

    jax.numpy.zeros(1).block_until_ready()  # the backend is there
    network = build(registry.resolve(name))
    with Peak() as peak:
        start = time.perf_counter()
        state_dict = convert.read(path)
        read = time.perf_counter()
        convert.load(network, state_dict)
        jax.block_until_ready(jax.tree.leaves(network))
        loaded = time.perf_counter()
    return {"read": read - start, "load": loaded - read, "memory": peak.value}


def copy_side(name: str, path: str) -> dict[str, float]:
    import numpy as np

    import convert

    tensors = convert.read(path)
    with Peak() as peak:
        start = time.perf_counter()
        copies = [np.array(value) for value in tensors.values()]
        copied = time.perf_counter() - start
    del copies
    return {"load": copied, "memory": peak.value}


def cold_torch(name: str, path: str) -> None:
    import torch

    try:
        import torchvision

        with torch.device("meta"):
            extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            network = torchvision.models.get_model(name, weights=None, **extra)
    except ValueError:
        from flax_nets import registry

        spec = registry.resolve(name)
        with torch.device("meta"):
            network = spec.cls("torch_ref")(**spec.arguments)
    state_dict = torch.load(path, mmap=True, weights_only=True)
    network.load_state_dict(state_dict, strict=True, assign=True)


def cold_ours(name: str, path: str) -> None:
    import jax

    import flax_nets

    network = flax_nets.create_model(name, weights=path)
    jax.block_until_ready(jax.tree.leaves(network))


def child(*arguments: str) -> tuple[float, dict[str, float]]:
    """(seconds of a whole process, what it printed) of one side."""
    command = [sys.executable, "-m", "benchmarks.convert", "--side", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    took = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-500:]}")
    return took, json.loads(done.stdout or "{}")


def measure(name: str, folder: pathlib.Path, repeats: int) -> dict[str, Any]:
    """All figures of one network."""
    path = folder / f"{name}.pth"
    size = make_elsewhere(name, path)
    runs: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        for side in SIDES:
            for key, value in child(side, name, str(path))[1].items():
                runs.setdefault(f"{side} {key}", []).append(value)
        for side in SIDES[:2]:
            runs.setdefault(f"{side} cold", []).append(child(f"cold-{side}", name, str(path))[0])
    path.unlink()
    median = {key: statistics.median(values[1:]) for key, values in runs.items()}  # first: warm-up
    ratios = {what: median[f"ours {what}"] / median[f"torch {what}"] for what in WHAT}
    ratios["load over copy"] = median["ours load"] / median["copy load"]
    held = {f"{side} memory over weights": median[f"{side} memory"] / size for side in SIDES[:2]}
    return {"model": name, "bytes": size, "median": median, "ratio": ratios | held}


def make_elsewhere(name: str, path: pathlib.Path) -> int:
    """`make` in a process of its own, whose memory is gone afterwards."""
    return int(child("make", name, str(path))[1]["bytes"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| network | MB | read, ms: ours / torch | load, ms: ours / torch / copy | "
        "peak memory / weights: ours / torch | cold process, s: ours / torch |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        median, ratio = row["median"], row["ratio"]
        ms = {key: f"{1e3 * value:.1f}" for key, value in median.items()}
        cells = [
            row["model"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{ms['ours read']} / {ms['torch read']} = {ratio['read']:.2f}",
            f"{ms['ours load']} / {ms['torch load']} / {ms['copy load']} = "
            f"{ratio['load']:.2f}, {ratio['load over copy']:.2f} of a copy",
            f"{ratio['ours memory over weights']:.2f} / {ratio['torch memory over weights']:.2f}",
            f"{median['ours cold']:.2f} / {median['torch cold']:.2f} = {ratio['cold']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    packages = ("jax", "flax", "numpy", "torch", "torchvision")
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        **{name: importlib.metadata.version(name) for name in packages},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", default=QUICK, help="names; default: a few small")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--folder", type=pathlib.Path, help="where the weights are written")
    parser.add_argument("--out", type=pathlib.Path, help="write OUT.json and OUT.md")
    parser.add_argument("--json", action="store_true", help="print figures for programs")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, name, path = args.side
        if side.startswith("cold-"):
            {"torch": cold_torch, "ours": cold_ours}[side.removeprefix("cold-")](name, path)
        elif side == "make":
            print(json.dumps({"bytes": make(name, pathlib.Path(path))}))
        else:
            sides = {"torch": torch_side, "ours": ours_side, "copy": copy_side}
            print(json.dumps(sides[side](name, path)))
        return 0
    if args.repeats < 1:
        parser.error(f"--repeats: got {args.repeats}, expected at least 1")
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.models:
            rows.append(measure(name, pathlib.Path(folder), args.repeats))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    result = {"machine": machine(), "repeats": args.repeats, "rows": rows}
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(rows) + "\n")
    print(json.dumps(result, indent=2) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
