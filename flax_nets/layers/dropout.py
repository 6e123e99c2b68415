"""Dropout and stochastic depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec


class Dropout(nnx.Module):
    """`torch.nn.Dropout`: in train mode zeroes each value with probability `rate`, and scales
    what it keeps by 1 / (1 - rate).

    Its random stream is taken at construction (`rngs`, an `nnx.Rngs`; None: seed 0, to be set
    later); `flax_nets.functional` replaces it at each call.

    Raises ValueError where `rate` is not within [0, 1].
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs | None):
        if not 0 <= rate <= 1:
            raise ValueError(f"a dropout rate lies within [0, 1], got {rate}")
        self.rate = rate
        self.deterministic = False
        if rate > 0:  # no stream where there is nothing to draw: `state` stays free of it
            self.stream = (nnx.Rngs(0) if rngs is None else rngs).dropout.fork()

    @property
    def active(self) -> bool:
        """Whether a call drops anything."""
        return self.rate > 0 and not self.deterministic

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.active:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        shape = self._mask_shape(x)
        sharding = _as_split(x, shape)
        keep = jax.random.bernoulli(self.stream(), 1 - self.rate, shape, out_sharding=sharding)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))

    def _mask_shape(self, x: jax.Array) -> tuple[int, ...]:
        return x.shape


class StochasticDepth(Dropout):
    """Drops the whole residual branch of an example (Huang et al. 2016), torchvision's "row" mode.

    x [N, ...] -> the same shape, whole examples zeroed with probability `rate`.
    """

    def _mask_shape(self, x: jax.Array) -> tuple[int, ...]:
        return (x.shape[0],) + (1,) * (x.ndim - 1)


def _as_split(x: jax.Array, shape: tuple[int, ...]) -> NamedSharding:
    """How devices share a mask: as they do `x`, where its type tells (`AxisType.Explicit`)."""
    sharding = jax.typeof(x).sharding
    sides = zip(shape, x.shape, sharding.spec, strict=True)
    spec = PartitionSpec(*(axes if n == of else None for n, of, axes in sides))
    return NamedSharding(sharding.mesh, spec)
