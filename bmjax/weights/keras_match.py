"""Which of a Keras file's layers is which of the network's, what is the base of a fine-tuned model, and what its head.

A layer is matched by its name. Layers whose names Keras made up, and those of a file under another naming altogether,
are matched as Keras itself does it, in the order of `model.layers`, one kind of layer at a time. Every leaf's shape is
then held to the network's by `bmjax.weights.merge`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from bmjax.weights.keras_files import KerasLayer, is_automatic
from bmjax.weights.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB

log = logging.getLogger(__name__)
Tree = Any

KINDS = ("conv", "depthwise", "separable", "dense", "norm")
_LEAVES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def is_unused(layer: KerasLayer, unused: Sequence[str]) -> bool:
    """Whether a record's `unused` names the layer, whatever Keras counted."""
    return re.sub(r"_\d+$", "", layer.stored.rsplit("/", 1)[-1]) in unused or (layer.name or "") in unused


def preprocess_within(path: Path, layers: Sequence[KerasLayer]) -> str | None:
    """The mode of bmjax.weights.preprocess that stands in for keras.applications.efficientnet's Normalization layer.

    The published files keep ImageNet's standard deviation in place of the variance; keras.applications makes up for it
    behind the layer. A network built without weights has an identity there and so sees 0..1.

    Raises:
      ValueError: the layer does neither.
    """
    for layer in layers:
        if "variance" not in layer.arrays:
            continue
        mean, variance = layer.arrays["mean"].ravel(), layer.arrays["variance"].ravel()
        if np.allclose(mean, 0) and np.allclose(variance, 1):
            return "unit"
        std = np.asarray(IMAGENET_STD_RGB)
        if np.allclose(mean, IMAGENET_MEAN_RGB) and (np.allclose(variance, std) or np.allclose(variance, std**2)):
            return "torch"
        raise ValueError(
            f"{path}: layer {layer.stored!r} normalises by mean {mean} and variance {variance}; "
            "expected ImageNet's, or 0 and 1"
        )
    return None


def match(
    layers: Sequence[KerasLayer],
    shapes: dict[str, Tree],
    order: Sequence[str],
) -> tuple[dict[str, KerasLayer], list[str]]:
    """({the network's name: layer}, the network's names that no layer matches).

    `shapes` is the network's tree; `order` lists its layers in the order of Keras's `model.layers`.
    """
    separable = {name.removesuffix("_pointwise") for name in order if name.endswith("_pointwise")}
    separable &= {name.removesuffix("_depthwise") for name in order if name.endswith("_depthwise")}

    def keras_name(name: str) -> str:
        stem = name.removesuffix("_depthwise").removesuffix("_pointwise")
        return stem if stem in separable else name

    def kind_of(name: str) -> str:
        if name in separable:
            return "separable"
        if "kernel" not in shapes["params"][name]:
            return "norm"
        shape = shapes["params"][name]["kernel"].shape
        return "dense" if len(shape) == 2 else "depthwise" if shape[2] == 1 else "conv"

    named = {layer.name: layer for layer in layers if layer.name is not None}
    expected = list(dict.fromkeys(keras_name(name) for name in order))
    matched: dict[str, KerasLayer] = {}
    for name in expected:
        if name in named and not is_automatic(name):
            matched[name] = named[name]
    taken = {layer.stored for layer in matched.values()}
    rest = [layer for layer in layers if layer.stored not in taken]
    # A single renamed layer is a fault and stays unmatched; a file that names most layers otherwise, or none, is of
    # another naming.
    renamed = [layer for layer in rest if layer.name is not None]
    by_order = not matched or len(renamed) > len(layers) / 2
    for kind in KINDS:
        missing = [name for name in expected if name not in matched and kind_of(name) == kind]
        candidates = [layer for layer in rest if layer.kind == kind]
        if not by_order:
            missing = [name for name in missing if is_automatic(name)]
            candidates = [layer for layer in candidates if layer.name is None]
        matched |= dict(zip(missing, candidates, strict=False))
    return matched, [name for name in expected if name not in matched]


def to_variables(
    matched: dict[str, KerasLayer], layers: Sequence[KerasLayer], shapes: dict[str, Tree]
) -> dict[str, Tree]:
    """{"params", "batch_stats"} under the network's names, as far as the layers match it; the rest under their own."""
    flat: dict[tuple[str, str, str], np.ndarray] = {}
    taken = {id(layer) for layer in matched.values()}
    targets = {**matched, **{layer.name or layer.stored: layer for layer in layers if id(layer) not in taken}}
    for name, layer in targets.items():
        for kind, array in layer.arrays.items():
            path = _leaf(name, kind, layer)
            wanted = shapes[path[0]].get(path[1], {}).get(path[2])
            # Keras's depthwise kernels are [h, w, c, 1]; ours are those of a grouped convolution, [h, w, 1, c].
            if kind == "depthwise_kernel" or (kind == "kernel" and wanted is not None and _is_depthwise(array, wanted)):
                array = array.transpose(0, 1, 3, 2)
            flat[path] = array
    tree = traverse_util.unflatten_dict(flat)
    return {"params": tree.get("params", {}), "batch_stats": tree.get("batch_stats", {})}


def _is_depthwise(array: np.ndarray, wanted: Any) -> bool:
    return array.ndim == len(wanted.shape) == 4 and array.shape[3] == 1 and wanted.shape[2] == 1


def _leaf(name: str, kind: str, layer: KerasLayer) -> tuple[str, str, str]:
    """(collection, layer, leaf) of a weight of a Keras layer that the network calls `name`."""
    if layer.kind == "separable":
        part, _, leaf = kind.rpartition("_")
        return "params", f"{name}_{part or 'pointwise'}", leaf
    collection = "batch_stats" if kind.startswith("moving_") else "params"
    return collection, name, _LEAVES.get(kind, kind)
