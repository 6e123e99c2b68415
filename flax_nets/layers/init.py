"""Initial values: the distributions PyTorch's reference networks draw from.

A parameter carries the distribution of its initial value as metadata. A layer made with
`rngs` draws at once, through `jax.random`; one made with `rngs=None` holds shapes only, and
`fill` draws for a whole network in one pass, which is many times faster than one small
compiled program per shape.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Init:
    """A distribution: `constant`, `uniform` on [low, high], or `normal`, cut at [low, high].

    `normal` has the given mean and std (before the cut, as `torch.nn.init.trunc_normal_`).
    `factors`, where given, scale the draws, one factor per index of the first axis.
    """

    kind: str
    mean: float = 0.0
    std: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    factors: tuple[float, ...] = ()

    def sample(self, key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        """Draw with `jax.random`; works while tracing."""
        if self.factors:
            plain = dataclasses.replace(self, factors=()).sample(key, shape, dtype)
            return plain * jnp.array(self.factors, dtype).reshape(-1, *[1] * (len(shape) - 1))
        if self.kind == "constant":
            return jnp.full(shape, self.mean, dtype)
        if self.kind == "uniform":
            return jax.random.uniform(key, shape, dtype, self.low, self.high)
        if math.isinf(self.high):
            return self.mean + self.std * jax.random.normal(key, shape, dtype)
        low, high = (self.low - self.mean) / self.std, (self.high - self.mean) / self.std
        return self.mean + self.std * jax.random.truncated_normal(key, low, high, shape, dtype)

    def draw(self, rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Draw with numpy: float32 numbers (float64 for float64), then rounded to `dtype`."""
        if self.factors:
            plain = dataclasses.replace(self, factors=()).draw(rng, shape, dtype)
            return plain * np.array(self.factors, dtype).reshape(-1, *[1] * (len(shape) - 1))
        if self.kind == "constant":
            return np.full(shape, self.mean, dtype)
        wide = np.float64 if dtype == np.float64 else np.float32
        if self.kind == "uniform":
            x = rng.random(shape, wide)
            x *= wide(self.high - self.low)
            x += wide(self.low)
            return x.astype(dtype, copy=False)
        x = rng.standard_normal(shape, wide)
        if self.std != 1.0:
            x *= wide(self.std)
        if self.mean != 0.0:
            x += wide(self.mean)
        while not math.isinf(self.high):  # draw again whatever fell outside of the cut
            outside = (x < self.low) | (x > self.high)
            count = int(outside.sum())
            if not count:
                break
            x[outside] = rng.standard_normal(count, wide) * wide(self.std) + wide(self.mean)
        return x.astype(dtype, copy=False)


def constant(value: float) -> Init:
    """The same number everywhere."""
    return Init("constant", mean=float(value))


zeros, ones = constant(0.0), constant(1.0)


def uniform(bound: float) -> Init:
    """Uniform on [-bound, bound]."""
    return Init("uniform", low=-bound, high=bound)


def normal(std: float, mean: float = 0.0) -> Init:
    """Normal without a cut."""
    return Init("normal", mean=mean, std=std)


def trunc_normal(std: float, mean: float = 0.0, low: float = -2.0, high: float = 2.0) -> Init:
    """`torch.nn.init.trunc_normal_`: the cut is in absolute values, not in standard deviations."""
    return Init("normal", mean=mean, std=std, low=low, high=high)


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a kernel [..., in, out], as PyTorch counts them for [out, in, ...]."""
    receptive = math.prod(shape[:-2])
    return shape[-2] * receptive, shape[-1] * receptive


def kaiming_uniform(shape: Sequence[int]) -> Init:
    """PyTorch's default for convolutions and dense layers: uniform within 1/sqrt(fan_in)."""
    return uniform(1 / math.sqrt(max(fans(shape)[0], 1)))


