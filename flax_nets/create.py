"""`create_model`: a network by name, with random weights or with a checkpoint's."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import registry
from flax_nets.functional import reseeded, set_mode
from flax_nets.layers import init

log = logging.getLogger("flax_nets")


def create_model(
    name: str,
    weights: Any = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    rngs: nnx.Rngs | int | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    **overrides: Any,
) -> nnx.Module:
    """Create a network in eval mode; `model(x)` takes x [N, H, W, C] and returns its logits.

    Args:
      name: one of `flax_nets.list_models()`.
      weights: None for random ones; or published ones by name, "DEFAULT", "IMAGENET1K_V2" or
        "timm/resnet50.a1_in1k" (`flax_nets.weights.names` lists them), which are downloaded once;
        or "hf-hub:ORG/NAME", or an address; or a path, or a state dict. torchvision's by name
        switch `transform_input` on, where a network has it.
      num_classes: None for the variant's own, and with weights for the checkpoint's own. A number
        that differs from the checkpoint's gives a fresh head; 0 no head: pooled features.
      in_channels: likewise; the first kernel is adapted to a number that differs.
      rngs: an `nnx.Rngs` or a seed, for initial values and for dropout. Default: seed 0.
      dtype: what the network computes in. Default: what its parameters are kept in.
      param_dtype: what the parameters are kept in. Default: float32, and with weights the
        checkpoint's own, value by value.
      overrides: any argument of the network's constructor; every network takes `dropout`.

    Raises ValueError for an unknown name or argument (with the nearest ones), for a checkpoint
    that does not fit, and for float64 where JAX has it switched off; an OSError that tells what to
    do by hand for weights that cannot be downloaded.

    >>> import flax_nets
    >>> model = flax_nets.create_model("lenet5", num_classes=7)
    >>> model(jax.numpy.zeros((1, 32, 32, 1))).shape
    (1, 7)
    """
    for value in (dtype, param_dtype):
        require_x64(value)
    given = overrides | {"num_classes": num_classes, "in_channels": in_channels}
    own = ("num_classes", "in_channels", "aux_logits")  # None there stands for the network's own
    given = {k: v for k, v in given.items() if v is not None or k not in own}
    spec = registry.resolve(name)
    if weights is not None:
        from flax_nets.weights.source import resolve

        spec, weights = resolve(spec, name, weights)
    with collector_paused():
        return _create(spec, weights, given, 0 if rngs is None else rngs, dtype, param_dtype)


def _create(
    spec: registry.Spec,
    weights: Any,
    given: dict[str, Any],
    seed: nnx.Rngs | int,
    dtype: Any,
    param_dtype: Any,
) -> nnx.Module:
    if weights is not None:
        import convert  # only who loads a checkpoint pays for the converter

        spec, checkpoint = convert.prepare(spec, weights, given)
    model = build(spec.with_arguments(**given))
    if weights is not None:
        convert.fill(model, checkpoint, param_dtype)
    init.fill(model, seed, param_dtype)
    _reseed(model, seed)
    set_dtype(model, dtype)
    set_mode(model, train=False)
    return model


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection: of the thousands of new objects none is garbage.

    Else the first network that a process makes would set off a collection of all that its imports
    left behind, which takes 0.1 s.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def build(spec: registry.Spec) -> nnx.Module:
    """The network of a spec with shapes in place of values: nothing is drawn or compiled."""
    model = spec.cls()(**spec.arguments, rngs=None)
    model.spec = spec
    return model


def set_dtype(model: nnx.Module, dtype: Any) -> None:
    """Let every layer compute in `dtype`; None for what its parameters are kept in."""
    require_x64(dtype)
    if dtype is not None:
        model.set_attributes(dtype=jnp.dtype(dtype), raise_if_not_found=False)


def require_x64(dtype: Any) -> None:
    """Refuse float64 where JAX would silently make it float32."""
    if dtype is None or jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(dtype):
        return
    raise ValueError(
        "float64 was asked for, and JAX has it switched off: call "
        'jax.config.update("jax_enable_x64", True) first, or set JAX_ENABLE_X64=1 '
        "(for a float64 checkpoint, param_dtype=jax.numpy.float32 narrows it)"
    )


def _reseed(model: nnx.Module, seed: nnx.Rngs | int) -> None:
    random = nnx.to_pure_dict(nnx.state(model, nnx.RngState))
    if random:
        rngs = seed if isinstance(seed, nnx.Rngs) else nnx.Rngs(seed)
        nnx.update(model, reseeded(random, rngs))
