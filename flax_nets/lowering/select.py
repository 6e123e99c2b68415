"""Which form an operation takes: XLA's own, or the one that a backend runs best.

An operation is a JAX primitive with two forms. Tracing records one equation, whatever the form, so
a network traces as fast as with XLA's own operations; the form is picked when that equation is
lowered, the first moment at which the backend is known. One traced, jitted or exported function is
therefore right and fast on every backend. `jax.lax.platform_dependent` picks as late, but traces
and differentiates both forms each time (twice the tracing time for a ResNet-50) and keeps the
intermediate values of both between the forward and the backward pass.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from flax_nets import processor

FORMS = ("auto", "xla", "cpu")
VARIABLE = "FLAX_NETS_LOWERING"

_scoped = jax.make_user_context(None)  # part of the key of jax.jit's caches: `use` retraces
_alone: ContextVar[bool] = ContextVar("alone", default=False)
_default: str | None = None


def use(form: str) -> AbstractContextManager[Any]:
    """The form of all that is traced inside, in this thread; a jitted function is traced again.

    Args:
      form: "auto" (the backend's best), "xla" (XLA's own operations, differentiated by JAX) or
        "cpu" (what the CPU runs best, on any backend).

    >>> from flax_nets import lowering
    >>> with lowering.use("xla"):
    ...     lowering.current()
    'xla'
    """
    return _scoped(_checked(form, "form"))


def set_lowering(form: str) -> None:
    """The form outside every `use`, in all threads: "auto" (the default), "xla" or "cpu".

    Without it the environment variable FLAX_NETS_LOWERING counts. What was jitted with another
    form is forgotten (`jax.clear_caches`), so call it first.
    """
    global _default
    before, _default = current(), _checked(form, "form")
    if current() != before:
        jax.clear_caches()


def current() -> str:
    """The form in force here: of the innermost `use`, of `set_lowering`, of the environment."""
    return _scoped.value or _default or _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def _checked(form: str, name: str) -> str:
    if form not in FORMS:
        raise ValueError(f"{name}={form!r}: expected one of {', '.join(map(repr, FORMS))}")
    return form


def define(
    name: str,
    plain: Callable,
    fast: Callable,
    batch: Callable,
    tpu: Callable | None = None,
    shape: Callable | None = None,
    like: Callable | None = None,
) -> Primitive:
    """A primitive that is `plain` in general and `fast` on CPU; differentiate it yourself.

    Args:
      name: shown in jaxprs.
      plain: (*arrays, **params) -> array, in XLA's own operations.
      fast: the same function as the CPU runs it best.
      batch: (arrays, mapped, primitive, **params) -> array with the mapped axis first, as the
        arrays have it that are `mapped`.
      tpu: the same function as a TPU runs it best, where that is not `plain`.
      shape: (*arrays, **params) -> the result's shape, where its dtype is that of the arrays: all
        that is asked of them is shapes. Without it `plain` is traced to know.
      like: (*arrays, **params) -> any array of the result's type, traced in place of `plain` where
        a type tells more than shape and dtype.

    Bind it with `form=current()`. Neither form is ever differentiated, so both may use anything.
    """
    primitive = Primitive(name)

    @primitive.def_impl
    def _(*arrays, **params):
        return _jitted(primitive.bind, tuple(params.items()))(*arrays)

    @functools.lru_cache(maxsize=4096)  # networks repeat their layers
    def result(avals, params):
        first, *_ = avals
        if shape and all(a == jax.core.ShapedArray(a.shape, first.dtype) for a in avals):
            return jax.core.ShapedArray(shape(*avals, **dict(params)), first.dtype)
        # by tracing, which knows sharded and per-device types as well
        found = functools.partial(like or plain, **dict(params))
        return jax.make_jaxpr(found)(*avals).out_avals[0]

    @primitive.def_abstract_eval
    def _(*avals, form, **params):
        return result(avals, tuple(params.items()))

    def rule(arrays, axes, **params):
        first = [
            a if axis is None else jnp.moveaxis(a, axis, 0)
            for a, axis in zip(arrays, axes, strict=True)
        ]
        mapped = [axis is not None for axis in axes]
        return batch(first, mapped, primitive, **params), 0

    batching.primitive_batchers[primitive] = rule

    def exact(*arrays, **params):
        """In float64, with XLA's own forms, Inception-v3's gradients are 1e-8 off on a GPU."""
        return (fast if arrays[0].dtype == jnp.float64 else plain)(*arrays, **params)

    def lower(best):
        def chosen(*arrays, form, **params):
            return (fast if form == "cpu" else best)(*arrays, **params)

        inline = mlir.lower_fun(chosen, multiple_results=False)

        def rule(context, *operands, **params):
            # The compiler shards what comes out. A form sees shapes and dtypes only: with a mesh of
            # explicit axes in force, JAX would want each of its steps to say how it is sharded.
            token = _alone.set(_one_device(context.module_context.axis_context))
            try:
                with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                    types = [jax.core.ShapedArray(a.shape, a.dtype) for a in context.avals_in]
                    return inline(context.replace(avals_in=types), *operands, **params)
            finally:
                _alone.reset(token)

        return rule

    mlir.register_lowering(primitive, lower(plain))
    mlir.register_lowering(primitive, lower(fast), platform="cpu")
    mlir.register_lowering(primitive, lower(tpu or plain), platform="tpu")
    mlir.register_lowering(primitive, lower(exact), platform="cuda")
    return primitive


def wide_vectors() -> bool:
    """Whether this machine has AVX-512, without which some forms are faster than others."""
    return "avx512f" in processor.features()


def full_width() -> bool:
    """Whether it also computes all 512 bits at once: in halves, sums cost as without it."""
    return wide_vectors() and not processor.halves()


def alone() -> bool:
    """Whether a form is being lowered for one device, so that it may mix the images of a batch.

    The compiler splits a batch among several devices, and would have them exchange what is mixed.
    Nor may a loop add up over a batch there: the devices would exchange sums inside of it, which
    XLA's CPU backend does not put in one order with what they exchange outside, so that they may
    wait for each other without end (jax 0.10.2 and 0.12).
    """
    return _alone.get()


def whole(function: Callable, *arrays: Any, **params: Any) -> jax.Array:
    """`function(*arrays, **params)`, which XLA does not take apart: its arguments are made once.

    Fused with what led to them, they would be made anew for every place that reads them, or in
    the order of axes that suits the reader. Among several devices XLA has to see how work is split.
    """
    result = _jitted(function, tuple(params.items()))(*arrays)
    return set_xla_metadata(result, inlineable="false") if alone() else result


MEMORY = 1 << 28  # bytes that a form's own arrays may take at a time


def parts(images: Any, size: int) -> int:
    """How many equal parts of the images, each of which takes `size` bytes, keep to the memory."""
    if not isinstance(images, int) or not alone():
        return 1
    least = images * size // MEMORY + 1
    return next((n for n in range(least, images) if images % n == 0), max(images, 1))


def summed(function: Callable, count: int, *images: jax.Array) -> jax.Array:
    """The sum of what a function makes of so many equal parts, one after the other."""
    if count == 1:
        return function(*images)
    split = [a.reshape(count, -1, *a.shape[1:]) for a in images]
    like = jax.eval_shape(function, *(a[0] for a in split))
    zeros = jnp.zeros(like.shape, like.dtype)
    return lax.scan(lambda total, part: (total + function(*part), None), zeros, split)[0]


def _one_device(axes: Any) -> bool:
    if hasattr(axes, "mesh"):  # inside `jax.shard_map`: what one device sees, if all axes are split
        return axes.mesh.size == 1 or set(axes.manual_axes) == set(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 2) == 1


def agree(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays with one type inside `jax.shard_map`, where some may differ between devices.

    XLA's operations convert their operands; a primitive has to ask for it, by adding zeros.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return list(arrays)
    zero = functools.reduce(jnp.add, [lax.full_like(a, 0, shape=()) for a in arrays])
    return [a + jnp.broadcast_to(zero, a.shape) for a in arrays]


def transposed(function: Callable, like: jax.Array, g: jax.Array) -> jax.Array:
    """The transpose of a linear function of one array of the type of `like`, applied to `g`."""
    return jax.linear_transpose(function, like)(g)[0]


def mapped_size(arrays, mapped: list[bool]) -> int:
    """The length of the mapped axis, which comes first where there is one."""
    return next(a.shape[0] for a, is_mapped in zip(arrays, mapped, strict=True) if is_mapped)


def broadcast(arrays, mapped: list[bool]) -> list[jax.Array]:
    """All arrays with the mapped axis."""
    size = mapped_size(arrays, mapped)
    return [
        a if is_mapped else jnp.broadcast_to(a[None], (size, *a.shape))
        for a, is_mapped in zip(arrays, mapped, strict=True)
    ]


def fold(arrays, mapped: list[bool], primitive: Primitive, **params):
    """A `batch` rule: the mapped axis joins the images' axis; what is not mapped is shared."""
    size = mapped_size(arrays, mapped)
    arrays = [
        a.reshape(-1, *a.shape[2:]) if is_mapped else a
        for a, is_mapped in zip(arrays, mapped, strict=True)
    ]
    out = primitive.bind(*arrays, **params)
    return out.reshape(size, -1, *out.shape[1:])


@functools.lru_cache(maxsize=4096)
def _jitted(function: Callable, params: tuple) -> Callable:
    return jax.jit(functools.partial(function, **dict(params)))
