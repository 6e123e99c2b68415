"""Arrays over many devices. The steps need nothing else: they follow the shardings they are given.

    mesh = make_mesh()
    train_state, batch = shard_state(train_state, mesh), shard(batch, mesh)
    train_state, metrics = step(train_state, batch)

Several hosts: call `jax.distributed.initialize()` first, and let each give `shard` the part of the
batch that it has read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(
    devices: Sequence[jax.Device] | None = None, data: int | None = None, fsdp: int = 1
) -> Mesh:
    """A mesh with the axes "data" and "fsdp". Batches are split over both, parameters over fsdp.

    Args:
      devices: Default: all there are, of all hosts.
      data: Default: the number of devices / fsdp.
      fsdp: how many devices share one copy of the large tensors. Default 1: each has its own.

    Raises ValueError where data * fsdp is not the number of devices.
    """
    found = jax.devices() if devices is None else list(devices)
    if data is None:
        data = len(found) // max(fsdp, 1)
    if min(data, fsdp) < 1 or data * fsdp != len(found):
        raise ValueError(f"a mesh of data={data} by fsdp={fsdp}, and {len(found)} devices")
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=found)


def shard_state(tree: Any, mesh: Mesh, smallest: int = 2**18) -> Any:
    """A `TrainState`, or any tree of arrays, laid out for training on a mesh.

    An array of at least `smallest` elements is split over "fsdp" along its largest axis that
    divides; all others stand whole on every device. The rule sees shapes only, so that a
    parameter, its moments and its average lie alike.
    """
    return jax.tree.map(lambda x: _put(x, _layout(x.shape, mesh, smallest)), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def shard(batch: Any, mesh: Mesh, stacked: bool = False) -> Any:
    """This host's arrays [N, ...], split over the devices by their first axis.

    Args:
      stacked: [steps, N, ...] instead, for a step made with `scan=True`: split by the second.

    Raises ValueError where the host's devices cannot share N equally.
    """
    spec = PartitionSpec(None, AXES) if stacked else PartitionSpec(AXES)
    here = len(mesh.local_devices)

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        if x.shape[stacked] % here:
            raise ValueError(
                f"a batch of {x.shape[stacked]} does not divide among {here} devices: choose a "
                "multiple"
            )
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(place, batch)


def pad(batch: Mapping[str, Any], size: int) -> dict[str, np.ndarray]:
    """A batch filled up with zeros to `size` examples, its "mask" 0 there.

    Raises ValueError where it has more.
    """
    count = len(batch["label"])
    if count > size:
        raise ValueError(f"a batch of {count}, and there is room for {size}")
    whole = {"mask": np.ones(count, np.float32), **batch}

    def fill(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, size - count),) + ((0, 0),) * (x.ndim - 1))

    return {name: fill(np.asarray(x)) for name, x in whole.items()}


def spread(batches: Iterable[Mapping[str, Any]], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Each host's batches, filled up and split over the devices, to count each example once.

    Batches may be of any size up to the first one's, and hosts may have different numbers of
    them: who is through gives batches of filling, so that all take part in every step.

    Raises ValueError where there are several hosts and `batches` has no length, or a host has none.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    size = len(first["label"]) if first else 0
    rounds = 0
    if jax.process_count() > 1:
        if not isinstance(batches, Sized):
            raise ValueError("several hosts must agree on the batches: give something with len()")
        told = multihost_utils.process_allgather(np.array([len(batches), size]))
        if not told.min():
            raise ValueError(f"each host needs a batch: got {told[:, 0].tolist()}")
        rounds, size = told.max(0).tolist()
    if first is None:
        return
    size += -size % len(mesh.local_devices)
    given = 0
    for batch in itertools.chain([first], iterator):
        yield shard(pad(batch, size), mesh)
        given += 1
    filling = pad({name: np.asarray(x)[:0] for name, x in first.items()}, size)
    for _ in range(rounds - given):
        yield shard(filling, mesh)


def _put(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(x, sharding)
    data = jax.device_put(jax.random.key_data(x), sharding)  # keys themselves know one host only
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))


def _layout(shape: tuple[int, ...], mesh: Mesh, smallest: int) -> NamedSharding:
    parts = mesh.shape["fsdp"]
    spec: list[str | None] = []  # short, as a jitted step returns it: another would compile anew
    fitting = [axis for axis, n in enumerate(shape) if n % parts == 0]
    if parts > 1 and fitting and math.prod(shape) >= smallest:
        spec = [None] * max(fitting, key=lambda axis: shape[axis]) + ["fsdp"]
    return NamedSharding(mesh, PartitionSpec(*spec))
