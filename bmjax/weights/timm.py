"""Reads safetensors in timm's naming; which key is which layer's is told by the family's `timm_name`."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import traverse_util

from bmjax import backbones

Tree = Any

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def to_variables(tensors: dict[str, np.ndarray], backbone: str, model: Any, shapes: dict[str, Tree]) -> dict[str, Tree]:
    """{"params", "batch_stats"} under the network's names; keys that none of its leaves has stay as they are.

    `model` and `shapes` are the network's module and tree. torch's running variance is the unbiased one, by n/(n - 1)
    above Flax's; it is taken as it is, so that evaluation is timm's.
    """
    name_of = backbones.family_of(backbone).timm_name
    rest = dict(tensors)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for collection, layer, leaf in traverse_util.flatten_dict(shapes):
        key = f"{name_of(model, layer)}.{_LEAVES[leaf]}"
        if key in rest:
            array = rest.pop(key)
            flat[collection, layer, leaf] = _ours(array) if leaf == "kernel" else array
    flat |= {("timm", key): array for key, array in rest.items()}
    return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(flat)


def _ours(kernel: np.ndarray) -> np.ndarray:
    """torch's [out, in, h, w] -> [h, w, in, out]; of a dense layer [out, in] -> [in, out]."""
    return kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
