"""How fast a network runs on the device that is there.

    flax-nets bench --model resnet50 --train

The same step is compiled in several forms of `flax_nets.lowering`, which then run in turns, so that
whatever else the machine does falls on all of them alike: the ratio says more than the times.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_nets import create_model, functional, lowering, registry
from flax_nets.lowering.select import FORMS

TURN = 0.1  # seconds that a turn lasts at least
PAUSE = 0.02  # seconds before a turn, in which threads of other runtimes stop waiting for work
BUDGET = 60.0  # seconds that all turns of one side may take
# Uncounted rounds. What one side keeps comes from the middle of what another has freed: the first
# steps of a ViT-B/16 beside PyTorch's cleared 1.7 and 0.4 GB of pages anew, for 3 and 2 seconds.
SETTLING = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step.

    Args:
      run: make one step, wait for it, and return its output, or in training its metrics.
      compile_seconds: of tracing and compiling.
      cached: whether JAX's persistent cache had it compiled.
      memory: bytes of parameters, images, results and all between; None where the backend does not
        tell.
    """

    run: Callable[[], Any]
    compile_seconds: float
    cached: bool
    memory: int | None


def prepare(
    model: nnx.Module, batch: Mapping[str, Any], train: bool = False, form: str = "auto"
) -> Step:
    """Compile inference, or a training step (SGD with momentum), for one batch.

    Args:
      model: a network. Training works on copies of its numbers.
      batch: {"image": [N, H, W, C], "label": [N]}, as for `flax_nets.train.make_train_step`.
      train: Default False, inference.
      form: of `flax_nets.lowering.use`. Default "auto".
    """
    function, arguments = step_of(model, batch, train)
    hits = _cache_hits()
    before, began = len(hits), time.perf_counter()
    with lowering.use(form):
        jitted = jax.jit(function, donate_argnums=(0,) if train else ())
        compiled: Any = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - began

    def run() -> Any:
        output = jax.block_until_ready(compiled(*arguments))
        if train:
            arguments[0], output = output
        return output

    return Step(run, seconds, len(hits) > before, _memory(compiled))


def step_of(
    model: nnx.Module, batch: Mapping[str, Any], train: bool
) -> tuple[Callable[..., Any], list[Any]]:
    """The function that `prepare` compiles, and what it calls it with."""
    apply, params, state = functional(model)
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    function: Callable[..., Any]
    if train:
        from flax_nets import train as training

        optimizer = training.sgd(1e-3, momentum=0.9)
        function = training.make_train_step(apply, optimizer)
        arguments = [training.TrainState.create(params, state, optimizer), arrays]
    else:

        def function(params: Any, state: Any, x: jax.Array) -> Any:
            return apply(params, state, x)[0]

        arguments = [params, state, arrays["image"]]
    return function, arguments


def operations(function: Callable[..., Any], *arguments: Any) -> float:
    """Of one call in the plain form, as XLA counts them.

    In a compiled program it does not see what the libraries of a GPU compute; and other forms may
    make more of them. Raises ValueError where JAX has no CPU beside the accelerator, which counts.
    """
    try:
        (cpu, *_) = jax.devices("cpu")
    except RuntimeError as error:
        raise ValueError(
            f"operations are counted by JAX's CPU backend, and JAX has {jax.default_backend()} "
            "alone here: add cpu to JAX_PLATFORMS (cuda,cpu), or unset it"
        ) from error
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    with lowering.use("xla"), jax.default_device(cpu):
        costs: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return float(costs["flops"])


