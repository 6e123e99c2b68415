"""Every network learns: a cheap form of each, from random weights, on real handwritten digits.

    python -m benchmarks.learning                          # all of them, printed
    python -m benchmarks.learning --only 'vgg*' --seeds 3  # with the seeds 0, 1 and 2
    python -m benchmarks.learning --write docs             # learning.md, .json and .png

Each trains on 1,442 digits through the jitted step of `flax_nets.train`, with Adam and no
augmentation, and after each epoch is tested in eval mode on the 355 that are held out. A form keeps
the kinds of layers of its network, and has fewer or narrower ones and smaller images; what its
arguments do not name is as in the network itself, initial values included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import inspect
import json
import operator
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any
from unittest import mock

import jax
from flax import nnx

import flax_nets
from flax_nets import layers, processor, train
from flax_nets.models.mobilenet_v3 import SMALL
from flax_nets.train.data import Batches, digits
from flax_nets.train.files import write_text

GOAL = 0.95


@dataclasses.dataclass(frozen=True)
class Form:
    """How a network is made cheap, and how it trains.

    Args:
      side: of the images, in pixels.
      epochs, batch: how many, and examples per step.
      rate: Adam's learning rate at the start; it falls to 0 along a cosine.
      loss: one of `flax_nets.train.losses`.
      arguments: of the constructor, besides 10 classes and 1 channel.
      scale: multiplies the channels of networks whose constructors leave them as they are.
      without: layers to leave out, where constructors leave depth as it is and channels agree.
      gain: multiplies the initial weights: without normalisation, narrow layers that start with
        the standard deviation of wide ones pass on next to nothing.
      lift: added to the initial biases of the last layer. Where a ReLU follows the class maps, all
        of a map can be negative from the start, and then no gradient ever reaches it.
    """

    side: int
    epochs: int
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate: float = 1e-3
    batch: int = 32
    loss: Callable[..., jax.Array] = train.cross_entropy
    scale: float = 1.0
    without: tuple[str, ...] = ()
    gain: float = 1.0
    lift: float = 0.0


# Of Table 2 the first block, here without its stride, and three that follow it.
ROWS = ((3, 16, 16, True, "RE", 1), SMALL[1], *SMALL[3:5])
BLOCKS = (  # of NiN
    (64, 5, 2, 2, 64, 64, "max"),
    (64, 5, 1, 2, 64, 64, "avg"),
    (96, 3, 1, 1, 96, None, None),
)
FORMS = {  # in the order of `flax_nets.registry.FILES`
    "lenet5": Form(32, 5, rate=2e-3),
    "lenet5_1998": Form(32, 8, rate=2e-3, loss=train.rbf_loss),
    "alexnet": Form(
        96, 4, dict(widths=(32, 48, 64, 64, 48), hidden=128, dropout=0.1), batch=16, gain=2
    ),
    "alexnet_2012": Form(
        64, 7, dict(widths=(32, 48, 64, 64, 48), hidden=128, dropout=0), 2e-3, batch=16, gain=6
    ),
    "nin_cifar10": Form(16, 6, dict(blocks=BLOCKS, dropout=0.1), 2e-3, batch=16, gain=2, lift=1),
    "vgg11": Form(
        32, 7, dict(widths=(32, 32, 64, 64, 64), hidden=128, dropout=0), batch=16, gain=1.5
    ),
    "googlenet": Form(
        64, 3, rate=5e-3, scale=0.125, without=("inception4b", "inception4c", "inception5a")
    ),
    "highway_mlp": Form(8, 8, dict(image_size=8), rate=2e-3, batch=16),
    "highway19_cifar": Form(
        16, 6, dict(widths=(16, 24, 32), highways=(1, 1, 1), dropout=0.1), rate=5e-3, batch=16
    ),
    "resnet20_cifar": Form(16, 3, dict(depths=(1, 1, 1)), rate=2e-3),
    "inception_v3": Form(
        75,
        4,
        dict(aux_logits=False, dropout=0),
        1e-2,
        scale=0.125,
        without=("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c"),
    ),
    "squeezenet1_0_bypass": Form(
        32,
        8,
        dict(stem=(64, 3), fires=4, pools=(0, 2), squeeze_ratio=0.25, dropout=0.1),
        batch=16,
        lift=1,
    ),
    "inception_v4": Form(75, 3, dict(depths=(1, 1, 1)), rate=5e-3, scale=0.125),
    "inception_resnet_v2": Form(75, 3, dict(depths=(1, 1, 1)), rate=5e-3, scale=0.125),
    "densenet_bc100_k12_cifar": Form(16, 4, dict(depths=(2, 2)), rate=5e-3),
    "xception": Form(48, 3, dict(middle=1), rate=3e-3, scale=0.125),
    "resnext29_8x64d_cifar": Form(
        16, 4, dict(depths=(1, 1, 1), widths=(16, 32, 64), cardinality=4, base_width=16), rate=2e-3
    ),
    "mobilenetv1_050": Form(
        32, 4, dict(depths=(1, 1, 1, 1), widths=(32, 64, 128, 256, 512)), rate=5e-3
    ),
    "shufflenet_v1_x0_5_g3": Form(48, 4, dict(depths=(2, 2), widths=(24, 60, 120)), rate=3e-3),
    "shufflenet_v2_x0_5": Form(32, 3, dict(depths=(2, 2), widths=(24, 48, 96, 128)), rate=3e-3),
    "seresnet18": Form(32, 4, dict(depths=(1, 1, 1), widths=(16, 32, 64)), rate=2e-3),
    "mobilenet_v2": Form(
        32,
        5,
        dict(
            depths=(1, 2, 2, 1, 0, 0, 0),
            width=0.5,
            widths=(32, 16, 24, 32, 64, 96, 160, 320, 256),
            dropout=0,
        ),
        rate=4e-3,
    ),
    "cbam_resnet18": Form(32, 3, dict(depths=(1, 1, 1), widths=(16, 32, 64)), rate=2e-3),
    "mobilenet_v3_small": Form(32, 4, dict(rows=ROWS, head=128, momentum=0.1), rate=3e-3),
    "vit_b_16": Form(
        16, 6, dict(image_size=16, patch_size=8, depth=2, width=64, num_heads=4), rate=2e-3
    ),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out: the share of held-out digits that are right, after each epoch.

    `seconds` are those of the processor, summed over its threads, compiling included: those of a
    clock say more about what else a machine does.
    """

    name: str
    seed: int
    parameters: int
    seconds: float
    accuracy: tuple[float, ...]


