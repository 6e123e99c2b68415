"""Inference and training step of each network: ours, PyTorch's, and ours in XLA's own operations.

    python -m benchmarks.networks                          # all of them
    python -m benchmarks.networks --only 'mobilenet*' --rounds 20
    python -m benchmarks.networks --write docs             # performance.md, performance.png

One network of each family, in float32, on the CPU. Ours is the functional form under `jax.jit`, its
training step (forward, backward, SGD with momentum) with donated buffers; plain is the same with
`flax_nets.lowering.use("xla")`; torch is eager, with `inference_mode` for inference, in its NCHW
and in its channels_last layout, of which the better one counts. PyTorch's network is
torchvision's, else timm's, else the twin in `torch_ref`, with the same numbers, and their outputs
are compared first. All sides take turns in one process, with as many threads each. Images are as
large as the network's paper has them, 224 pixels for most; the Transformer reads 64 tokens and
writes 64.
"""

from __future__ import annotations

import contextlib
import copy
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.timing import Row

BATCH, TOKENS, VOCABULARY = 8, 64, 8192
MODES = {"inference": "inference", "train": "training step"}
GOALS = {"inference": 0.8, "train": 0.85}  # of the geometric means of ours / torch
TRANSFORMER = "transformer_base"


def jobs() -> list[str]:
    from flax_nets.inspect.plan import NETWORKS

    return [*NETWORKS, TRANSFORMER]


def measure(job: str, rounds: int, images: int = BATCH, side: int | None = None) -> Row:
    """Of so many images, `side` pixels high and wide in place of the network's own size."""
    import convert
    from benchmarks.compare import error
    from flax_nets.inspect.bench import prepare

    timing.torch_threads()
    model, batch = ours(job, images, side)
    against, network = theirs(job, model)
    settle(network, batch)
    convert.load(model, network.state_dict())

    def one(mode: str) -> Row:
        train = mode == "train"
        sides: dict[str, Callable[[], Any]] = {
            "ours": prepare(model, batch, train).run,
            "plain": prepare(model, batch, train, "xla").run,
            **{layout: torch_side(network, batch, train, layout) for layout in timing.LAYOUTS},
        }
        if not train:
            difference = error(sides["ours"](), sides["NCHW"]())
            # Whether it is the same network: the numbers of a deep one with random weights amplify
            # float32's rounding by ten thousand, and parity has benchmarks of its own.
            if not difference < 1e-2:
                raise ValueError(f"{against} computes something else: {difference:.1e} off")
        return timing.compare(sides, rounds)

    return {"against": against, **{mode: one(mode) for mode in MODES}}


def ours(
    name: str, images: int = BATCH, side: int | None = None
) -> tuple[Any, dict[str, np.ndarray]]:
    """A network with random weights, and a batch for it."""
    import flax_nets

    rng = np.random.default_rng(0)
    if name == TRANSFORMER:
        image = rng.integers(0, VOCABULARY, (BATCH, 2, TOKENS), np.int32)
        label = rng.integers(0, VOCABULARY, BATCH * TOKENS, np.int32)
        return translation(), dict(image=image, label=label, mask=np.ones(len(label), np.float32))
    model = flax_nets.create_model(name)
    high, wide, channels = model.spec.input_shape
    shape = (images, side or high, side or wide, channels)
    image = rng.normal(size=shape).astype(np.float32)
    classes = model.spec.complete["num_classes"]
    return model, dict(image=image, label=rng.integers(0, classes, images, np.int32))


def translation() -> Any:
    """The base Transformer, on [N, 2, L]: source and target. Each token is an example."""
    from flax import nnx

    import flax_nets

    class Translation(nnx.Module):
        def __init__(self):
            arguments = dict(vocab_size=VOCABULARY, share_embeddings=True)
            self.network = flax_nets.transformer_base(**arguments, rngs=nnx.Rngs(0))
            self.network.eval()

        def __call__(self, x):
            return self.network(x[:, 0], x[:, 1]).reshape(-1, VOCABULARY)

    return Translation()


