"""Devices: mesh, shardings, compilation, placement. The only file that names Mesh, jit-with-shardings or pmap."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bmjax.layers.collectives import BATCH_AXIS
from bmjax.layers.dispatch import for_partition, prepare
from bmjax.layers.ops import largest_divisor

log = logging.getLogger(__name__)
Tree = Any


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Runs a device-blind step on `devices`, batches split along their first axis, state on every device.

    Both kinds give the same numbers: under `jit` reductions over the batch are global by themselves; under `pmap`
    the layers and steps sum over the axis `data`, which is bound there.
    """

    kind: Literal["jit", "pmap"]
    devices: tuple[Any, ...]

    @classmethod
    def create(cls, kind: Literal["jit", "pmap"] = "jit", count: int | None = None, batch_size: int = 0) -> Parallel:
        """Takes `count` devices (None: all); with a batch size, no more than divide it.

        Raises:
          ValueError: more devices are asked for than there are.
        """
        prepare()
        n = cls.count(count)
        used = largest_divisor(batch_size, n) if batch_size else n
        if used < n:
            log.warning(
                "%d of %d devices are used: a batch (or micro-batch) of %d images divides over no more; choose a "
                "train.batch_size that is a multiple of %d",
                used,
                n,
                batch_size,
                n,
            )
        return cls(kind, tuple(jax.devices()[:used]))

    @staticmethod
    def count(asked: int | None) -> int:
        """How many devices `train.devices` stands for: so many, or all.

        Raises:
          ValueError: there are not so many.
        """
        there = len(jax.devices())
        if asked is not None and asked > there:
            raise ValueError(f"train.devices is {asked}; expected at most {there}, the devices there are")
        return asked or there

    @property
    def size(self) -> int:
        return len(self.devices)

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        # Auto axes: explicit ones break Linen's Dropout.
        return jax.make_mesh((self.size,), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=self.devices)

    def _sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*axes))

    def compile_step(self, step: Callable, *, donate: bool = True):
        """Compiles step(state, batch) -> (state, metrics), or -> arrays [b, ...], which `batch_to_host` reads.

        The state is donated unless `donate` is False.
        """
        donated = (0,) if donate else ()
        if self.kind == "pmap":
            return jax.pmap(step, axis_name=BATCH_AXIS, devices=self.devices, donate_argnums=donated)
        if self.size > 1:
            step = for_partition(step)
        shardings = (self._sharding(), self._sharding(BATCH_AXIS))
        # Outputs, per-image ones too, end on every device: each host can then read all of them.
        return jax.jit(step, in_shardings=shardings, out_shardings=self._sharding(), donate_argnums=donated)

    def to_devices(self, tree: Tree) -> Tree:
        """Copies a host tree onto every device."""
        if self.kind == "pmap":
            stacked = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (self.size, *np.shape(x))), tree)
            return jax.device_put(stacked, self._sharding(BATCH_AXIS))
        # A copy, since device_put may alias what the caller keeps and the step donates its input.
        return jax.device_put(jax.tree.map(lambda x: jnp.array(x, copy=True), tree), self._sharding())

    def to_host(self, tree: Tree) -> Tree:
        """A host copy (numpy) of a tree that is equal on every device."""
        pick = (lambda x: np.array(x[0])) if self.kind == "pmap" else np.array
        return jax.tree.map(pick, tree)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch -> the global batch, split over the devices; sizes divide evenly."""
        sharding = self._sharding(BATCH_AXIS)
        if self.kind == "pmap":
            # Each device gets its own rows from the host; an array made first would go through device 0.
            local = len([d for d in self.devices if d.process_index == jax.process_index()])
            batch = {k: v.reshape(local, -1, *v.shape[1:]) for k, v in batch.items()}
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    def batch_to_host(self, outputs: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """Per-image outputs of a compiled step -> numpy [b, ...]."""
        if self.kind == "pmap":
            return {k: np.asarray(v).reshape(-1, *v.shape[2:]) for k, v in outputs.items()}
        return {k: np.asarray(v) for k, v in outputs.items()}
