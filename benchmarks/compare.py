"""The comparison itself: one network in both frameworks, float64, on the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import convert
import flax_nets
from flax_nets import registry
from flax_nets.functional import set_mode

OUTPUT, GRADIENT = 1e-12, 1e-9  # the limits, relative to the largest value


def quick_jit(function: Callable) -> Callable:
    """`jax.jit` for the tests, which run most programs once: XLA compiles them in half of the time.

    What it makes is slow, and rounds as finely. The full sweep (`benchmarks.parity`) compiles as
    users do.
    """
    return jax.jit(function, compiler_options=_quick_options())


@functools.cache
def _quick_options() -> dict[str, Any]:
    wanted = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,  # no option of jaxlib 0.12
    }
    known = {}
    for name, value in wanted.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value})()
            known[name] = value
    return known


def error(ours: Any, theirs: Any, floor: float = 0.0) -> float:
    """max|a - b| / max|b|, the denominator at least `floor`; NaN where one is not finite."""
    ours, theirs = as_numpy(ours), as_numpy(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not ours.size:
        return 0.0
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("nan")
    worst, scale = np.abs(ours - theirs).max(), max(np.abs(theirs).max(), floor)
    return float(worst / scale) if worst else 0.0


def as_numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    return np.asarray(value, np.float64)


def nchw(x: Any) -> np.ndarray:
    """An NHWC array as PyTorch lays it out; others as they are."""
    x = np.asarray(x)
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every scale, bias and statistic anew: fresh zeros and ones hide swapped mappings.

    Weights keep the spread that the network gave them, zeros excepted.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(low + (high - low) * noise)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                draw(parameter, 0.5, 1.5)
            elif parameter.ndim == 1 or not parameter.any():
                draw(parameter, -0.3, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                draw(buffer, -0.3, 0.3)
            elif name.endswith("running_var"):
                draw(buffer, 0.5, 1.5)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    return model


def twin(spec: registry.Spec, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """The PyTorch twin of a spec, in float64, with randomised numbers."""
    spec = spec.with_arguments(**overrides)
    torch.manual_seed(seed)
    return randomise(spec.cls("torch_ref")(**spec.arguments).double(), seed)


def state_dict(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def images(spec: registry.Spec, batch: int, side: int, seed: int = 0) -> np.ndarray:
    """Random images [N, H, W, C] of both signs."""
    import inspect

    parameters = inspect.signature(spec.cls().__init__).parameters
    channels = spec.arguments.get("in_channels", parameters["in_channels"].default)
    return np.random.default_rng(seed).normal(size=(batch, side, side, channels))


def leaves(output: Any) -> list[Any]:
    """The tensors of an output: one, or those of a named tuple of heads."""
    return list(output) if isinstance(output, tuple) else [output]


def loss_weights(outputs: list[Any]) -> list[np.ndarray]:
    """Random weights, so that the loss sees every output in its own way."""
    return [np.random.default_rng(i).normal(size=tuple(o.shape)) for i, o in enumerate(outputs)]


def torch_pass(
    model: torch.nn.Module, x: np.ndarray, train: bool, stages: Iterable[str] = ()
) -> dict[str, Any]:
    """Outputs, gradients of a random linear loss of them, and the state dict afterwards.

    And what the modules named in `stages` returned, as `torch_features` has it.
    """
    model.train(train)
    model.zero_grad(set_to_none=True)
    inputs = torch.tensor(nchw(x), requires_grad=True)
    with recording(model, stages) as record:
        outputs = leaves(model(inputs))
    weights = loss_weights(outputs)
    sum((o * torch.tensor(w)).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return dict(
        outputs=outputs,
        gradients=gradients,
        input_gradient=inputs.grad,
        state=state_dict(model),
        stages=record,
    )


def flax_pass(
    model: Any,
    x: np.ndarray,
    train: bool,
    stages: Iterable[str] = (),
    jit: Callable = quick_jit,
) -> dict[str, Any]:
    """The same in Flax, through the functional form; one compilation for all of it."""
    apply, params, state = flax_nets.functional(model)
    set_mode(model, train)
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, x: jax.Array) -> Any:
        output, new_state = apply(params, state, x, train=train)
        outputs = leaves(output)
        weights = loss_weights(outputs)
        total = sum(jnp.sum(o * w) for o, w in zip(outputs, weights, strict=True))
        return total, (outputs, new_state)

    @jit
    def run(params: Any, x: jax.Array) -> Any:
        found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        if not stages:
            return found, {}
        return found, flax_nets.features(nnx.merge(graph, params, rest), x, stages)

    ((_, (outputs, new_state)), (gradients, input_gradient)), record = run(params, jnp.asarray(x))
    return dict(
        outputs=outputs,
        gradients=convert.export(gradients),
        input_gradient=nchw(input_gradient),
        state=convert.export(params) | convert.export(new_state),
        stages=record,
    )


def worst_errors(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The largest error of outputs, gradients and statistics; names must agree."""
    outputs = max(error(a, b) for a, b in zip(ours["outputs"], theirs["outputs"], strict=True))
    assert set(ours["gradients"]) == set(theirs["gradients"])
    floor = 1e-6 * max(float(g.abs().max()) for g in theirs["gradients"].values())
    gradients = {
        name: error(ours["gradients"][name], gradient, floor)
        for name, gradient in theirs["gradients"].items()
    }
    worst = max(gradients, key=gradients.__getitem__)
    assert set(ours["state"]) == set(theirs["state"])
    statistics = {
        name: error(ours["state"][name], value)
        for name, value in theirs["state"].items()
        if "running" in name or "num_batches" in name
    }
    return dict(
        outputs=outputs,
        gradients=gradients[worst],
        worst_gradient=worst,
        input_gradient=error(ours["input_gradient"], theirs["input_gradient"]),
        statistics=max(statistics.values(), default=0.0),
    )


@contextlib.contextmanager
def recording(
    model: torch.nn.Module, names: Iterable[str]
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Outputs of the named modules, by hooks, copied before anything works on them in place."""
    record: dict[str, list[torch.Tensor]] = {}
    found = dict(model.named_modules())
    hooks = [
        found[name].register_forward_hook(
            lambda _, __, output, name=name: record.__setitem__(
                name, [o.detach().clone() for o in leaves(output)]
            )
        )
        for name in names
        if name in found
    ]
    yield record
    for hook in hooks:
        hook.remove()


def torch_features(
    model: torch.nn.Module, x: np.ndarray, names: Iterable[str]
) -> dict[str, list[torch.Tensor]]:
    """What the named modules return, in the model's own mode."""
    with torch.no_grad(), recording(model, names) as record:
        model(torch.tensor(nchw(x)))
    return record
