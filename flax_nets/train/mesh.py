"""Arrays over many devices. The steps need nothing else: they follow the shardings they are given.

    mesh = make_mesh()
    train_state, batch = replicate(train_state, mesh), shard(batch, mesh)
    train_state, metrics = step(train_state, batch)

Several hosts: call `jax.distributed.initialize()` first, and let each give `shard` the part of the
batch that it has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "data", over `devices`; None: over all there are."""
    found = jax.devices() if devices is None else devices
    return Mesh(np.asarray(found), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Any, mesh: Mesh) -> Any:
    """Arrays [N, ...] of the host, split over "data" by their first axis.

    Raises ValueError where the devices cannot share N equally.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    here = mesh.local_mesh.shape["data"]

    def place(x: Any) -> jax.Array:
        if len(x) % here:
            raise ValueError(
                f"a batch of {len(x)} does not divide among {here} devices: choose a multiple"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, batch)
