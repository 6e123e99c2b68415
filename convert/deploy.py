"""A network for other programs: JAX's checkpoints, ONNX and StableHLO."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.formats import orbax
from convert.formats.files import replacing
from flax_nets import lowering
from flax_nets.functional import functional

MESSAGE_LIMIT = (1 << 31) - (1 << 24)  # bytes; a protobuf and a flatbuffer end below 2 GiB
PLATFORMS = ("cpu", "cuda", "tpu")

Paths = str | os.PathLike[str]
Size = int | tuple[int, int] | None


def to_orbax(model: nnx.Module, path: Paths) -> None:
    """Write `{"params": ..., "state": ...}`, as `flax_nets.functional` gives them, for Orbax.

    `orbax.checkpoint.PyTreeCheckpointer().restore(path)` returns the trees, of NumPy arrays, for
    `apply(params, state, x)`; `convert.read(path)` the same numbers under PyTorch's names. The
    directory appears under its name when it is complete.

    Raises ImportError without orbax-checkpoint, FileExistsError where `path` is something else
    than an Orbax directory.
    """
    _, params, state = functional(model)
    tree = {"params": params, "state": state} if state else {"params": params}
    orbax.write(Path(path), jax.tree.map(np.asarray, tree))


def to_onnx(model: nnx.Module, path: Paths, image_size: Size = None) -> None:
    """Write the network in eval mode as ONNX: images [batch, H, W, C] -> logits [batch, classes].

    Args:
      model: one made by `create_model`. Parameters of 16 bits are widened to float32.
      image_size: H and W, or one number for both. Default: the network's own.

    The operations are XLA's own (`lowering.use("xla")`), translated by jax2onnx; the batch may have
    any size. The numbers are in the file, or, beyond the 2 GiB that one can hold, in `<path>.data`
    beside it. Nothing appears under its name before it is complete.

    Raises ImportError without jax2onnx, ValueError for a size that the network does not take.
    """
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise ImportError("ONNX takes a package: pip install 'flax-nets[onnx]'") from error
    path, call, images = Path(path), *_inference(model, image_size, widen=True)
    with warnings.catch_warnings():  # the translator's own code mixes types and ranks
        warnings.simplefilter("ignore")
        with (
            lowering.use("xla"),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            proto = jax2onnx.to_onnx(
                call,
                [jax.ShapeDtypeStruct(images.shape, images.dtype)],
                model_name=type(model).__name__,
                input_names=["images"],
                output_names=["logits"],
                enable_double_precision=images.dtype == jnp.float64,
            )
    _flat_pools(proto.graph)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:200]}.") as folder:
        large = proto.ByteSize() > MESSAGE_LIMIT
        onnx.save_model(
            proto,
            Path(folder, path.name),
            save_as_external_data=large,
            location=f"{path.name}.data",
        )
        for part in (f"{path.name}.data", path.name) if large else (path.name,):
            with open(Path(folder, part), "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(Path(folder, part), path.with_name(part))


def _flat_pools(graph: Any) -> None:
    """Let maximum pooling slide over height and width alone.

    jax2onnx makes it a pooling over all four axes of the images, which onnxruntime does not know.
    """
    from onnx import helper

    made_by = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in [n for n in graph.node if n.op_type == "MaxPool"]:
        given = {a.name: list(a.ints) for a in node.attribute if a.ints}
        if len(given["kernel_shape"]) != 4:
            continue
        inner = made_by[node.input[0]]  # two axes are put before the images', and taken off again
        outer, after = made_by[inner.input[0]], users[node.output[0]][0]
        flat: dict[str, Any] = {k: v[1:3] for k, v in given.items() if k != "pads"}
        if "pads" in given:
            flat["pads"] = given["pads"][1:3] + given["pads"][5:7]
        name = node.output[0]
        to_nchw = helper.make_node(
            "Transpose", [outer.input[0]], [f"{name}_nchw"], perm=[0, 3, 1, 2]
        )
        pool = helper.make_node("MaxPool", to_nchw.output, [f"{name}_pooled"], **flat)
        to_nhwc = helper.make_node("Transpose", pool.output, after.output, perm=[0, 2, 3, 1])
        at = list(graph.node).index(node)
        for position, made in enumerate((to_nchw, pool, to_nhwc)):
            graph.node.insert(at + position, made)
        for old in (node, after, inner, outer):
            graph.node.remove(old)
    used = {name for node in graph.node for name in node.input}
    for constant in [c for c in graph.initializer if c.name not in used]:
        graph.initializer.remove(constant)


def to_stablehlo(
    model: nnx.Module, path: Paths, image_size: Size = None, platforms: tuple[str, ...] = PLATFORMS
) -> None:
    """Write the network in eval mode as StableHLO: images [batch, H, W, C] -> logits.

    Args:
      model: one made by `create_model`; images are of its parameters' dtype.
      image_size: H and W, or one number for both. Default: the network's own.
      platforms: where it shall run, on each in the form that runs best there. Default: all three.

    The batch may have any size. `jax.export.deserialize(bytearray(file)).call(images)` runs it,
    with JAX and without this package. The file appears under its name when it is complete.

    Raises ValueError for a size that the network does not take, and for numbers beyond the 2 GiB
    that one file can hold.
    """
    from jax import export

    path, call, images = Path(path), *_inference(model, image_size)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)) if hasattr(leaf, "nbytes"))
    if size > MESSAGE_LIMIT:
        raise ValueError(f"{path}: {size:,} bytes of numbers, and StableHLO files hold 2 GiB")
    exported = export.export(jax.jit(call), platforms=platforms)(images)
    with replacing(path) as stream:
        stream.write(exported.serialize())


def _inference(
    model: nnx.Module, image_size: Size, widen: bool = False
) -> tuple[Callable[[Any], Any], jax.ShapeDtypeStruct]:
    """The function of images alone, and what it takes: any number of images of one size."""
    if not hasattr(model, "spec"):
        raise ValueError(f"got a {type(model).__name__}, expected a model made by create_model")
    height, width, channels = model.spec.input_shape
    if image_size is not None:
        sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"image_size={image_size!r}: expected H and W, or one positive number")
        height, width = sides
    apply, params, state = functional(model)
    half = (jnp.bfloat16, jnp.float16)
    if widen:
        wide = lambda v: v.astype(jnp.float32) if v.dtype in half else v  # noqa: E731
        params, state = jax.tree.map(wide, params), jax.tree.map(wide, state)
    dtype = jnp.result_type(*jax.tree.leaves(params))
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, height, width, channels), dtype)
    return lambda x: apply(params, state, x)[0], images
