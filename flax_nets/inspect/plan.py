"""What a training step will cost on an accelerator: the step is compiled for it, not run.

    flax-nets plan --model resnet50 --topology v5e:2x2 --batch-size 1024 --dtype bfloat16

With libtpu installed (`pip install "flax-nets[tpu]"`) any machine compiles for any TPU topology,
from 4 chips to 256; `--topology local` compiles for the devices that are there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip: operations per second in bfloat16, bytes, bytes per second.

    `lanes` is the side of its matrix unit, to which narrow channels are padded.
    """

    flops: float
    memory: float
    bandwidth: float
    lanes: int = 128


CHIPS = {  # Google Cloud's documentation of each TPU version, "system architecture"
    "v4": Chip(275e12, 32 * GIB, 1228e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, lanes=256),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled module: the array it makes, and the names of its operands."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: tuple[int, ...]  # axes from the fastest-moving one
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape) * WIDTHS.get(self.dtype, 4)


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*))?")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")


def instructions(text: str) -> Iterator[Instruction]:
    """Those of a module's text whose result is one array; of a tuple, one for each array."""
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, result, opcode, rest = match.groups()
        operands = tuple(re.findall(r"%([\w.-]+)", rest.split("), ", 1)[0]))
        for dtype, shape, layout in _ARRAY.findall(result):
            yield Instruction(
                name, dtype, _numbers(shape), _numbers(layout), opcode, operands, line
            )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of one training step; all but `images` is of one chip.

    Args:
      network, topology, chips, batch_size, dtype: what was asked; `batch_size` over all chips.
      compiler: versions of jax, and of libtpu for a TPU.
      compile_seconds: of this compilation.
      memory: bytes of "weights" (with batch statistics), "optimizer", "activations" (what the
        step needs beside them), "total", and of the chip ("capacity", None where unknown).
      flops, bytes: operations, and bytes read and written by all instructions, of one step. On
        local devices operations are those of the plain form: see `bench.operations`.
      images_per_second: of one chip, at most: what the slower of arithmetic and memory allows.
      share_of_peak: of the chip's arithmetic, at that rate. None, as above, where unknown.
      collectives: opcode -> (how many, bytes).
      convolutions: type of the result -> how many.
      moved: transposes and layout copies of activations, (opcode, type and shape, operation).
      padding: "memory": bytes that tiles add to the results of convolutions, as a share of them;
        "arithmetic": multiply-adds that channels padded to the matrix unit add, likewise.
    """

    network: str
    topology: str
    chips: int
    batch_size: int
    dtype: str
    compiler: str
    compile_seconds: float
    memory: dict[str, float | None]
    flops: float
    bytes: float
    images_per_second: float | None
    share_of_peak: float | None
    collectives: dict[str, tuple[int, int]]
    convolutions: dict[str, int]
    moved: tuple[tuple[str, str, str], ...]
    padding: dict[str, float]

    @property
    def fits(self) -> bool | None:
        """Whether a chip's memory holds it; None where that is unknown."""
        total, capacity = self.memory["total"], self.memory["capacity"]
        return None if capacity is None or total is None else total <= capacity

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**dataclasses.asdict(self), "fits": self.fits}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`, of what JSON made of it."""
        fields = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        fields["moved"] = tuple(map(tuple, fields["moved"]))
        fields["collectives"] = {op: tuple(n) for op, n in fields["collectives"].items()}
        return cls(**fields)

    def __str__(self) -> str:
        memory = ", ".join(
            f"{name} {_shown(size)}" for name, size in self.memory.items() if size is not None
        )
        verdict = {True: "fits", False: "DOES NOT FIT", None: "capacity unknown"}[self.fits]
        collectives = [f"{n} {op} of {_shown(b)}" for op, (n, b) in self.collectives.items()]
        convolutions = [f"{n} in {dtype}" for dtype, n in self.convolutions.items()]
        lines = [
            f"{self.network}, a training step of {self.batch_size} images in {self.dtype} "
            f"on {self.chips} chips of {self.topology}",
            f"  memory per chip    {verdict}: {memory}",
            f"  one step per chip  {self.flops:.3e} operations, {self.bytes:.3e} bytes",
        ]
        if self.images_per_second is not None:
            lines += [
                f"  roofline           at most {self.images_per_second:,.0f} images/s per chip, "
                f"{self.share_of_peak:.0%} of its peak",
                f"  padding            {self.padding['memory']:.0%} more bytes in the results of "
                f"convolutions, {self.padding['arithmetic']:.0%} more multiply-adds",
            ]
        lines += [
            f"  collectives        {', '.join(collectives) or 'none'}",
            f"  convolutions       {', '.join(convolutions) or 'none'}",
            f"  activations moved  {len(self.moved)} transposes and layout copies",
        ]
        for (opcode, array, operation), n in collections.Counter(self.moved).most_common(10):
            lines.append(f"    {n} x {opcode} {array} ({operation})")
        lines.append(f"  compiled in        {self.compile_seconds:.0f} s by {self.compiler}")
        return "\n".join(lines)


def plan(
    name: str,
    topology: str = "v5e:2x2",
    batch_size: int = 1024,
    dtype: Any = jnp.bfloat16,
    **overrides: Any,
) -> Plan:
    """Compile the training step of a network (SGD with momentum) ahead of time, and read the cost.

    Args:
      name: one of `flax_nets.list_models()`.
      topology: "local", the devices that are there, or a TPU version and its mesh of chips:
        "v5e:2x2" (default), "v5e:16x16", "v6e:4x4", "v4:2x2x1", "v5p:2x2x1".
      batch_size: images in a step, over all chips. Default 1024.
      dtype: to compute in; parameters, statistics and the loss are float32. Default bfloat16.
      overrides: any constructor argument of the network.

    Nothing is computed and no weight drawn. Raises ValueError for a topology that is not known, a
    batch that the chips cannot share equally, or without libtpu.
    """
    from flax_nets import functional, registry, train
    from flax_nets.create import build, set_dtype
    from flax_nets.inspect.bench import operations

    spec = registry.resolve(name).with_arguments(**overrides)
    devices, chip = find_devices(topology)
    if batch_size < 1 or batch_size % len(devices):
        raise ValueError(
            f"batch_size: {batch_size} images do not divide among {len(devices)} chips"
        )
    model = build(spec)
    set_dtype(model, dtype)
    apply, params, state = functional(model)
    optimizer = train.sgd(0.1, momentum=0.9)
    step = train.make_train_step(apply, optimizer)
    mesh = train.make_mesh(devices)

    def placed(tree: Any, *axes: str) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(
            lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), tree
        )

    start = jax.eval_shape(lambda p, s: train.TrainState.create(p, s, optimizer), params, state)
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *spec.input_shape), dtype),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    # before minutes of compiling, as it may refuse
    counted = operations(step, start, batch) if topology == "local" else None
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(placed(start), placed(batch, "data"))
    compiled: Any = lowered.compile()
    seconds = time.perf_counter() - began
    costs, needs = compiled.cost_analysis(), compiled.memory_analysis()
    flops, moved_bytes = float(costs.get("flops", 0)), float(costs.get("bytes accessed", 0))
    if counted is not None:
        flops = counted / len(devices)
    held = {"weights": _size((params, state)), "optimizer": _size(start.opt_state)}
    kept = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    rate = share = None
    if chip is not None:
        duration = max(flops / chip.flops, moved_bytes / chip.bandwidth)
        rate = batch_size / len(devices) / duration
        share = flops / chip.flops / duration
    found = list(instructions(compiled.as_text()))
    return Plan(
        network=spec.name,
        topology=topology,
        chips=len(devices),
        batch_size=batch_size,
        dtype=jnp.dtype(dtype).name,
        compiler=compiler(topology),
        compile_seconds=seconds,
        memory={
            **held,
            "activations": needs.temp_size_in_bytes,
            "total": kept + needs.temp_size_in_bytes + needs.generated_code_size_in_bytes,
            "capacity": chip.memory if chip else None,
        },
        flops=flops,
        bytes=moved_bytes,
        images_per_second=rate,
        share_of_peak=share,
        collectives=collectives(found),
        convolutions=convolutions(found),
        moved=tuple(moved_activations(found, batch_size // len(devices), params)),
        padding=padding(found, chip.lanes if chip else 128),
    )


def compiler(topology: str) -> str:
    """The versions that a plan depends on."""
    wanted = ("jax",) if topology == "local" else ("jax", "libtpu")
    found = []
    for name in wanted:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _shown(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _size(tree: Any) -> int:
    return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))


def find_devices(topology: str) -> tuple[list[Any], Chip | None]:
    """The devices to compile for, and what is published of them."""
    if topology == "local":
        return list(jax.devices()), None
    version = topology.partition(":")[0]
    if version not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        known = ", ".join(f"{version}:2x2" for version in CHIPS)
        raise ValueError(f"topology {topology!r}: expected local, or chips such as {known}")
    from jax.experimental import topologies

    # libtpu asks a metadata server what machine it is on, unless it is told that there is none; and
    # it lets one process have the chips, of which compiling needs none
    for variable, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
    ):
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # its own types of error differ between versions
        raise ValueError(
            f"no compiler for {topology}: {error} "
            "(pip install 'flax-nets[tpu]' brings libtpu; --topology local needs none)"
        ) from error
    return list(found.devices), CHIPS[version]


def collectives(found: Iterable[Instruction]) -> dict[str, tuple[int, int]]:
    """Opcode -> (how many, bytes that come out of them)."""
    names: dict[str, set[str]] = collections.defaultdict(set)
    sizes: dict[str, int] = collections.Counter()
    for i in found:
        opcode = i.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            names[opcode].add(i.name)
            sizes[opcode] += i.bytes
    return {opcode: (len(names[opcode]), sizes[opcode]) for opcode in names}


def convolutions(found: Iterable[Instruction]) -> dict[str, int]:
    """Type of the result -> how many."""
    counts: collections.Counter[str] = collections.Counter()
    for i in found:
        cudnn = '"__cudnn$conv' in i.text and i.dtype != "u8"  # bytes that it worked in
        counts[i.dtype] += cudnn or i.opcode == "convolution"
    return {dtype: n for dtype, n in counts.most_common() if n}


def moved_activations(
    found: Iterable[Instruction], images: int, params: Any = ()
) -> Iterator[tuple[str, str, str]]:
    """Transposes and copies of arrays of three axes and more, one of them the images' axis.

    Kernels with as many channels are left out, by the sides of `params`.
    """
    kernels = {_sides(p.shape) for p in jax.tree.leaves(params)}
    for i in found:
        wide = _sides(i.shape)
        moves = i.opcode in ("transpose", "copy") and len(wide) > 2 and images in i.shape
        if moves and wide not in kernels:
            operation = re.search(r'op_name="([^"]*)"', i.text)
            array = f"{i.dtype}[{','.join(map(str, i.shape))}]"
            yield i.opcode, array, operation[1] if operation else "of the compiler's own"


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(side for side in shape if side > 1))


def padding(found: list[Instruction], lanes: int) -> dict[str, float]:
    """What narrow channels waste in convolutions: see `Plan`."""
    shapes = {i.name: i.shape for i in found}
    real = padded = products = padded_products = 0.0
    for i in found:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
        if i.opcode != "convolution" or labels is None or len(i.operands) < 2:
            continue
        rows = 8 * 4 // WIDTHS.get(i.dtype, 4)  # a tile is 8 x 128 of 32 bits
        tile = {axis: side for axis, side in zip(i.layout, (128, rows), strict=False)}
        real += math.prod(i.shape)
        padded += math.prod(_up(side, tile.get(axis, 1)) for axis, side in enumerate(i.shape))
        kernel = dict(zip(labels[2], shapes.get(i.operands[1], ()), strict=False))
        if kernel:
            places = math.prod(i.shape) * math.prod(kernel.values()) / max(kernel["o"], 1)
            wide = math.prod(_up(kernel[c], lanes) / max(kernel[c], 1) for c in "io")
            products, padded_products = products + places, padded_products + places * wide
    return {
        "memory": padded / real - 1 if real else 0.0,
        "arithmetic": padded_products / products - 1 if products else 0.0,
    }


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


HEADER = """\
| network | fits | GiB per chip | operations | bytes | images/s per chip, at most | share of peak \
| collectives | convolutions | activations moved | padding |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def row(p: Plan) -> str:
    """Markdown: a line of the table under `HEADER`."""
    cells = [
        p.network,
        {True: "yes", False: "no", None: "?"}[p.fits],
        f"{(p.memory['total'] or 0) / GIB:.2f}",
        f"{p.flops:.2e}",
        f"{p.bytes:.2e}",
        "?" if p.images_per_second is None else f"{p.images_per_second:,.0f}",
        "?" if p.share_of_peak is None else f"{p.share_of_peak:.0%}",
        ", ".join(f"{n} {op}" for op, (n, _) in p.collectives.items()) or "-",
        ", ".join(f"{n} {dtype}" for dtype, n in p.convolutions.items()) or "-",
        str(len(p.moved)),
        f"{p.padding['arithmetic']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


# One network of each family, for `--all`.
NETWORKS = (
    "lenet5",
    "alexnet",
    "vgg16",
    "nin_imagenet",
    "googlenet",
    "highway19_cifar",
    "resnet50",
    "densenet121",
    "inception_v3",
    "inception_v4",
    "squeezenet1_1",
    "seresnet50",
    "mobilenetv1_100",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "shufflenet_v1_x1_0_g3",
    "shufflenet_v2_x1_0",
    "resnext50_32x4d",
    "xception",
    "cbam_resnet50",
    "vit_b_16",
)


def plan_command(argv: list[str]) -> int:
    """`flax-nets plan`."""
    from flax_nets.cli import Parser
    from flax_nets.train.files import write_text

    parser = Parser("plan", "Compile a training step for an accelerator, and tell what it costs.")
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help="a network, see flax-nets list")
    which.add_argument("--all", action="store_true", help="a table with one of each family")
    add("--topology", default="v5e:2x2", help="TPU version and mesh of chips, or local")
    add("--batch-size", type=int, metavar="N", default=1024, help="images, over all chips")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="to compute in")
    add(
        "--out", type=pathlib.Path, metavar="FILE", help="keep plans as JSON lines, and go on there"
    )
    parser.add_json()
    args = parser.parse_args(argv)
    if args.out:  # before minutes of compiling
        args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = _kept(args.out) if args.out else {}
    plans = []
    for name in NETWORKS if args.all else (args.model,):
        asked = (name, args.topology, args.batch_size, args.dtype)
        if asked not in kept or kept[asked].compiler != compiler(args.topology):
            if sys.stderr.isatty():
                told = f"compiling the step of {name} (minutes for a deep network) ..."
                print(told, file=sys.stderr)
            kept[asked] = plan(*asked[:3], jnp.dtype(args.dtype))
            if args.out:
                lines = (json.dumps(p.to_dict()) for p in kept.values())
                write_text(args.out, "\n".join([*lines, ""]))
        plans.append(kept[asked])
        if args.all and not args.json:  # at once: a whole table takes an hour
            print(*([HEADER] if len(plans) == 1 else []), row(plans[-1]), sep="\n", flush=True)
    if args.json:
        rows = [p.to_dict() for p in plans]
        print(json.dumps(rows if args.all else rows[0]))
    elif not args.all:
        print(plans[0])
    return 0


def _kept(path: pathlib.Path) -> dict[tuple[str, str, int, str], Plan]:
    """The plans in a file, by what was asked; none where there is no such file yet."""
    kept = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        try:
            found = Plan.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a plan in JSON ({error!r})"
            ) from None
        kept[found.network, found.topology, found.batch_size, found.dtype] = found
    return kept
