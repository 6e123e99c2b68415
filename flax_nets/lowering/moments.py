"""Sums of deviations from a mean, channel by channel, and running ones, as batch norm needs them.

Where several operations read what deviates from the mean, XLA's CPU backend writes it down first,
as large as the images. Here it makes it anew inside each sum (docs/design.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from flax_nets.lowering import select


def average(x: jax.Array) -> jax.Array:
    """Over all axes but the last: x [..., C] -> [C]."""
    return _bound(average_p, _average, x)


def variance(x: jax.Array, mean: jax.Array) -> jax.Array:
    """The mean of (x - mean)^2: x [..., C], mean [C] -> [C]. It has no derivative of its own."""
    return _bound(variance_p, _variance, x, mean)


def covariation(x: jax.Array, mean: jax.Array, d: jax.Array) -> jax.Array:
    """The sum of (x - mean) * d: x, d [..., C], mean [C] -> [C]."""
    return _bound(covariation_p, _covariation, x, mean, d)


def scaled(x: jax.Array, mean: jax.Array, factor: jax.Array) -> jax.Array:
    """(x - mean) * factor: x [..., C], mean, factor [C] -> [..., C]; `covariation`'s transpose."""
    return _bound(scaled_p, _scaled, x, mean, factor)


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """a * b of two vectors [C], by a kernel of its own, which all of a length share.

    What reads it would take it in: the momentum of a batch norm's scale, and not that of its bias.
    """
    return _bound(times_p, lax.mul, a, b)


def moved(old: jax.Array, new: jax.Array, kept: Any, share: Any) -> jax.Array:
    """kept * old + share * new, two numbers: running statistics [C] and those of a batch -> [C]."""
    kept, share = (jnp.asarray(number, new.dtype) for number in (kept, share))
    return _bound(moved_p, _moved, old.astype(new.dtype), new, kept, share)


def _bound(primitive, plain: Callable, *arrays: jax.Array) -> jax.Array:
    form = select.current()
    return plain(*arrays) if form == "xla" else primitive.bind(*select.agree(*arrays), form=form)


# In functions of `jax.lax`, which trace sooner than operators: a network has many batch norms.


def along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[C] as wide as x [..., C]."""
    return lax.broadcast_in_dim(vector, x.shape, (x.ndim - 1,))


def _deviation(x, mean):
    return lax.sub(x, along(mean, x))


def _total(x):
    return lax.reduce_sum(x, tuple(range(x.ndim - 1)))


def _average(x):
    return _over(_total(x), _count(x))


def _variance(x, mean):
    return _over(_squares(x, mean), _count(x))


def _squares(x, mean):
    return _total(lax.square(_deviation(x, mean)))


def _count(x):
    return jnp.asarray(math.prod(x.shape[:-1]), x.dtype)


def _over(total, count):
    return lax.div(total, lax.broadcast(count, total.shape))


def _covariation(x, mean, d):
    return _total(lax.mul(_deviation(x, mean), d))


def _scaled(x, mean, factor):
    return lax.mul(_deviation(x, mean), along(factor, x))


def _moved(old, new, kept, share):
    return kept * old + share * new


# With numbers that XLA does not know, so that it compiles one kernel for each length: it has
# constants become part of a kernel, and these are of the batch's and the images' size.


def _moved_alike(old, new, kept, share):
    kept, share = lax.optimization_barrier((kept, share))
    return select.whole(_moved, old, new, kept, share)


def _average_alike(x):
    return _shared_out(_total(x), x)


def _variance_alike(x, mean):
    return _shared_out(select.whole(_squares, x, mean), x)


def _shared_out(total, x):
    return select.whole(_share, total, lax.optimization_barrier(1 / _count(x)))


def _share(total, share):
    return lax.mul(total, lax.broadcast(share, total.shape))


def _vector(x, *_):
    return x.shape[-1:]


def _images(x, *_):
    return x.shape


def _define(name: str, plain: Callable, fast: Callable, shape: Callable = _vector):
    def batch(arrays, mapped, primitive, **params):
        axes = [0 if is_mapped else None for is_mapped in mapped]
        return jax.vmap(plain, axes)(*arrays)

    return select.define(name, plain, fast, batch, shape=shape)


average_p = _define("average", _average, _average_alike)
variance_p = _define("variance", _variance, _variance_alike)
covariation_p = _define("covariation", _covariation, functools.partial(select.whole, _covariation))
scaled_p = _define("scaled_deviation", _scaled, _scaled, _images)
times_p = _define("times", lax.mul, functools.partial(select.whole, lax.mul))
moved_p = _define("moved", _moved, _moved_alike)
ad.deflinear2(average_p, lambda ct, x, **_: [select.transposed(_average, x.aval, ct)])
ad.defbilinear(
    times_p,
    lambda ct, a, b, **params: times_p.bind(ct, b, **params),
    lambda ct, a, b, **params: times_p.bind(a, ct, **params),
)


def _moved_tangent(primals, tangents, **_):
    return jax.jvp(_moved, primals, tuple(map(ad.instantiate_zeros, tangents)))


ad.primitive_jvps[moved_p] = _moved_tangent


def _linear_twice(primitive, partner, back: Callable):
    """Derivatives of a function of (x, mean, a), linear in x and mean together, and in a.

    Args:
      partner: its transpose with respect to a.
      back: (cotangent, x, a) -> the transpose with respect to x.
    """

    def tangent(primals, tangents, **params):
        *deviation, a = primals
        *moved, da = tangents
        parts = []
        if not isinstance(da, ad.Zero):
            parts.append(primitive.bind(*deviation, da, **params))
        if not all(isinstance(t, ad.Zero) for t in moved):
            parts.append(primitive.bind(*map(ad.instantiate_zeros, moved), a, **params))
        return primitive.bind(*primals, **params), sum(parts[1:], parts[0])

    def transpose(ct, x, mean, a, **params):
        if isinstance(ct, ad.Zero):
            return None, None, None
        if ad.is_undefined_primal(a):
            return None, None, partner.bind(x, mean, ct, **params)
        dx = back(ct, x, a)
        return (
            dx if ad.is_undefined_primal(x) else None,
            -_total(dx) if ad.is_undefined_primal(mean) else None,
            None,
        )

    ad.primitive_jvps[primitive] = tangent
    ad.primitive_transposes[primitive] = transpose


_linear_twice(covariation_p, scaled_p, lambda ct, x, d: d * along(ct, d))
_linear_twice(scaled_p, covariation_p, lambda ct, x, factor: ct * along(factor, ct))