@functools.cache
def _cache_hits() -> list[str]:
    """It grows with each program that JAX's persistent cache had."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    return hits


def _memory(compiled: Any) -> int | None:
    needs = compiled.memory_analysis()
    if needs is None:
        return None
    kept = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    return kept + needs.temp_size_in_bytes + needs.generated_code_size_in_bytes


def in_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each side, a value for each round, in which all take turns.

    Two calls warm a side up, `SETTLING` rounds all of them together. A side is left out of the
    rounds that do not fit into `BUDGET`; where not one fits, its first call is its only value.
    """
    found: dict[str, list[float]] = {}
    plans = {}
    for name, run in sides.items():
        first = _seconds(run, 1)
        again = first if first > BUDGET else _seconds(run, 1)
        found[name] = [first] if again > BUDGET else []
        calls = max(1, round(TURN / again))
        plans[name] = calls, min(rounds, int(BUDGET / (calls * again)))
    for turn in range(-SETTLING, rounds):
        for name, (calls, turns) in plans.items():
            if turn < turns and (turn >= 0 or turns == rounds):
                time.sleep(PAUSE)
                seconds = _seconds(sides[name], calls)
                if turn >= 0:
                    found[name].append(seconds)
    return found


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Of one call, on average."""
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def bench(
    name: str,
    batch_size: int = 8,
    image_size: int | None = None,
    dtype: Any = "float32",
    train: bool = False,
    forms: Sequence[str] = ("auto", "xla"),
    rounds: int = 10,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time a network with random weights and images in each of `forms`; returns plain data.

    Args:
      name: one of `flax_nets.list_models()`.
      batch_size: images in a step. Default 8.
      image_size: their height and width. Default: the network's.
      dtype: to compute in. Default float32.
      train: training steps (forward, backward, SGD with momentum) in place of inference.
      forms: of `flax_nets.lowering`. Default "auto" and, to compare with, "xla".
      rounds: in which the forms take turns, and of which the median counts. Default 10.
      say: is told what comes next.

    Raises ValueError for a name or a form that is not known, and numbers below 1.
    """
    numbers = {"batch_size": batch_size, "image_size": image_size, "rounds": rounds}
    for what, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{what}: got {value}, expected at least 1")
    resized = image_size is not None and "image_size" in registry.resolve(name).complete
    model: Any = create_model(name, dtype=dtype, **({"image_size": image_size} if resized else {}))
    height, _, channels = model.spec.input_shape
    side = image_size or height
    images = np.random.default_rng(0).normal(size=(batch_size, side, side, channels))
    batch = {"image": jnp.asarray(images, dtype), "label": jnp.zeros(batch_size, jnp.int32)}
    steps = {}
    for form in forms:
        say(f"compiling {name} ({form})")
        steps[form] = prepare(model, batch, train, form)
    say("measuring: " + ", ".join(f"{form} {rounds} times" for form in forms))
    found = in_turns({form: step.run for form, step in steps.items()}, rounds)
    rows: dict[str, dict[str, Any]] = {}
    for form, step in steps.items():
        seconds = statistics.median(found[form])
        rows[form] = {
            "compile_seconds": step.compile_seconds,
            "cached": step.cached,
            "ms": 1e3 * seconds,
            "images_per_second": batch_size / seconds,
            "memory": step.memory,
            "rounds": len(found[form]),
        }
    first = rows[forms[0]]["ms"]
    return {
        "model": name,
        "mode": "training" if train else "inference",
        "batch_size": batch_size,
        "image_size": side,
        "dtype": jnp.dtype(dtype).name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "forms": rows,
        "ratios": {form: first / row["ms"] for form, row in rows.items() if form != forms[0]},
    }


def table(figures: Mapping[str, Any]) -> str:
    """For the terminal."""
    f = figures
    lines = [
        f"{f['model']}, {f['mode']}: {f['batch_size']} images of {f['image_size']} x "
        f"{f['image_size']} a step, {f['dtype']}, {f['device']}, jax {f['jax']}",
        f"  {'lowering':8}  {'compiled in':>14}  {'a step':>10}  {'images/s':>10}  {'memory':>10}",
    ]
    for form, row in f["forms"].items():
        compiled = f"{row['compile_seconds']:.1f} s{' (cache)' if row['cached'] else ''}"
        memory = "-" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB"
        lines.append(
            f"  {form:8}  {compiled:>14}  {row['ms']:>7.2f} ms  "
            f"{row['images_per_second']:>10,.1f}  {memory:>10}"
        )
    first = next(iter(f["forms"]))
    for form, ratio in f["ratios"].items():
        lines.append(f"  {first} takes {ratio:.2f} times as long as {form}")
    return "\n".join(lines)


def bench_command(argv: list[str]) -> int:
    """`flax-nets bench`."""
    from flax_nets.cli import Parser

    parser = Parser("bench", "Time a network with random weights on the device that is there.")
    add = parser.add_argument
    add("--model", metavar="NAME", required=True, help="a network, see flax-nets list")
    add("--batch-size", type=int, metavar="N", default=8, help="images in a step")
    add(
        "--image-size", type=int, metavar="PIXELS", help="height and width (default: the network's)"
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    add("--train", action="store_true", help="training steps in place of inference")
    add("--rounds", type=int, metavar="N", default=10, help="of which the median counts")
    add(
        "--lowering",
        nargs="+",
        choices=FORMS,
        help="forms, the first compared to the others: auto is the backend's best, xla XLA's own "
        "operations (default: auto xla)",
    )
    parser.add_json()
    args = parser.parse_args(argv)

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"{text} ...", file=sys.stderr)

    figures = bench(
        args.model,
        args.batch_size,
        args.image_size,
        args.dtype,
        args.train,
        list(dict.fromkeys(args.lowering or ("auto", "xla"))),
        args.rounds,
        say,
    )
    print(json.dumps(figures) if args.json else table(figures))
    return 0
