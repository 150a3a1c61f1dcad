"""Reads state dicts in timm's or torchvision's naming; which key is which layer's is told by the family's `timm_name`
and, where torchvision's differ, `torchvision_name`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from bmjax import backbones

log = logging.getLogger(__name__)
Tree = Any

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def base_of(
    path: Path,
    tensors: dict[str, np.ndarray],
    backbone: str,
    model: Any,
    order: Sequence[str],
    head: Literal["drop", "keep"] = "drop",
) -> dict[str, np.ndarray]:
    """The tensors of the network among those of a file, in timm's naming, the layer of classes included.

    `model` is the network with top and `order` its layers. A word before all of the network's keys, as `module.` or
    `backbone.`, is taken off; what stands beside the network, or in place of its top, is left out with a word. With
    `head="keep"` a single dense layer in place of the top becomes the top.

    Raises:
      ValueError: the network's first layer isn't in the file, or is there twice; or the head to keep is no such layer.
    """
    family = backbones.family_of(backbone)
    timm_name: Callable[[Any, str], str] = family.timm_name
    torchvision_name: Callable[[Any, str], str] = getattr(family, "torchvision_name", timm_name)
    # torchvision's DenseNet files of 2017 have `norm.1` for `norm1`.
    keys = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): key for key in tensors}
    for name_of in (timm_name, torchvision_name):
        first = f"{name_of(model, order[0])}.weight"
        prefixes = [key.removesuffix(first) for key in keys if key == first or key.endswith(f".{first}")]
        if prefixes:  # `conv1.weight` ends the keys of blocks too: that with most of the network's layers counts
            layers = [f"{name_of(model, layer)}.weight" for layer in order[:-1]]
            fits = [sum(prefix + layer in keys for layer in layers) for prefix in prefixes]
            prefixes = [prefix for prefix, fit in zip(prefixes, fits, strict=True) if fit == max(fits)]
            break
    else:
        raise ValueError(
            f"{path}: neither ported by bmjax nor in timm's naming for {backbone}, where the first layer is "
            f"{timm_name(model, order[0]) + '.weight'!r}; the file begins with {next(iter(tensors), 'nothing')!r}"
        )
    if len(prefixes) > 1:
        raise ValueError(
            f"{path}: holds {backbone} {len(prefixes)} times, under {', '.join(map(repr, prefixes[:5]))}; expected once"
        )
    prefix = prefixes[0]
    within = {key.removeprefix(prefix): tensors[old] for key, old in keys.items() if key.startswith(prefix)}
    beside = {key: tensors[old] for key, old in keys.items() if not key.startswith(prefix)}
    names = {name_of(model, layer): timm_name(model, layer) for layer in order}
    top = timm_name(model, order[-1])
    if f"{name_of(model, order[-1])}.weight" not in within:  # another head in its place: classifier.1, fc.0, ...
        beside |= {key: within.pop(key) for key in list(within) if key.startswith(f"{top}.")}
        if head == "keep":
            within |= _top_of(path, beside, top)
            beside = {}
    if beside:
        log.info("%s: left out, as the head of a fine-tuned model: %s", path, ", ".join(list(beside)[:10]))
    renamed = {}
    for key, array in within.items():
        layer, _, leaf = key.rpartition(".")
        renamed[f"{names.get(layer, layer)}.{leaf}" if layer else key] = array
    return renamed


def _top_of(path: Path, head: dict[str, np.ndarray], top: str) -> dict[str, np.ndarray]:
    """The tensors of a single dense layer, under the name of the network's top."""
    layers = {key.rpartition(".")[0] for key in head}
    found = {f"{top}.{key.rpartition('.')[2]}": array for key, array in head.items()}
    if len(layers) != 1 or getattr(found.get(f"{top}.weight"), "ndim", 0) != 2:
        raise ValueError(
            f"{path}: the head is {', '.join(head) or 'not there'}; --head keep takes one dense layer, which becomes "
            "the backbone's top. Use --head drop: the classifier gets a head of its own"
        )
    return found


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
