"""Checkpoints into models and back: names, layouts and strict accounting."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import configs, dialects, formats, positions, rules
from flax_nets import registry
from flax_nets.create import build, collector_paused, require_x64

log = logging.getLogger("flax_nets")

StateDict = Mapping[str, np.ndarray]
Source = StateDict | str | os.PathLike[str]
ALIGNED = 64  # bytes: what JAX asks of memory on the CPU, to use it without a copy of its own
SMALL = 1 << 14  # bytes: below, a second copy costs less than an aligned one


@dataclasses.dataclass
class Checkpoint:
    """Tensors under native names, and what is known of where they came from."""

    source: str
    tensors: dict[str, np.ndarray]
    dialect: dialects.Dialect
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the constructor
    implied_by: str = ""  # whoever knows them
    fresh: frozenset[str] = frozenset()  # keys that the caller asked to be drawn anew
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("%s: %s", self.source, text)


def open_checkpoint(
    source: Source,
    native: Collection[str],
    spec: registry.Spec | None,
    dialect: str,
    implied: Callable[[dialects.Dialect], Collection[str]] | None = None,
) -> Checkpoint:
    """Read `source` and bring its names to ours. `dialect`: a name, or "auto".

    `native` and `implied` as in `dialects.recognise`.
    """
    tensors = source if isinstance(source, Mapping) else formats.read(source)
    shown = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    if dialect == "auto":
        chosen = dialects.recognise(tensors, native, spec, implied)
    else:
        chosen = dialects.by_name(dialect, spec)
    renamed: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        name = chosen.to_native(key)
        if name in renamed:
            raise ValueError(f"{shown}: two tensors would both be {name!r}, one of them {key!r}")
        renamed[name] = _as_numpy(value)
    checkpoint = Checkpoint(shown, chosen.tensors_to_native(renamed), chosen)
    _configure(checkpoint, source)
    return checkpoint


def _configure(checkpoint: Checkpoint, source: Source) -> None:
    """Put into `checkpoint` the arguments that its dialect implies, and its config.json tells."""
    dialect = checkpoint.dialect
    config, why = configs.beside(source, dialect.model_type) if dialect.model_type else (None, "")
    checkpoint.arguments = dict(dialect.arguments)
    checkpoint.implied_by = f"{dialect.name} names imply"
    if config is not None:
        checkpoint.implied_by = "its config.json says"
    elif why:
        checkpoint.note(f"{why}: the library's defaults stand in ({_said(dialect.arguments)})")
    if dialect.configure is not None:
        shapes = {k: v.shape for k, v in checkpoint.tensors.items()}
        checkpoint.arguments |= dialect.configure(config, shapes)


def _said(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def prepare(
    spec: registry.Spec, source: Source, given: Mapping[str, Any], dialect: str = "auto"
) -> tuple[registry.Spec, Checkpoint]:
    """Read a checkpoint for a network yet to be built.

    Returns the spec with the constructor arguments that the checkpoint shows or its dialect
    implies (what the caller `given` wins), and the checkpoint, adapted where a given number of
    classes or channels differs from its own.
    """
    wanted = spec.with_arguments(**given)
    names: dict[tuple[tuple[str, str], ...], list[str]] = {(): _names(wanted)}

    def of_dialect(dialect: dialects.Dialect) -> Collection[str]:
        implied = _implied(wanted, dialect.arguments)
        changed = {k: v for k, v in implied.items() if k not in given}
        key = tuple((k, repr(v)) for k, v in changed.items())
        if key not in names:
            names[key] = _names(wanted.with_arguments(**changed))
        return names[key]

    checkpoint = open_checkpoint(source, names[()], wanted, dialect, of_dialect)
    shown = _arguments_shown(wanted, checkpoint.tensors)
    implied = _implied(spec, checkpoint.arguments)
    implied = {k: v for k, v in implied.items() if k not in given and k not in shown}
    if implied:
        checkpoint.note(f"{_said(implied)}, as {checkpoint.implied_by}")
    _adapt_positions(wanted, checkpoint, shown, given)
    spec = spec.with_arguments(**{**implied, **shown})
    _adapt(wanted, checkpoint, shown, given)
    _adapt_aux(spec.with_arguments(**given), checkpoint, shown, given)
    return spec, checkpoint


def _names(spec: registry.Spec) -> list[str]:
    return [e.key for e in rules.entries(build(spec))]


def _implied(spec: registry.Spec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that a dialect implies those that differ from `spec`'s."""
    has, implied = spec.complete, arguments.items()
    return {name: value for name, value in implied if name in has and has[name] != value}