@contextlib.contextmanager
def narrow(width: float) -> Iterator[None]:
    """Within, every layer has `width` times the channels that it is asked for.

    Up to 10 stay as they are: the images' channels and the classes.
    """

    def scaled(cls: type, sizes: tuple[str, ...]) -> Any:
        signature, original = inspect.signature(cls.__init__), cls.__init__

        def __init__(self: Any, *args: Any, **options: Any) -> None:
            given = signature.bind(self, *args, **options).arguments
            changed = {k: round(width * given[k]) for k in sizes if given.get(k, 0) > 10}
            original(**given | changed)

        return mock.patch.object(cls, "__init__", __init__)

    with (
        scaled(layers.Conv, ("in_channels", "out_channels", "groups")),
        scaled(layers.BatchNorm, ("channels",)),
        scaled(layers.Linear, ("in_features", "out_features")),
    ):
        yield


def begin(model: nnx.Module, form: Form) -> None:
    """Leave out what the form is `without`; change initial values by its `gain` and `lift`."""
    for name in form.without:
        setattr(model, name, layers.Identity())
    for _, module in nnx.iter_modules(model):
        if isinstance(module, layers.Conv | layers.Linear):
            module.kernel[...] = module.kernel[...] * form.gain
    if form.lift:
        last = operator.attrgetter(model.output_layers[0])(model)
        last.bias[...] = last.bias[...] + form.lift


def learn(name: str, seed: int = 0) -> Result:
    """Train the cheap form of `name`; the seed decides weights, order and dropout."""
    form, start = FORMS[name], time.process_time()
    arguments = dict(num_classes=10, in_channels=1) | form.arguments
    with narrow(form.scale) if form.scale != 1 else contextlib.nullcontext():
        model = flax_nets.create_model(name, rngs=seed, **arguments)
    begin(model, form)
    apply, params, state = flax_nets.functional(model)
    parameters = sum(p.size for p in jax.tree.leaves(params))
    batches = Batches(digits("train", form.side), form.batch, seed=seed, drop_last=True)
    held_out = Batches(digits("test", form.side), 71)
    optimizer = train.adam(train.schedules.cosine(form.rate, form.epochs * len(batches)))
    train_step = train.make_train_step(apply, optimizer, form.loss)
    eval_step = train.make_eval_step(apply)
    train_state = train.TrainState.create(params, state, optimizer, seed)
    accuracy = []
    for epoch in range(form.epochs):
        for batch in batches.epoch(epoch):
            train_state, _ = train_step(train_state, batch)
        tested = train.evaluate(eval_step, *train_state.evaluated, held_out)
        accuracy.append(tested["accuracy"])
    return Result(name, seed, parameters, time.process_time() - start, tuple(accuracy))


def line(result: Result) -> str:
    """For the terminal."""
    return (
        f"{result.name:<28}{result.seed:>4}{result.parameters:>12,}{result.seconds:>8.1f} s   "
        + "  ".join(f"{accuracy:.1%}" for accuracy in result.accuracy)
    )


