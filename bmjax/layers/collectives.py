"""Sums and order over the devices that share a batch.

Under jit over a mesh a reduction over the batch is global by itself. Under pmap (or shard_map) code sees one device's
rows; it then sums over the axis `BATCH_AXIS`, which is bound there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

BATCH_AXIS = "data"
"""Name of the device axis over which a batch is split, where it is bound."""

SHARD_AXIS = "shard"
"""Name of the device axis over which logical shards are divided; layers see one shard's rows and sum over nothing."""


def axis_size() -> int | None:
    """How many devices share the batch; None where the axis `BATCH_AXIS` is not bound."""
    try:
        return jax.lax.axis_size(BATCH_AXIS)
    except NameError:
        return None


def batch_axis_bound() -> bool:
    """Whether the code runs inside pmap or shard_map with the axis `BATCH_AXIS`."""
    return axis_size() is not None


def all_sum(x: Any) -> Any:
    """The sum over the devices that share a batch, of an array or a tree; x itself where there is no such axis."""
    return jax.lax.psum(x, BATCH_AXIS) if batch_axis_bound() else x


def all_reversed(x: jax.Array) -> jax.Array:
    """x [b, ...] of the global batch in reverse order; where devices share a batch, this device's part of that."""
    if not batch_axis_bound():
        return x[::-1]
    # Device i of d holds the batch's i-th stretch, so the reverse's is that of device d - 1 - i, reversed.
    everyone = jax.lax.all_gather(x, BATCH_AXIS)
    return everyone[everyone.shape[0] - 1 - jax.lax.axis_index(BATCH_AXIS)][::-1]


def shard_devices() -> int:
    """How many devices share the logical shards of a batch; 1 where the axis `SHARD_AXIS` is not bound."""
    try:
        return jax.lax.axis_size(SHARD_AXIS)
    except NameError:
        return 1


def shard_numbers(count: int) -> jax.Array:
    """Numbers int [count] of this device's logical shards among all."""
    here = jax.lax.axis_index(SHARD_AXIS) if shard_devices() > 1 else 0
    return here * count + jnp.arange(count)


def all_shards(tree: Any) -> Any:
    """Arrays [n, ...] of this device's logical shards -> those of all devices, in the order of shards."""
    if shard_devices() == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, SHARD_AXIS, tiled=True), tree)


def batch_count(x: jax.Array) -> int:
    """How many values a channel of [..., c] has over the batch, on all devices."""
    return x.size // x.shape[-1] * (axis_size() or 1)


def over_devices(mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the whole batch from those of its parts, one a device and of equal size."""
    devices = axis_size()
    if devices is None:
        return mean, var
    whole = all_sum(mean) / devices
    return whole, all_sum(var + jnp.square(mean - whole)) / devices