def kaiming_normal(shape: Sequence[int], mode: str = "fan_out", gain: float = math.sqrt(2)) -> Init:
    """`torch.nn.init.kaiming_normal_`; the default gain is the one for ReLU (He et al. 2015)."""
    fan_in, fan_out = fans(shape)
    return normal(gain / math.sqrt(fan_out if mode == "fan_out" else fan_in))


def xavier_uniform(shape: Sequence[int], gain: float = 1.0) -> Init:
    """`torch.nn.init.xavier_uniform_`."""
    return uniform(gain * math.sqrt(6 / sum(fans(shape))))


def xavier_normal(shape: Sequence[int], gain: float = 1.0) -> Init:
    """`torch.nn.init.xavier_normal_`."""
    return normal(gain * math.sqrt(2 / sum(fans(shape))))


def param(
    shape: Sequence[int], init: Init, rngs: nnx.Rngs | None, dtype: Any = jnp.float32
) -> nnx.Param:
    """A parameter drawn from `init`, or its shape alone where `rngs` is None."""
    shape = tuple(shape)
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), init=init)
    return nnx.Param(init.sample(rngs.params(), shape, dtype), init=init)


def stat(shape: Sequence[int], value: float, rngs: nnx.Rngs | None, dtype: Any) -> nnx.BatchStat:
    """A number that is kept but not trained; a shape alone where `rngs` is None."""
    shape = tuple(shape)
    if rngs is None:
        return nnx.BatchStat(jax.ShapeDtypeStruct(shape, dtype), init=constant(value))
    return nnx.BatchStat(jnp.full(shape, value, dtype), init=constant(value))


def reinit(variable: nnx.Variable, init: Init, rngs: nnx.Rngs | None) -> None:
    """Give `variable` another distribution, as `torch.nn.init` does after construction."""
    value = variable.get_value()
    variable.set_metadata(init=init)
    if rngs is not None:
        variable.set_value(init.sample(rngs.params(), value.shape, value.dtype))


def fill(model: nnx.Module, rngs: nnx.Rngs | int, param_dtype: Any = None) -> None:
    """Draw every value of `model` that is a shape alone, in place.

    Each variable has a stream of its own, from the seed and its path: the same seed gives the
    same values, whatever else the network has. `param_dtype` replaces each floating dtype.
    """
    if isinstance(rngs, nnx.Rngs):
        key = rngs.params()
        if isinstance(key, jax.core.Tracer):
            return _fill_traced(model, key, param_dtype)
        seed = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
    else:
        seed = [int(rngs)]

    def draw(item: tuple[tuple, nnx.Variable]) -> np.ndarray:
        path, variable = item
        shape = variable.get_value()
        dtype = _floating(shape.dtype, param_dtype)
        stream = np.random.SFC64(np.random.SeedSequence([*seed, _digest(path)]))
        return variable.get_metadata("init").draw(np.random.Generator(stream), shape.shape, dtype)

    todo = _abstract(model)
    with ThreadPoolExecutor(max_workers=4) as pool:  # numpy draws outside of the interpreter lock
        for (_, variable), value in zip(todo, pool.map(draw, todo), strict=True):
            variable.set_value(jnp.asarray(value))


def _fill_traced(model: nnx.Module, key: jax.Array, param_dtype: Any) -> None:
    for path, variable in _abstract(model):
        shape = variable.get_value()
        dtype = _floating(shape.dtype, param_dtype)
        init = variable.get_metadata("init")
        variable.set_value(init.sample(jax.random.fold_in(key, _digest(path)), shape.shape, dtype))


def _abstract(model: nnx.Module) -> list[tuple[tuple, nnx.Variable]]:
    flat = nnx.to_flat_state(nnx.state(model))
    return [(p, v) for p, v in flat if isinstance(v.get_value(), jax.ShapeDtypeStruct)]


def _digest(path: tuple) -> int:
    return zlib.crc32(".".join(map(str, path)).encode())


def _floating(dtype: Any, param_dtype: Any) -> Any:
    if param_dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return jnp.dtype(param_dtype)