def theirs(name: str, model: Any) -> tuple[str, Any]:
    """(whose it is, PyTorch's network with the numbers of ours)."""
    import torch

    import convert
    from benchmarks import libraries
    from benchmarks.parity import NAMES
    from flax_nets import registry

    if name == TRANSFORMER:
        from torch_ref import attention

        class Translation(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = attention.transformer_base(
                    vocab_size=VOCABULARY, share_embeddings=True
                )

            def forward(self, x):
                return self.network(x[:, 0], x[:, 1]).flatten(0, 1)

        library, network, numbers = "torch_ref", Translation(), convert.export(model)
    else:
        also = [a for a, (of, changed) in registry.ALIASES.items() if of == name and not changed]
        names = [f"{lib}/{n}" for lib in ("torchvision", "timm") for n in (name, *also)]
        published = set(NAMES.read_text().split())
        found = next((n for n in names if n in published), None)
        library = found.partition("/")[0] if found else "torch_ref"
        if found:
            network, numbers = libraries.build(found), convert.export(model, library)
        else:
            with torch.device("meta"):
                network = model.spec.cls("torch_ref")(**model.spec.arguments)
            numbers = convert.export(model)
    tensors = {k: torch.tensor(v) for k, v in numbers.items()}
    network.load_state_dict(tensors, assign=True)
    return library, network


def settle(network: Any, batch: Any) -> None:
    """Give batch norms the statistics of the batch, and random numbers to a head of zeros.

    As a new network has them, numbers shrink from layer to layer, PyTorch slows down over the
    smallest, and the outputs tell nothing of what led to them.
    """
    import torch

    from benchmarks.compare import nchw

    norms = {m: m.momentum for m in network.modules() if hasattr(m, "running_mean")}
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.02)
        device = next(network.parameters()).device
        network.train()(torch.tensor(nchw(batch["image"]), device=device))
    for norm, momentum in norms.items():
        norm.momentum = momentum


def torch_side(
    network: Any,
    batch: Any,
    train: bool,
    layout: str,
    device: str = "cpu",
    around: Callable[[], Any] = contextlib.nullcontext,
    compiled: Callable[[Any], Any] = lambda network: network,
) -> Callable[[], Any]:
    """One step of a copy of the network in one of PyTorch's layouts.

    `around` is entered for the forward pass and the loss (`torch.autocast`); `compiled` is given
    the network and returns what is called in its place (`torch.compile`).
    """
    import torch

    from benchmarks.compare import leaves, nchw

    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    network = copy.deepcopy(network).to(device, memory_format=order).train(train)
    x = torch.tensor(nchw(batch["image"]), device=device)
    labels = torch.tensor(batch["label"], device=device).long()
    if x.ndim == 4:
        x = x.to(memory_format=order)
    call = compiled(network)

    def infer():
        with torch.inference_mode(), around():
            return call(x)

    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)

    def learn():
        optimizer.zero_grad()
        with around():
            logits, *extras = leaves(call(x))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            for extra in extras:
                loss = loss + 0.3 * torch.nn.functional.cross_entropy(extra, labels)
        loss.backward()
        optimizer.step()

    return learn if train else infer


def table(rows: Sequence[Row]) -> str:
    return timing.ratios(rows, MODES, "network (against)")


PAGE = """# Speed, measured

Written by `python -m benchmarks.networks --write docs` from `benchmarks/results`: run that, and do
not edit this page.

A ratio below 1 says that we are faster. *torch* is PyTorch eager in the better of its two layouts,
*plain* our own network in XLA's own operations (`flax_nets.lowering.use("xla")`). Times are
milliseconds, of float32 on the CPU. All sides took turns in one process, after a warm-up; so
PyTorch's steps gain as ours do from the memory that `import flax_nets` keeps. A time of a minute
and more was taken once. `flax-nets bench --model NAME` compares ours and plain on any device.

## Networks

{batch} images at a time, of 224 pixels where the network's paper has no other size; a training step
is forward, backward and SGD with momentum. The goals are geometric means of ours : torch of at most
{inference} in inference and {train} in training.

{networks}

{pictures}
"""

