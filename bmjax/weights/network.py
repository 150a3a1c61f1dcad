"""The network that a weight file is for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.backbones import create_backbone
from bmjax.weights.record import WeightRecord

Tree = Any


def network(record: WeightRecord, classes: int = 1000) -> Any:
    """The module that a record's file is for, with its top where the file has one."""
    return create_backbone(record.backbone, **record.architecture, include_top=record.top, classes=classes)


@functools.lru_cache(maxsize=8)
def network_shapes(model: Any) -> tuple[dict[str, Tree], tuple[str, ...]]:
    """({"params", "batch_stats"} as shapes, names of the layers with parameters in the order they run)."""
    order: list[str] = []

    def trace() -> dict[str, Tree]:
        variables = model.init(jax.random.key(0), jnp.zeros((1, 128, 128, 3)))
        order.extend(variables["params"])  # in order here; a tree that leaves jax comes back sorted
        return {"params": variables["params"], "batch_stats": variables["batch_stats"]}

    shapes = jax.eval_shape(trace)
    # Sorted no longer, so that what is compared with it leaf by leaf differs first where the network does.
    shapes = {k: {name: shapes[k][name] for name in order if name in shapes[k]} for k in ("params", "batch_stats")}
    return shapes, tuple(order)


def classes_of(variables: dict[str, Tree]) -> int:
    """Number of classes of a tree with top; 1000 where it has none."""
    kernels = (leaves["kernel"] for leaves in variables["params"].values() if "kernel" in leaves)
    return next((kernel.shape[1] for kernel in kernels if kernel.ndim == 2), 1000)


def top_layers(record: WeightRecord) -> set[str]:
    """Names of the layers that only a network with top has."""
    with_top, without = (network_shapes(network(dataclasses.replace(record, top=top)))[1] for top in (True, False))
    return set(with_top) - set(without)
