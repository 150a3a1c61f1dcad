"""Devices: mesh, shardings, compilation, placement. The only file that names Mesh, jit-with-shardings or pmap."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bmjax.config.training import TrainConfig, mesh_axes
from bmjax.layers.collectives import BATCH_AXIS, SHARD_AXIS
from bmjax.layers.dispatch import for_partition, inside_loop, prepare

log = logging.getLogger(__name__)
Tree = Any
_MODEL_AXIS = "model"
_LEAST_SPLIT = 1024
"""Values of an array that are worth dividing over devices."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Runs a device-blind step on `devices`, batches split along their first axis, state on every device.

    Both kinds give the same numbers: under `jit` reductions over the batch are global by themselves; under `pmap`
    the layers and steps sum over the axis `data`, which is bound there. Devices may be those of several processes, each
    of which has as many of them and calls the same functions in the same order.
    """

    kind: Literal["jit", "pmap"]
    devices: tuple[Any, ...]
    model: int = 1
    """Devices that share an image's work: kernels are divided over them by their output channels. Only under `jit`."""
    shard_params: bool = False
    """Whether the state is divided over the axis `data` too, each array along its longest side that divides."""
    logical_shards: int | None = None
    """Parts of a batch that are computed by themselves, two or more a device. Only under `jit`."""

    @classmethod
    def create(
        cls,
        kind: Literal["jit", "pmap"] = "jit",
        count: int | None = None,
        batch_size: int = 0,
        *,
        mesh: str = "data=-1",
        shard_params: bool = False,
        logical_shards: int | None = None,
    ) -> Parallel:
        """Takes `count` devices (None: all) for a mesh as `train.mesh` says; with a batch size and `data=-1`, no more
        than divide it.

        Raises:
          ValueError: more devices are asked for than there are, or the batch can't be divided over them.
        """
        prepare()
        n, processes, axes = cls.count(count), jax.process_count(), mesh_axes(mesh)
        if kind == "pmap" and processes > 1:
            raise ValueError(f"config field 'train.parallel' is 'pmap'; expected 'jit' with {processes} processes")
        data, model = axes["data"], axes["model"]
        if n % model if data == -1 else data * model > n:
            raise ValueError(f"config field 'train.mesh' is {mesh!r}; expected one that {n} devices hold")
        most = n // model if data == -1 else data
        parts = logical_shards or 0
        fits = [d for d in range(1, most + 1) if batch_size % d == 0 and d * model % processes == 0]
        fits = [d for d in fits if not parts or (parts % d == 0 and parts >= 2 * d)]
        if not fits or (data != -1 and fits[-1] != data):
            raise ValueError(
                f"config field 'train.batch_size' gives batches (or micro-batches) of {batch_size} images; expected a "
                f"multiple of {data if data != -1 else processes}, for {n} devices of {processes} processes"
            )
        used = fits[-1]
        if used < most:
            log.warning(
                "%d of %d devices are used: a batch (or micro-batch) of %d images divides over no more; choose a "
                "train.batch_size that is a multiple of %d",
                used * model,
                n,
                batch_size,
                most,
            )
        return cls(kind, _of_each_process(used * model), model, shard_params, logical_shards)

    @classmethod
    def of(cls, train: TrainConfig, batch_size: int) -> Parallel:
        """As a configuration says, for batches of that size."""
        fields: dict[str, Any] = {"mesh": train.mesh, "shard_params": train.shard_params}
        fields |= {"logical_shards": train.logical_shards}
        return cls.create(train.parallel, train.devices, batch_size, **fields)

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

    @property
    def _axis(self) -> str:
        return SHARD_AXIS if self.logical_shards else BATCH_AXIS

    @property
    def divides(self) -> int:
        """A batch's size is a multiple of this."""
        return self.logical_shards or self.size

    @property
    def data(self) -> int:
        """How many parts a batch is divided into."""
        return self.size // self.model

    @functools.cached_property
    def _processes(self) -> int:
        return len({device.process_index for device in self.devices})

    @functools.cached_property
    def rows(self) -> tuple[int, int]:
        """(i, n): this process holds part i of n equal, contiguous parts of every batch."""
        local = self.size // self._processes
        here = jax.process_index() if self._processes > 1 else 0
        if local >= self.model:
            return here, self._processes
        return here // (self.model // local), self.data

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        # Auto axes: explicit ones break Linen's Dropout.
        shape, names = ((self.size,), (self._axis,))
        if self.model > 1:
            shape, names = ((self.data, self.model), (BATCH_AXIS, _MODEL_AXIS))
        types = (AxisType.Auto,) * len(names)
        if self._processes > 1:  # as they stand, so that a process holds rows that follow one another
            return jax.sharding.Mesh(np.array(self.devices).reshape(shape), names, axis_types=types)
        return jax.make_mesh(shape, names, axis_types=types, devices=self.devices)

    def _sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*axes))

    @property
    def _splits_state(self) -> bool:
        return self.model > 1 or (self.shard_params and self.data > 1)

    def _state_sharding(self, x: Any) -> NamedSharding:
        """Where the parts of an array of the state are, by its shape alone."""
        shape = np.shape(x)
        axes: list[str | None] = [None] * len(shape)
        if self.model > 1 and len(shape) > 1 and shape[-1] % self.model == 0:
            axes[-1] = _MODEL_AXIS
        if self.shard_params and self.data > 1 and math.prod(shape) >= _LEAST_SPLIT:
            free = [i for i, n in enumerate(shape) if axes[i] is None and n % self.data == 0]
            if free:
                axes[max(free, key=lambda i: shape[i])] = BATCH_AXIS
        return self._sharding(*axes)

    def compile_step(self, step: Callable, *, donate: bool = True):
        """Compiles step(state, batch) -> (state, metrics), or -> arrays [b, ...], which `batch_to_host` reads.

        The state is donated unless `donate` is False, as it must be where no state comes back.
        """
        donated = (0,) if donate else ()
        if self.kind == "pmap":
            return jax.pmap(step, axis_name=BATCH_AXIS, devices=self.devices, donate_argnums=donated)
        if self.size > 1 or self.logical_shards:
            step = for_partition(step)
        whole, batch = self._sharding(), self._sharding(self._axis)
        if self.logical_shards:
            step = self._by_shards(step, donate)
        if not self._splits_state:
            # Outputs, per-image ones too, end on every device: each host can then read all of them.
            return jax.jit(step, in_shardings=(whole, batch), out_shardings=whole, donate_argnums=donated)
        return _ByState(
            lambda state: jax.jit(
                step,
                in_shardings=(state, batch),
                out_shardings=(state, whole) if donate else whole,
                donate_argnums=donated,
            ),
            self._state_sharding,
        )

    def _by_shards(self, step: Callable, updates: bool) -> Callable:
        """The step, each device at its own logical shards; a step that updates no state is called for each shard."""
        here = (self.logical_shards or 1) // self.size

        def each(state: Tree, batch: Tree) -> Tree:
            parts = jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), batch)
            with inside_loop():
                results = jax.lax.map(lambda part: step(state, part), parts)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

        whole, rows = PartitionSpec(), PartitionSpec(SHARD_AXIS)
        specs = {"in_specs": (whole, rows), "out_specs": whole if updates else rows}
        return jax.shard_map(step if updates else each, mesh=self._mesh, **specs, check_vma=False)

    def to_devices(self, tree: Tree) -> Tree:
        """Copies a host tree, equal on every process, onto the devices."""
        if self.kind == "pmap":
            stacked = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (self.size, *np.shape(x))), tree)
            return jax.device_put(stacked, self._sharding(BATCH_AXIS))
        if self._processes > 1:
            return jax.tree.map(self._from_every_process, tree)
        where = jax.tree.map(self._state_sharding, tree) if self._splits_state else self._sharding()
        # A copy, since device_put may alias what the caller keeps and the step donates its input.
        return jax.device_put(_copied(tree), where)

    def _from_every_process(self, x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, self._state_sharding(x), lambda index: x[index])

    def to_host(self, tree: Tree) -> Tree:
        """A host copy (numpy), on every process, of a tree that `to_devices` or a step gave."""
        if self.kind == "pmap":
            return jax.tree.map(lambda x: np.array(x[0]), tree)
        if self._processes > 1 and not all(x.is_fully_replicated for x in jax.tree.leaves(tree)):
            tree = self._gather(tree)
        return jax.tree.map(np.array, tree)

    @functools.cached_property
    def _gather(self) -> Callable[[Tree], Tree]:
        return jax.jit(lambda tree: tree, out_shardings=self._sharding())

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch -> the global batch, split over the devices; sizes divide evenly."""
        sharding = self._sharding(self._axis)
        if self.kind == "pmap":
            # Each device gets its own rows from the host; an array made first would go through device 0.
            batch = {k: v.reshape(self.size, -1, *v.shape[1:]) for k, v in batch.items()}
            return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
        parts = self.rows[1]
        shapes = {k: (parts * len(v), *v.shape[1:]) for k, v in batch.items()}
        return {k: jax.make_array_from_process_local_data(sharding, v, shapes[k]) for k, v in batch.items()}

    def batch_to_host(self, outputs: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """Per-image outputs of a compiled step -> numpy [b, ...], those of the whole batch on every process."""
        if self.kind == "pmap":
            return {k: np.asarray(v).reshape(-1, *v.shape[2:]) for k, v in outputs.items()}
        return {k: np.asarray(v) for k, v in outputs.items()}


class _ByState:
    """A step that is compiled for the shapes of the state it is first called with."""

    def __init__(self, compiled: Callable[[Tree], Any], sharding: Callable[[Any], NamedSharding]):
        self._compiled, self._sharding = compiled, sharding
        self._step: Any = None

    def _of(self, state: Tree) -> Any:
        if self._step is None:
            self._step = self._compiled(jax.tree.map(self._sharding, state))
        return self._step

    def __call__(self, state: Tree, batch: Tree) -> Any:
        return self._of(state)(state, batch)

    def lower(self, state: Tree, batch: Tree) -> Any:
        return self._of(state).lower(state, batch)


def _copied(tree: Tree) -> Tree:
    """A copy of every array, by one program where all lie on one device: one a shape takes seconds to compile."""
    places = {device for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) for device in x.devices()}
    copy = functools.partial(jax.tree.map, lambda x: jnp.array(x, copy=True))
    return copy(tree) if len(places) > 1 else jax.jit(copy)(tree)


def _of_each_process(count: int) -> tuple[Any, ...]:
    """So many devices, as many of each process, a process's own one after another."""
    devices = jax.devices()
    if jax.process_count() == 1:
        return tuple(devices[:count])
    each = count // jax.process_count()
    groups = [[d for d in devices if d.process_index == p][:each] for p in range(jax.process_count())]
    if {len(group) for group in groups} != {each}:
        sizes = [len(jax.local_devices(p)) for p in range(jax.process_count())]
        raise ValueError(f"the processes have {sizes} devices; expected each to have at least {each}")
    return tuple(device for group in groups for device in sorted(group, key=lambda d: d.id))


@functools.cache
def _largest() -> tuple[Callable[[jax.Array], jax.Array], NamedSharding]:
    everywhere = jax.sharding.Mesh(np.array(jax.devices()), (BATCH_AXIS,))
    return jax.jit(jnp.max, out_shardings=NamedSharding(everywhere, PartitionSpec())), NamedSharding(
        everywhere, PartitionSpec(BATCH_AXIS)
    )


def largest_everywhere(value: int) -> jax.Array:
    """The largest of the values that the processes give, on all of them; not waited for until it is read."""
    largest, sharding = _largest()
    mine = np.full(jax.local_device_count(), value, np.int32)
    return largest(jax.make_array_from_process_local_data(sharding, mine))
