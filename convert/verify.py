"""Is the converted network the same one? It and its PyTorch twin, side by side in float64."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import port
from convert.formats.files import replacing
from flax_nets import registry
from flax_nets.create import build
from flax_nets.functional import functional, set_mode
from flax_nets.inspect.features import features, stages

LIMIT = 1e-12


@dataclasses.dataclass(frozen=True)
class Stage:
    """One module's output: its path, its shape (NHWC), max|ours - PyTorch's| / max|PyTorch's|."""

    name: str
    shape: tuple[int, ...]
    error: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found. `bool(report)` is whether everything is within the limit."""

    model: str
    source: str
    dialect: str
    parameters: int
    stages: tuple[Stage, ...]  # in the order of their computation; the last is the network's output
    changed: tuple[tuple[str, float], ...]  # tensors that differ from the checkpoint's, by how much
    notes: tuple[str, ...]
    limit: float = LIMIT

    @property
    def output_error(self) -> float:
        return self.stages[-1].error

    @property
    def first_difference(self) -> str | None:
        """The first stage beyond the limit; None where all is equal.

        Where a tensor differs and no stage shows it (its input may be zero), the stage that holds
        the tensor, or the tensor's own name where none does.
        """
        for stage in self.stages:
            if not stage.error <= self.limit:
                return stage.name
        for key, _ in self.changed:
            holders = [s.name for s in self.stages if key.startswith(f"{s.name}.")]
            return max(holders, key=len, default=key)
        return None

    def __bool__(self) -> bool:
        return self.first_difference is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the verdict among them."""
        found = {"equal": bool(self), "first_difference": self.first_difference}
        return dataclasses.asdict(self) | found | {"output_error": self.output_error}

    @property
    def verdict(self) -> str:
        """One line: whether they are equal, or where they first differ."""
        if self:
            return f"equal: every stage within {self.limit:g} of PyTorch's largest value"
        at = next((s for s in self.stages if not s.error <= self.limit), None)
        if at is None:
            return f"NOT equal: {self.changed[0][0]} differs, in {self.first_difference}"
        return f"NOT equal: first at {at.name}, error {at.error:.1e}, limit {self.limit:g}"

    def __str__(self) -> str:
        width = max(len(s.name) for s in self.stages)
        lines = [
            f"{self.source} as {self.model} ({self.dialect} names, "
            f"{self.parameters:,} parameters), float64, against PyTorch:"
        ]
        for stage in self.stages:
            mark = "" if stage.error <= self.limit else "   <-- differs"
            lines.append(f"  {stage.name:{width}}  {stage.shape!s:22} {stage.error:8.1e}{mark}")
        for key, difference in self.changed:
            lines.append(f"  {key} differs from the checkpoint by up to {difference:.3g}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, self.verdict])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the errors, stage by stage, into a picture: .png, .svg or .pdf, by the suffix.

        Raises ImportError without matplotlib, ValueError for another suffix.
        """
        target = Path(path)
        if target.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"{target}: a picture's name ends in .png, .svg or .pdf")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plotting takes matplotlib: pip install matplotlib") from error
        count, floor = len(self.stages), 1e-17  # below it lies an error of zero
        figure = Figure(figsize=(max(6.5, 0.16 * count + 1.5), 4.5), dpi=120, layout="constrained")
        axes = figure.subplots()
        heights = [max(s.error, floor) if np.isfinite(s.error) else 1.0 for s in self.stages]
        colours = ["#2e8b57" if s.error <= self.limit else "#c8413b" for s in self.stages]
        axes.scatter(range(count), heights, c=colours, s=16, zorder=3)
        axes.axhline(self.limit, color="#8a8f98", lw=1, ls="--")
        axes.set_yscale("log")
        axes.set_ylim(floor / 3, max(10 * self.limit, 3 * max(heights)))
        axes.set_ylabel("largest error / largest value")
        step = -(-count // 80)  # more names than that nobody can read
        names = [s.name for s in self.stages[::step]]
        axes.set_xticks(range(0, count, step), names, rotation=90, fontsize=7)
        axes.set_title(f"{self.model}\n{self.verdict}", fontsize=9, loc="left")
        with replacing(target) as stream:
            figure.savefig(stream, format=target.suffix[1:])


def verify(
    model: str | nnx.Module,
    source: port.Source,
    dialect: str = "auto",
    images: np.ndarray | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Compare a network with its PyTorch twin, stage by stage, both with a checkpoint's numbers.

    Args:
      model: a name, to convert the checkpoint now; or a model made by `create_model`, to find out
        whether it still equals the checkpoint.
      source: a state dict or the path of a checkpoint.
      images: [N, H, W, C]; two random ones of the network's own size by default.
      progress: called with the name of each step.

    Raises ValueError where the checkpoint does not fit, ImportError without torch.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "verify compares with PyTorch, which is not installed: pip install 'flax-nets[torch]'"
        ) from error

    # A TPU has no float64, and PyTorch computes on the CPU too.
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        progress("reading")
        if isinstance(model, str):
            spec, checkpoint = port.prepare(registry.resolve(model), source, {}, dialect)
            held = checkpoint.tensors
        else:
            made_of, held = port.spec_of(model), port.export(model)
            if made_of is None:
                raise ValueError("verify takes a name, or a model made by flax_nets.create_model")
            spec = made_of
            checkpoint = port.open_checkpoint(source, held, spec, dialect)
            checkpoint.notes += _implied(spec, checkpoint)
        ours = build(spec)
        port.fill(ours, dataclasses.replace(checkpoint, tensors=dict(held)), jnp.float64)
        set_mode(ours, train=False)
        theirs = spec.cls("torch_ref")(**spec.arguments).double().eval()
        theirs.load_state_dict(_tensors(checkpoint.tensors, theirs.state_dict()), strict=True)
        if images is None:
            images = np.random.default_rng(0).normal(size=(2, *spec.input_shape))
        progress("PyTorch")
        wanted = _torch_stages(theirs, torch.tensor(images.transpose(0, 3, 1, 2)), stages(ours))
        progress("Flax")
        got = _flax_stages(ours, images, list(wanted))
    changed = [
        (key, difference)
        for key, value in checkpoint.tensors.items()
        if key in held and (difference := _difference(held[key], value))
    ]
    return Report(
        model=spec.name,
        source=checkpoint.source,
        dialect=checkpoint.dialect.name,
        parameters=sum(p.numel() for p in theirs.parameters()),
        stages=tuple(
            Stage(name, np.shape(value), _error(value, wanted[name])) for name, value in got.items()
        ),
        changed=tuple(changed),
        notes=tuple(checkpoint.notes),
    )


def _implied(spec: registry.Spec, checkpoint: port.Checkpoint) -> list[str]:
    """What a network has of the names of its checkpoint, and not of its own name."""
    own, has = registry.resolve(spec.name).complete, spec.complete
    differ = {k: v for k, v in checkpoint.arguments.items() if own.get(k) != v and has.get(k) == v}
    shown = ", ".join(f"{name}={value!r}" for name, value in differ.items())
    return [f"{shown}, as {checkpoint.implied_by}"] if differ else []


def _tensors(tensors: port.StateDict, wanted: Any) -> dict[str, Any]:
    """For `load_state_dict`; counters that a checkpoint lacks keep the twin's value."""
    import torch

    missing = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    widened = {
        k: torch.tensor(np.asarray(v, np.int64 if v.dtype.kind in "iu" else np.float64))
        for k, v in tensors.items()
    }
    return missing | widened


def _torch_stages(model: Any, x: Any, names: list[str]) -> dict[str, np.ndarray]:
    import torch

    record: dict[str, np.ndarray] = {}
    found = dict(model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output.detach().numpy().copy()
            record[name] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value

        return hook

    handles = [found[n].register_forward_hook(keep(n)) for n in names if n in found]
    with torch.no_grad():
        record["output"] = model(x).numpy()
    for handle in handles:
        handle.remove()
    return record


def _flax_stages(model: Any, x: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """The same stages in order of computation, and the output last."""
    inner = [n for n in names if n != "output"]
    graph, variables = nnx.split(model)

    @jax.jit
    def run(variables: Any, x: jax.Array) -> Any:
        merged = nnx.merge(graph, variables)
        order, values = [], []
        for name, value in features(merged, x, inner).items():
            order.append(name)
            values.append(value)
        run_order[:] = order
        return values

    run_order: list[str] = []
    values = run(variables, jnp.asarray(x)) if inner else []
    found = {name: np.asarray(v) for name, v in zip(run_order, values, strict=True)}
    apply, params, state = functional(model)
    found["output"] = np.asarray(jax.jit(apply)(params, state, jnp.asarray(x))[0])
    return found


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    worst, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    return worst / scale if worst else 0.0


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes():
        return 0.0
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0.0))