OPERATIONS = f"""## Single operations

By `python -m benchmarks.operations`, on {BATCH} images. Backward means with respect to the images
and the kernel.
"""
THROUGHPUT = """## Images per second, torch.compile too

By `python -m benchmarks.throughput`, which on a GPU measures bfloat16 as well, and the share of the
chip's peak.
"""
GROWTH = """## How the cost grows

By `python -m benchmarks.growth`: a ResNet-50's with the number of images and with their size, and
with the depth of a ResNet.
"""
COMPILE = f"""## Compiling

By `python -m benchmarks.compile`: a training step on {BATCH} images, tracing included, each
measurement in a process of its own; in a second process by JAX's persistent cache.
"""
STARTUP = """## Before the first step

By `python -m benchmarks.startup`, each measurement in a process of its own. The commands
`flax-nets predict`, `train`, `eval`, `bench` and `demo` keep what takes a second or more to compile
in `compiled` in the directory of the cache (`~/.cache/flax_nets`, or `FLAX_NETS_HOME`) for the next
process; `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=0` keeps
nothing.
"""
CHECKPOINTS = """## Checkpoints

By `python -m benchmarks.convert`, each measurement in a process of its own, the file in the page
cache. After a comma stands ours over torch's. Figures in bold have a goal: reading and the cold
process take at most {read} of torch's time, loading at most {copy} times a plain copy of the bytes,
and memory at most {memory} times the weights. Networks below some 40 MB miss the goal of loading,
and those of a few MB that of memory: JAX's own tens of microseconds and few kilobytes for each
array outweigh their weights. The copy goes to new memory, whose pages the system has yet to clear:
ratios below 1 say more of that than of ours.
"""


def publish(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """`performance.md`, with what the other benchmarks of speed have measured, and its pictures."""
    from benchmarks import compile, convert, growth, operations, startup, throughput

    rows = [row for row in rows if "error" not in row]
    pictures = []
    for own in timing.by_machine(rows):
        name = f"performance{f'-{len(pictures) + 1}' if pictures else ''}.png"
        plot(folder / name, own)
        title = f"Time of ours and of plain XLA over PyTorch's, {own[0]['machine']}"
        pictures.append(f"![{title}]({name})")
    text = PAGE.format(
        batch=BATCH,
        networks=timing.sections(rows, table),
        pictures="\n\n".join(pictures),
        **GOALS,
    )
    for title, other in (
        (OPERATIONS, operations.BENCHMARK),
        (THROUGHPUT, throughput.BENCHMARK),
        (GROWTH, growth.BENCHMARK),
        (COMPILE, compile.BENCHMARK),
        (STARTUP, startup.BENCHMARK),
        (CHECKPOINTS.format(**convert.GOALS), convert.BENCHMARK),
    ):
        found = timing.in_order(timing.read(other.results), other.jobs())
        if found:
            text += f"\n{title}\n{timing.sections(found, other.table)}\n"
    (folder / "performance.md").write_text(text, "utf-8")


def plot(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Bars from 1, PyTorch's time, to ours and to that of plain XLA, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(10, 1.4 + 0.36 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels, places = figure.subplots(1, 2, sharey=True), np.arange(len(rows))
    for axes, (mode, title) in zip(panels, MODES.items(), strict=True):
        for side, shift, colour in (("ours", -0.2, "#2f6db5"), ("plain", 0.2, "#c9c9c9")):
            times = [row[mode]["ms"] for row in rows]
            values = [ms[side] / min(ms[of] for of in timing.LAYOUTS) for ms in times]
            bars = axes.barh(
                places + shift, np.array(values) - 1, 0.38, left=1, color=colour, label=side
            )
            axes.bar_label(bars, [f"{v:.2f}" for v in values], fontsize=7, padding=2)
        axes.axvline(1, color="#2e8b57", lw=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.margins(x=0.15, y=0.02)
        axes.set_xlabel(f"{title}: time over PyTorch's")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, [row["job"] for row in rows])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path)


BENCHMARK = timing.Benchmark("networks", __doc__, jobs, measure, table, publish)

if __name__ == "__main__":
    sys.exit(timing.main(BENCHMARK, sys.argv[1:]))