def table(results: Sequence[Result]) -> list[str]:
    """Markdown lines: one row per network, the first seed's epochs and every seed's end."""
    lines = [
        "| network | parameters | pixels | batch | rate | seconds | after each epoch, % | "
        "other seeds, % | the form |",
        "| --- " * 9 + "|",
    ]
    for name in dict.fromkeys(r.name for r in results):
        first, *others = (r for r in results if r.name == name)
        form = FORMS[name]
        changed = {k: getattr(form, k) for k in ("scale", "without", "gain", "lift")}
        changed = {k: v for k, v in changed.items() if v != getattr(Form, k)}
        arguments = ", ".join(f"{k}={v}" for k, v in (form.arguments | changed).items())
        cells = (
            name,
            f"{first.parameters:,}",
            str(form.side),
            str(form.batch),
            str(form.rate),
            f"{first.seconds:.0f}",
            " ".join(f"{100 * a:.1f}" for a in first.accuracy),
            " ".join(f"{100 * r.accuracy[-1]:.1f}" for r in others),
            f"`{arguments}`" if arguments else "the network itself",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


PAGE = """\
# Every network learns

A cheap form of each network, from random weights, learns handwritten digits: 1,442 of
scikit-learn's to train on, through the jitted step of `flax_nets.train` with Adam, whose rate falls
to 0 along a cosine, and without augmentation; 355 held out, so that 5 are 1.4 %. A form keeps the
kinds of layers of its network, and has fewer or narrower ones, and small images.

`tests/test_learning.py` asks {goal:.0%} of each form after its last epoch; the least here is
{least:.1%}. This shows that the networks learn, and ranks none: the same hands wrote both parts,
and forms, rates and epochs were chosen with the held-out digits in view.

Measured with {versions} ({processor}) by

    python -m benchmarks.learning --write docs

and, where there are other seeds, also with `--only NAME --seeds 3`. The seconds are the
processor's, summed over threads; of the deep ones compiling takes the most.

{table}

Percentages are of the held-out digits: seed 0 after each epoch, seeds 1 and 2 after the last. The
form is told by the constructor's arguments, besides 10 classes and 1 channel, and by

- `scale`, which multiplies the channels, where the constructor leaves them as they are;
- `without`: blocks left out, where it leaves the depth as it is;
- `gain`, which multiplies the initial weights: without normalisation, narrow layers that start
  with the standard deviation of wide ones pass on next to nothing;
- `lift`, added to the initial biases of the class maps that a ReLU follows: a map that is negative
  everywhere from the start would never get a gradient.

LeNet-5 of 1998 trains with its own loss (`rbf_loss`), GoogLeNet with the losses of its auxiliary
heads, times 0.3. That plain SGD trains highway networks of 50 and 100 layers, and not plain ones as
deep, is shown by `tests/test_highway.py`.

A line per seed, and the {goal:.0%} dashed:

![Held-out accuracy per epoch](learning.png)
"""


def page(results: Sequence[Result]) -> str:
    """`learning.md`."""
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax")]
    return PAGE.format(
        goal=GOAL,
        least=min(r.accuracy[-1] for r in results),
        versions=", ".join([*versions, f"Python {platform.python_version()}"]),
        processor=processor.name(),
        table="\n".join(table(results)),
    )


def plot(path: pathlib.Path, results: Sequence[Result]) -> None:
    """One small panel per network: held-out accuracy by epoch, a line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.name for r in results))
    columns = 5
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(10, 1.5 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for name, axes in zip(names, panels, strict=False):
        for result in (r for r in results if r.name == name):
            epochs = range(1, len(result.accuracy) + 1)
            axes.plot(epochs, [100 * a for a in result.accuracy], color="#2f6db5", lw=1.2)
        axes.axhline(100 * GOAL, color="#2e8b57", lw=0.8, ls="--")
        axes.set_title(name, fontsize=7)
        axes.set_ylim(0, 102)
        axes.tick_params(labelsize=6)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supylabel("held-out digits right, %", fontsize=8)
    figure.supxlabel("epoch", fontsize=8)
    figure.savefig(path)


def publish(folder: pathlib.Path, results: Sequence[Result]) -> None:
    """Write the page; what it says of networks without new results stays."""
    path = folder / "learning.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    new = {r.name for r in results}
    every = [Result(**row) for row in kept if row["name"] not in new] + list(results)
    names = list(FORMS)
    every = sorted(
        (r for r in every if r.name in FORMS), key=lambda r: (names.index(r.name), r.seed)
    )
    rows = ",\n".join(json.dumps(dataclasses.asdict(r)) for r in every)
    write_text(path, f"[\n{rows}\n]\n")
    write_text(folder / "learning.md", page(every))
    plot(folder / "learning.png", every)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", default="*", help="a glob pattern of names")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--write", type=pathlib.Path, help="a folder for the page and its picture")
    given = parser.parse_args(argv)
    chosen = [name for name in FORMS if fnmatch.fnmatchcase(name, given.only)]
    if not chosen or given.seeds < 1:
        parser.error(f"--only {given.only} --seeds {given.seeds}: no run; of {', '.join(FORMS)}")
    results = []
    for name in chosen:
        for seed in range(given.seeds):
            results.append(learn(name, seed))
            print(line(results[-1]), flush=True)
    if given.write:
        publish(given.write, results)
    return int(any(r.accuracy[-1] < GOAL for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
