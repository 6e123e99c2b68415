"""The size of a network: shapes, parameters and multiply-adds, module by module.

Nothing is computed and no weight is needed: the network is traced with shapes alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from flax_nets import lowering, registry
from flax_nets.create import build
from flax_nets.functional import set_mode
from flax_nets.inspect.features import modules, watch
from flax_nets.layers.container import each


@dataclasses.dataclass(frozen=True)
class Row:
    """One module; what is inside it is counted with it.

    Args:
      path: as `flax_nets.features.names` has it.
      cls: the name of its class.
      output_shape: for one image, the batch axis included; a tuple of shapes where it returns
        several arrays, None where it took no part (an auxiliary head).
      parameters: how many numbers in it are trained.
      multiply_adds: of its convolutions and matrix products, for one image.
    """

    path: str
    cls: str
    output_shape: tuple[Any, ...] | None
    parameters: int
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` found: the rows, and the totals of the whole network.

    `input_shape` is one image's, without a batch axis.
    """

    network: str
    input_shape: tuple[int, ...]
    output_shape: tuple[Any, ...]
    parameters: int
    multiply_adds: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = ("module", "class", "output", "parameters", "multiply-adds")
        total = Row("total", self.network, self.output_shape, self.parameters, self.multiply_adds)
        lines = [header, *(_cells(row) for row in (*self.rows, total))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        text = [_aligned(line, widths) for line in lines]
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def _cells(row: Row) -> tuple[str, ...]:
    shape = "-" if row.output_shape is None else str(row.output_shape)
    return row.path, row.cls, shape, f"{row.parameters:,}", f"{row.multiply_adds:,}"


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    """Words to the left, figures to the right."""
    pairs = list(zip(cells, widths, strict=True))
    return "  ".join([f"{c:<{w}}" for c, w in pairs[:3]] + [f"{c:>{w}}" for c, w in pairs[3:]])


def summary(model: nnx.Module | str, input_shape: tuple[int, ...] | None = None) -> Summary:
    """The modules of `model` in eval mode, with output shapes, parameters and multiply-adds.

    Args:
      model: a network, which may hold shapes in place of values, or the name of one.
      input_shape: of one image, (height, width, channels). Default: what the network was made for.

    Multiply-adds are those of convolutions and matrix products for one image, where padding counts
    like any other value; normalisation, activations and pooling are left out, as papers leave them.
    Raises ValueError where no `input_shape` is known.

    >>> import flax_nets
    >>> found = flax_nets.summary("lenet5")
    >>> found.parameters, found.multiply_adds
    (61706, 416520)
    >>> found.rows[0]
    Row(path='conv1', cls='Conv', output_shape=(1, 28, 28, 6), parameters=156, multiply_adds=117600)
    """
    if isinstance(model, str):
        model = build(registry.resolve(model))
    spec = getattr(model, "spec", None)
    if input_shape is None:
        if spec is None:
            raise ValueError(
                "a model not made by create_model does not tell its input_shape: pass one, such as "
                "input_shape=(224, 224, 3)"
            )
        input_shape = spec.input_shape
    graph, variables = nnx.split(model)
    state = nnx.to_pure_dict(variables)
    record: dict[str, Any] = {}
    classes = {path: type(module).__name__ for path, module in modules(model).items()}

    def call(state: Any, x: jax.Array) -> Any:
        copy = nnx.merge(graph, state)
        set_mode(copy, train=False)
        watch(modules(copy), record)
        record[""] = copy(x)
        return record[""]

    sizes = _parameters(model)
    dtypes = [v.dtype for v in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))]
    x = jax.ShapeDtypeStruct((1, *input_shape), dtypes[0] if dtypes else jnp.float32)
    abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), state)
    with each(), lowering.use("xla"):  # where a convolution is an equation that shows its sizes
        jaxpr = jax.make_jaxpr(call)(abstract, x)
    work: dict[str, int] = {}
    for path, count in _products(jaxpr.jaxpr, "", classes):
        for above in _upwards(path):
            work[above] = work.get(above, 0) + count
    shapes = {path: _shape(output) for path, output in record.items()}
    return Summary(
        network=type(model).__name__ if spec is None else spec.name,
        input_shape=tuple(input_shape),
        output_shape=shapes[""] or (),
        parameters=sizes.get("", 0),
        multiply_adds=work.get("", 0),
        rows=tuple(
            Row(path, cls, shapes.get(path), sizes.get(path, 0), work.get(path, 0))
            for path, cls in classes.items()
        ),
    )


def _shape(output: Any) -> tuple[Any, ...] | None:
    leaves = [tuple(leaf.shape) for leaf in jax.tree.leaves(output)]
    return leaves[0] if len(leaves) == 1 else tuple(leaves) or None


def _parameters(model: nnx.Module) -> dict[str, int]:
    """Path -> numbers trained in that module and below; "" is the whole network."""
    sizes: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        for above in _upwards(".".join(map(str, path[:-1]))):
            sizes[above] = sizes.get(above, 0) + math.prod(variable.shape)
    return sizes


def _upwards(path: str) -> Iterator[str]:
    """ "a.b" -> "a.b", "a", ""."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _products(
    jaxpr: Jaxpr, path: str, known: Mapping[str, str], times: int = 1
) -> Iterator[tuple[str, int]]:
    """(module path, multiply-adds) for each convolution and matrix product, in inner calls too."""
    for equation in jaxpr.eqns:
        scopes = [scope.name for scope in equation.source_info.name_stack.stack]
        here = next((name for name in reversed(scopes) if name in known), path)
        name, params = equation.primitive.name, equation.params
        inputs: list[Any] = [v.aval for v in equation.invars]
        outputs: list[Any] = [v.aval for v in equation.outvars]
        if name == "conv_general_dilated":
            kernel = inputs[1].shape
            channels = kernel[params["dimension_numbers"].rhs_spec[0]]
            yield here, times * outputs[0].size * (math.prod(kernel) // channels)
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = inputs[0].shape
            terms = math.prod(shape[axis] for axis in contracted)
            yield here, times * outputs[0].size * terms
        again = times * (params["length"] if name == "scan" else 1)
        for inner in jax.tree.leaves(
            list(params.values()), is_leaf=lambda p: isinstance(p, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                inside = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                yield from _products(inside, here, known, again)


def summary_command(argv: list[str]) -> int:
    """`flax-nets summary`."""
    from flax_nets.cli import Parser

    parser = Parser("summary", "The modules of a network: shapes, parameters, multiply-adds.")
    parser.add_argument("name", help="a network's name; flax-nets list prints them")
    parser.add_argument(
        "--image-size", type=int, help="side of the image in pixels; default: the network's own"
    )
    parser.add_json()
    args = parser.parse_args(argv)
    spec = registry.resolve(args.name)
    height, width, channels = spec.input_shape
    if args.image_size is not None:
        if args.image_size < 1:
            raise ValueError(f"--image-size is a number of pixels, got {args.image_size}")
        height = width = args.image_size
        if "image_size" in spec.complete:  # its positions depend on it
            spec = spec.with_arguments(image_size=args.image_size)
    found = summary(build(spec), (height, width, channels))
    print(json.dumps(found.to_dict()) if args.json else found)
    return 0
