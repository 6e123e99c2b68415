"""Batch norm folded into the convolutions before it: the same function in fewer passes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from flax_nets.functional import set_mode
from flax_nets.inspect.features import modules
from flax_nets.layers import BatchNorm, Conv, Identity
from flax_nets.layers.container import each
from flax_nets.layers.norm import accumulation_dtype, inverse_root

BEFORE, AFTER = "output of ", "input of "


def fold_batch_norm(model: nnx.Module, input_shape: tuple[int, ...] | None = None) -> nnx.Module:
    """A copy of `model` for inference, where convolutions hold the batch norms that follow them.

    Args:
      input_shape: of one image, (height, width, channels). Default: what the network was made for.

    In eval mode batch norm multiplies each channel by a number and adds another, which the
    convolution's kernel and bias can do as well. The network is traced with shapes alone to find
    where a batch norm takes a convolution's output and nothing else does; other batch norms stay
    as they are. The outputs are the same but for rounding. The copy cannot be trained any more,
    and its tensors no longer have PyTorch's names.

    Raises ValueError where no `input_shape` is known.

    >>> import jax, flax_nets
    >>> model = flax_nets.create_model("resnet20_cifar", depths=(1, 1, 1))
    >>> folded = flax_nets.fold_batch_norm(model)
    >>> type(folded.bn1).__name__, folded.conv1.bias.shape
    ('Identity', (16,))
    """
    spec = getattr(model, "spec", None)
    if input_shape is None:
        if spec is None:
            raise ValueError(
                "a model not made by create_model does not tell its input_shape: pass one, such as "
                "input_shape=(224, 224, 3)"
            )
        input_shape = spec.input_shape
    folded = nnx.merge(nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model)))
    set_mode(folded, train=False)
    found = modules(folded)
    for conv, norm in _pairs(folded, tuple(input_shape)):
        _put(folded, conv, _joined(found[conv], found[norm]))
        _put(folded, norm, Identity())
    return folded


def _pairs(model: nnx.Module, input_shape: tuple[int, ...]) -> list[tuple[str, str]]:
    """(path of a convolution, path of the batch norm that alone takes what it gives)."""
    graph, state = nnx.split(model)
    variables = nnx.to_pure_dict(state)

    def call(variables: Any, x: jax.Array) -> Any:
        copy = nnx.merge(graph, variables)
        for path, module in modules(copy).items():
            if type(module) in (Conv, BatchNorm):
                object.__setattr__(module, "__class__", _marking(type(module)))
                object.__setattr__(module, "_path", path)
        return copy(x)

    abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), variables)
    dtypes = [v.dtype for v in jax.tree.leaves(abstract) if jnp.issubdtype(v.dtype, jnp.floating)]
    x = jax.ShapeDtypeStruct((1, *input_shape), dtypes[0] if dtypes else jnp.float32)
    with each():
        pairs = list(_marked(jax.make_jaxpr(call)(abstract, x).jaxpr))
    convs, norms = [conv for conv, _ in pairs], [norm for _, norm in pairs]
    return [
        (conv, norm)
        for conv, norm in pairs
        if norm is not None and convs.count(conv) == 1 and norms.count(norm) == 1
    ]


@functools.cache
def _marking(cls: type) -> type:
    """A subclass that marks, in what is traced, a convolution's output and a batch norm's input."""

    def conv(self: Any, x: jax.Array) -> jax.Array:
        return checkpoint_name(cls.__call__(self, x), BEFORE + self._path)

    def norm(self: Any, x: jax.Array, *moments: Any) -> jax.Array:
        return cls.__call__(self, checkpoint_name(x, AFTER + self._path), *moments)

    return type(cls.__name__, (cls,), {"__call__": conv if cls is Conv else norm})


def _marked(jaxpr: Jaxpr) -> Iterator[tuple[str, str | None]]:
    """For each call of a convolution, the batch norm that alone uses its output, or None."""
    for equation in jaxpr.eqns:
        name = equation.params.get("name", "")
        if equation.primitive.name == "name" and name.startswith(BEFORE):
            output = equation.outvars[0]
            users = [e for e in jaxpr.eqns if any(v is output for v in e.invars)]
            marks = [e.params.get("name", "") for e in users if e.primitive.name == "name"]
            alone = len(users) == 1 and marks and not any(v is output for v in jaxpr.outvars)
            follows = marks[0].removeprefix(AFTER) if alone and AFTER in marks[0] else None
            yield name.removeprefix(BEFORE), follows
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: isinstance(p, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from _marked(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _joined(conv: Any, norm: Any) -> Conv:
    """The convolution that does both."""
    kernel = conv.kernel[...]
    wide = accumulation_dtype(kernel.dtype)
    factor = inverse_root(norm.var[...].astype(wide) + jnp.asarray(norm.eps, wide))
    offset = jnp.zeros_like(factor)
    if norm.scale is not None:
        factor, offset = factor * norm.scale[...].astype(wide), norm.bias[...].astype(wide)
    mean = norm.mean[...].astype(wide)
    if conv.bias is not None:
        mean = mean - conv.bias[...].astype(wide)
    new = Conv(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        rngs=None,
        dtype=conv.dtype,
    )
    # the type of the parameters stays; the products are taken in float32 at least
    new.kernel.set_value((kernel.astype(wide) * factor.reshape(1, 1, 1, -1)).astype(kernel.dtype))
    new.bias.set_value((offset - mean * factor).astype(kernel.dtype))  # type: ignore[union-attr]
    return new


def _put(model: nnx.Module, path: str, module: nnx.Module) -> None:
    """Set the module at a path."""
    *above, last = path.split(".")
    parent: Any = model
    for name in above:
        parent = parent[int(name)] if isinstance(parent, nnx.List) else getattr(parent, name)
    if isinstance(parent, nnx.List):
        parent[int(last)] = module
    else:
        setattr(parent, last, module)
