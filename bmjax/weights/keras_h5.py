"""Reads the HDF5 layout of Keras's published weight files.

A file lists its layers in the order of the network, each with its weights. Published names differ in places from
today's (`conv1/conv` in the file, `conv1_conv` in Keras 3). A layer is therefore matched three ways at once: its
place in the order, its normalised name, and its shapes. Where one of them disagrees the file is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Tree = Any

# Keras's name of a weight -> the collection and the name it has in Flax.
_LEAVES = {
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


def normalise(name: str) -> str:
    """A published layer name as today's Keras writes it: `conv1/conv` -> `conv1_conv`."""
    return name.replace("/", "_")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def read(path: str | Path) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Normalised layer name -> {(collection, leaf): array}, in the file's order; layers without weights left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a readable HDF5 file in this layout, or a weight of an unknown kind; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        with h5py.File(path, "r") as file:
            root: Any = file.get("model_weights", file)
            if "layer_names" not in root.attrs:
                raise ValueError(f"{path}: no attribute 'layer_names'; expected Keras's published HDF5 weight layout")
            layers: dict[str, dict[tuple[str, str], np.ndarray]] = {}
            for layer in map(_text, root.attrs["layer_names"]):
                if layer not in root or "weight_names" not in root[layer].attrs:
                    raise ValueError(f"{path}: layer {layer!r} is listed but not stored; the file is damaged")
                weights = {}
                for weight in map(_text, root[layer].attrs["weight_names"]):
                    kind = weight.rsplit("/", 1)[-1].split(":")[0]
                    if kind not in _LEAVES:
                        known = ", ".join(_LEAVES)
                        raise ValueError(f"{path}: weight {weight!r} is of kind {kind!r}; expected one of {known}")
                    if weight not in root[layer]:
                        raise ValueError(f"{path}: weight {weight!r} of layer {layer!r} is listed but not stored")
                    weights[_LEAVES[kind]] = np.asarray(root[layer][weight])
                if weights:
                    if normalise(layer) in layers:
                        raise ValueError(f"{path}: two layers are named {normalise(layer)!r} once normalised")
                    layers[normalise(layer)] = weights
            return layers
    except (OSError, KeyError, RuntimeError) as e:
        raise ValueError(f"{path}: not a readable HDF5 file, or truncated: {e}") from e


def to_variables(
    path: str | Path, layers: dict[str, dict[tuple[str, str], np.ndarray]], order: Sequence[str]
) -> dict[str, Tree]:
    """{"params", "batch_stats"} from what `read` gave; `order` lists the network's layers in the order they run.

    Raises:
      ValueError: names the first layer whose place in the order differs.
    """
    names = list(layers)
    for i, (found, expected) in enumerate(zip(names, order, strict=False)):
        if found != expected:
            raise ValueError(f"{path}: layer {i + 1} with weights is {found!r}; expected {expected!r}")
    if len(names) != len(order):
        rest = names[len(order) :] or list(order[len(names) :])
        kind = "left over in the file" if len(names) > len(order) else "missing from the file"
        raise ValueError(f"{path}: {len(rest)} layers {kind}, the first {rest[0]!r}")
    variables: dict[str, Tree] = {"params": {}, "batch_stats": {}}
    for name, weights in layers.items():
        for (collection, leaf), array in weights.items():
            variables[collection].setdefault(name, {})[leaf] = array
    return variables