def _arguments_shown(spec: registry.Spec, tensors: StateDict) -> dict[str, Any]:
    """Constructor arguments that the shapes of a checkpoint show."""
    cls = spec.cls()
    shown: dict[str, Any] = {}
    heads = [tensors.get(f"{layer}.weight") for layer in cls.output_layers[:1]]
    if heads:
        shown["num_classes"] = 0 if heads[0] is None else heads[0].shape[0]
    stem = tensors.get(f"{cls.input_layer}.weight")
    if stem is not None and stem.ndim == 4:
        shown["in_channels"] = stem.shape[1]
    if hasattr(cls, "aux_layers"):
        shown["aux_logits"] = any(
            k.startswith(tuple(f"{a}." for a in cls.aux_layers)) for k in tensors
        )
    if hasattr(cls, "arguments_shown"):
        shown |= cls.arguments_shown({k: v.shape for k, v in tensors.items()})
    return shown


def _adapt(
    spec: registry.Spec, checkpoint: Checkpoint, shown: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """A fresh head, or a first kernel for other channels, where the caller asked for that."""
    cls, tensors = spec.cls(), checkpoint.tensors
    classes = given.get("num_classes")
    if classes is not None and shown.get("num_classes", classes) != classes:
        heads = tuple(f"{layer}." for layer in cls.output_layers)
        dropped = [k for k in tensors if k.startswith(heads)]
        for key in dropped:
            del tensors[key]
        checkpoint.fresh = frozenset(f"{h}{leaf}" for h in heads for leaf in ("weight", "bias"))
        checkpoint.note(
            f"num_classes={classes} differs from its {shown['num_classes']}: "
            + ("its head is dropped" if classes == 0 else "the head starts from fresh values")
        )
    channels = given.get("in_channels")
    key = f"{cls.input_layer}.weight"
    if channels is not None and key in tensors and tensors[key].shape[1] != channels:
        kernel = tensors[key]
        tensors[key] = _adapt_channels(kernel, channels)
        checkpoint.note(
            f"in_channels={channels} differs from its {kernel.shape[1]}: {key} is "
            + ("summed over channels" if channels == 1 else "repeated and rescaled")
        )


def _adapt_positions(
    spec: registry.Spec, checkpoint: Checkpoint, shown: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Positions for another image size, where the caller asked for that."""
    own, asked = shown.get("image_size"), given.get("image_size")
    if own is None or own == spec.complete["image_size"]:
        return
    if asked is None:
        checkpoint.note(f"image_size={own}, as the number of its positions shows")
        return
    key, tensors = spec.cls().positions, checkpoint.tensors
    patch = tensors[f"{spec.cls().input_layer}.weight"].shape[-1]
    if asked < patch or asked % patch:
        raise ValueError(f"image_size={asked} is no multiple of its patches of {patch} pixels")
    tokens = tensors[key].shape[1] - (own // patch) ** 2
    method = checkpoint.dialect.resize
    tensors[key] = positions.resize(tensors[key], tokens, asked // patch, method)
    checkpoint.note(
        f"image_size={asked} differs from its {own}: positions are resized from "
        f"{own // patch}x{own // patch} to {asked // patch}x{asked // patch} as {method} does"
    )


def _adapt_aux(
    spec: registry.Spec,
    checkpoint: Checkpoint,
    shown: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Drop the auxiliary heads, or draw them anew, where the caller asked for that."""
    aux = given.get("aux_logits")
    if aux is None or aux == shown.get("aux_logits", aux):
        return
    heads = tuple(f"{layer}." for layer in spec.cls().aux_layers)
    for key in [k for k in checkpoint.tensors if k.startswith(heads)]:
        del checkpoint.tensors[key]
    checkpoint.fresh |= {k for k in _names(spec) if k.startswith(heads)}
    checkpoint.note(
        f"aux_logits={aux} was asked for: its auxiliary heads are "
        + ("missing and start from fresh values" if aux else "dropped")
    )


def _adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """timm's rule: one channel takes the sum, others the kernel repeated and scaled to keep it."""
    wide = kernel.astype(np.promote_types(kernel.dtype, np.float32))
    if channels == 1:
        return wide.sum(1, keepdims=True).astype(kernel.dtype)
    repeats = -(-channels // kernel.shape[1])
    wide = np.tile(wide, (1, repeats, 1, 1))[:, :channels] * (kernel.shape[1] / channels)
    return wide.astype(kernel.dtype)


def fill(
    model: nnx.Module, checkpoint: Checkpoint, param_dtype: Any = None, strict: bool = True
) -> None:
    """Put the tensors into `model`, in place, after all of them were checked.

    Raises one ValueError that names every missing, unexpected and mis-shaped key.
    """
    _fill({e.key: e for e in rules.entries(model)}, checkpoint, param_dtype, strict)


def _fill(
    entries: Mapping[str, rules.Entry], checkpoint: Checkpoint, param_dtype: Any, strict: bool
) -> None:
    tensors = checkpoint.tensors
    missing = [
        k
        for k, e in entries.items()
        if k not in tensors and k not in checkpoint.fresh and e.rule.flax != "count"
    ]
    unexpected = [k for k in tensors if k not in entries]
    shapes = [
        (k, tensors[k].shape, e.torch_shape)
        for k, e in entries.items()
        if k in tensors and tensors[k].shape != e.torch_shape
    ]
    if shapes or (strict and (missing or unexpected)):
        told = _account(checkpoint, entries, missing, unexpected, shapes)
        if 2 * (len(missing) + len(shapes)) > len(entries):
            told += _likely(tensors)
        raise ValueError(told)
    for key in [*missing, *unexpected]:
        checkpoint.note(f"{key} is {'missing' if key in entries else 'not used'}")
    _require_dtype(tensors, param_dtype)
    known = [key for key in entries if key in tensors]
    arrays = [_to_flax(tensors[key], entries[key].rule, param_dtype) for key in known]
    # All at once, which takes half the time. JAX brings a matrix's axes into order as it copies,
    # and has done with the file's or the caller's memory when this returns.
    arrays = jax.block_until_ready(jax.device_put(arrays))
    for key, value in zip(known, arrays, strict=True):
        entries[key].variable.set_value(value)
    with np.errstate(all="ignore"):
        broken = {key: count for key in known if (count := _broken(tensors[key]))}
    if broken:
        total = sum(broken.values())
        values = "1 value is" if total == 1 else f"{total} values are"
        checkpoint.note(f"{values} NaN or infinite, in {', '.join(broken)}")


def _to_flax(value: np.ndarray, rule: rules.Rule, param_dtype: Any) -> np.ndarray:
    """A view whose axes come in another order, or an array of its own."""
    dtype = param_dtype if param_dtype is not None else value.dtype
    dtype = np.dtype(jnp.int32 if rule.flax == "count" else dtype).newbyteorder("=")
    ours = rule.layout.to_flax(value).astype(dtype, copy=False)
    # What is contiguous and aligned JAX takes over as its own, which a file's must not become. It
    # transposes matrices four times as fast as NumPy, but kernels of several taps no faster.
    taps = ours.ndim == 4 and ours.shape[0] * ours.shape[1] > 1
    return _aligned_copy(ours) if taps or ours.flags.c_contiguous else ours


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    if array.nbytes < SMALL:
        return array.copy()
    room = np.empty(array.nbytes + ALIGNED, np.uint8)
    start = -room.__array_interface__["data"][0] % ALIGNED
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _require_dtype(tensors: StateDict, param_dtype: Any) -> None:
    if param_dtype is None:
        for value in tensors.values():
            if value.dtype == np.float64:
                require_x64(value.dtype)


def _broken(value: np.ndarray) -> int:
    """How many are NaN or infinite. Mostly none are, which the sum shows at once."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return 0
    if np.isfinite(value.sum()):
        return 0
    return int((~np.isfinite(value)).sum())


def _account(
    checkpoint: Checkpoint,
    entries: Mapping[str, rules.Entry],
    missing: list[str],
    unexpected: list[str],
    shapes: list[tuple[str, tuple, tuple]],
) -> str:
    lines = [
        f"{checkpoint.source} (dialect {checkpoint.dialect.name}) is no checkpoint of this network:"
    ]
    for key in missing:
        lines.append(f"  - {key}: missing{_near(key, unexpected)}")
    for key in unexpected:
        lines.append(f"  + {key}: unexpected{_near(key, missing or entries)}")
    for key, got, expected in shapes:
        lines.append(f"  ! {key}: has shape {got}, expected {expected}")
    lines.append(f"{len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} mis-shaped.")
    return "\n".join(lines)


def _likely(tensors: StateDict) -> str:
    from convert.identify import identify  # which tries what this file does

    matches = identify(tensors)
    return f"\nMore likely it is one of {matches[0]}." if matches else ""


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.8)
    return f" (near {near[0]!r})" if near else ""


def load(
    model: nnx.Module, source: Source, dialect: str = "auto", strict: bool = True
) -> nnx.Module:
    """Put a checkpoint into `model`, in place, and return it.

    Args:
      source: a state dict of PyTorch names and layouts, or the path of a checkpoint.
      dialect: whose names it has; "auto" recognises them.
      strict: whether a missing or unexpected key is an error. A mis-shaped one always is.

    Each value keeps the checkpoint's dtype. Nothing is changed unless everything fits. Raises
    one ValueError that names every key at fault.
    """
    with collector_paused():
        entries = {e.key: e for e in rules.entries(model)}
        checkpoint = open_checkpoint(source, entries, spec_of(model), dialect)
        if hasattr(model, "spec"):
            for name, value in _implied(model.spec, checkpoint.arguments).items():
                checkpoint.note(f"{checkpoint.implied_by} {name}={value!r}, not this network")
        _fill(entries, checkpoint, None, strict)
    return model


def export(model: nnx.Module | Mapping, dialect: str = "native") -> dict[str, np.ndarray]:
    """The state dict of a model, or of a tree shaped like its `params`: the inverse of `load`.

    A tree (gradients, say) gets its PyTorch names and layouts by the names of its leaves.
    """
    if isinstance(model, nnx.Module):
        values = [(e.key, e.rule, e.variable.get_value()) for e in rules.entries(model)]
        state_dict = {key: rules.in_torch(rule, value) for key, rule, value in values}
    else:
        state_dict = rules.named(model)
    chosen = _foreign(dialect, spec_of(model), state_dict)
    state_dict = chosen.tensors_from_native(state_dict)
    return {chosen.from_native(k): v for k, v in state_dict.items()}


def _foreign(dialect: str, spec: registry.Spec | None, keys: Iterable[str]) -> dialects.Dialect:
    """The dialect by name; for a tree, of an unknown network, the one that renames most keys."""
    if spec is not None or dialect == "native":
        return dialects.by_name(dialect, spec)
    named = [d for d in dialects.all_dialects() if d.name == dialect]
    if not named:
        return dialects.by_name(dialect, None)
    named.sort(key=lambda d: d.file != "")  # at a tie, a module of the caller's own
    return max(named, key=lambda d: sum(d.from_native(k) != d.prefix + k for k in keys))


def spec_of(model: nnx.Module | Mapping) -> registry.Spec | None:
    """What `create_model` made a model of; None for a tree, or a module of the caller's own."""
    return getattr(model, "spec", None)


def _as_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy()
    return np.asarray(value)
