"""Loading a checkpoint: time and memory, ours against PyTorch's.

    python -m benchmarks.convert                               # from lenet5 to vit_h_14
    python -m benchmarks.convert --only 'resnet*' --rounds 5

For each network random weights are written as a `.pth`, by PyTorch, into a temporary directory
(2.5 GB for `vit_h_14`; `TMPDIR` says where). Each measurement is a process of its own, the sides
in turn, so that neither profits from a quieter machine; the file is in the page cache for all, and
the first round does not count.

- read: `convert.read` against `torch.load(mmap=True, weights_only=True)`: a dict of mapped tensors.
- load: into a network that is built already: `convert.load` against `load_state_dict`, after either
  read the file; beside them `copy`, a plain copy of the same bytes in NumPy.
- memory: the peak of RssAnon above what it was after the imports, from reading to the loaded
  network, over the size of the weights. It is sampled while it happens.
- cold: from the start of the process, imports and building the network included, to a network
  with the checkpoint's numbers: `create_model(name, weights=path)` against torchvision's (else the
  twin's) class, built without drawing weights, and `load_state_dict(assign=True)`.

`python -m benchmarks.networks --write docs` puts the results into docs/performance.md.
"""

from __future__ import annotations

import gc
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from benchmarks import timing
from benchmarks.timing import Row

NETWORKS = ("lenet5", "mobilenet_v2", "resnet18", "resnet50", "vgg11", "vit_b_16", "vit_h_14")
SIDES = ("torch", "ours", "copy")
WHAT = ("read", "load", "cold")
# At most: ours over torch's; over a plain copy; over the size of the weights.
GOALS = {"read": 1.0, "cold": 1.0, "copy": 3.0, "memory": 1.15}
CALL = "import json; from benchmarks import convert; print(json.dumps(convert.{}({!r}, {!r})))"


def jobs() -> Sequence[str]:
    return NETWORKS


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("no RssAnon in /proc/self/status: this benchmark needs Linux")


class Peak:
    """The largest value of `anonymous` while the block runs, above what it was before.

    Python's collector rests meanwhile, as `timeit` has it: a pass over all that was imported falls
    on whoever allocates next.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        gc.disable()
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
        gc.enable()
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


def measure(job: str, rounds: int) -> Row:
    """Medians of seconds and bytes of one network."""
    runs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder, f"{job}.pth"))
        size = timing.python(CALL.format("make", job, path))
        for _ in range(rounds + 1):
            for side in SIDES:
                for key, value in timing.python(CALL.format(f"{side}_side", job, path)).items():
                    runs.setdefault(f"{side} {key}", []).append(value)
            for side in SIDES[:2]:
                start = time.perf_counter()
                timing.python(CALL.format(f"cold_{side}", job, path))
                runs.setdefault(f"{side} cold", []).append(time.perf_counter() - start)
    medians = {key: statistics.median(values[1:]) for key, values in runs.items()}
    return {"bytes": size, "medians": medians}


def table(rows: Sequence[Row]) -> str:
    """Markdown."""

    def cells(row: Row) -> list[str]:
        found, size = row["medians"], row["bytes"]
        ms = {key: f"{1e3 * value:.4g}" for key, value in found.items()}
        ratio = {what: found[f"ours {what}"] / found[f"torch {what}"] for what in WHAT}
        held = [f"{found[f'{side} memory'] / size:.2f}" for side in ("ours", "torch")]
        return [
            f"{size / 1e6:.4g}",
            f"{ms['ours read']} / {ms['torch read']}, **{ratio['read']:.2f}**",
            f"{ms['ours load']} / {ms['torch load']} / {ms['copy load']}, {ratio['load']:.2f}",
            f"**{found['ours load'] / found['copy load']:.2f}**",
            f"**{held[0]}** / {held[1]}",
            f"{found['ours cold']:.2f} / {found['torch cold']:.2f}, **{ratio['cold']:.2f}**",
        ]

    header = [
        "network",
        "MB",
        "read, ms: ours / torch",
        "load, ms: ours / torch / copy",
        "ours : copy",
        "peak memory over weights: ours / torch",
        "cold process, s: ours / torch",
    ]
    return timing.markdown(header, rows, cells)


BENCHMARK = timing.Benchmark("convert", __doc__, jobs, measure, table)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
