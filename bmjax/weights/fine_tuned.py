"""A fine-tuned Keras model as a backbone's weights: the base among its layers, and what becomes of its head."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bmjax.weights import catalog, keras_match
from bmjax.weights.keras_files import Change, KerasLayer

log = logging.getLogger(__name__)
Tree = Any
Head = Literal["drop", "keep"]
HEADS: tuple[Head, ...] = ("drop", "keep")
_SCALES = {"unit": (1 / 255, 0.0), "tf": (1 / 127.5, -1.0)}
"""Scale and offset of a Rescaling that does what a mode of bmjax/weights/preprocess.py does."""
_CONVOLUTIONS = ("conv", "depthwise", "separable")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The layers that are the network's, with a top where `top` names its Dense; and the others, which are the head."""

    base: list[KerasLayer]
    head: list[KerasLayer]
    top: KerasLayer | None


def base_of(
    path: Path, layers: Sequence[KerasLayer], order: Sequence[str]
) -> tuple[list[KerasLayer], list[KerasLayer]]:
    """(the layers of the model that is the base, those around it).

    Of the models within the file it is that with most of the network's names, then with most convolutions.

    Raises:
      ValueError: two of them have as many, or a convolution stands before the base.
    """
    models: dict[str, list[KerasLayer]] = {}
    for layer in layers:
        models.setdefault(layer.model, []).append(layer)

    def fit(model: str) -> tuple[int, int]:
        named = sum(layer.name in order for layer in models[model])
        return named, sum(layer.kind in _CONVOLUTIONS for layer in models[model])

    ranked = sorted(models, key=fit, reverse=True)
    if len(ranked) > 1 and fit(ranked[0]) == fit(ranked[1]):
        raise ValueError(
            f"{path}: the models {ranked[0]!r} and {ranked[1]!r} within it fit the backbone alike; expected one base: "
            "save it alone"
        )
    base = models.get(ranked[0], []) if ranked else []
    outside = [layer for layer in layers if layer.model != (ranked[0] if ranked else "")]
    for layer in outside:
        kernel = layer.arrays.get("kernel")
        if layer.kind in _CONVOLUTIONS and kernel is not None and kernel.ndim == 4 and kernel.shape[2] <= 4:
            raise ValueError(
                f"{path}: layer {layer.stored!r} is a convolution of the image, before the base or beside the base "
                f"{ranked[0]!r}, which might see another input. Expected one that takes the image itself: save it alone"
            )
        if "variance" in layer.arrays:
            log.warning(
                "%s: layer %r normalises the image before the base and is left out; tell what the base saw by "
                "--preprocess",
                path,
                layer.stored,
            )
    return base, outside


def parts_of(path: Path, layers: Sequence[KerasLayer], shapes: Tree, order: Sequence[str], head: Head) -> Parts:
    """The network's layers and the head's. `shapes` and `order` are those of the network with its top.

    `head="keep"` takes the head for the network's top where it is one Dense of as many inputs as the top's.

    Raises:
      ValueError: as `base_of`; or a head to be kept that isn't one such Dense.
    """
    base, rest = base_of(path, layers, order)
    top_name, inputs = next(
        (name, leaves["kernel"].shape[0])
        for name, leaves in shapes["params"].items()
        if "kernel" in leaves and len(leaves["kernel"].shape) == 2
    )
    dense = [layer for layer in base if layer.kind == "dense"]
    known = [layer for layer in dense if layer.name == top_name]
    # A file under another naming, or without names, can't name the top; the only Dense of such a file is its.
    convolutions = [layer.name in order for layer in base if layer.kind in _CONVOLUTIONS]
    otherwise = sum(convolutions) <= len(convolutions) / 2
    if not known and otherwise and len(dense) == 1 and not any(layer.kind == "dense" for layer in rest):
        known = dense
    top = next((layer for layer in known if layer.arrays["kernel"].shape[0] == inputs), None)
    without = [name for name in order if name != top_name]
    matched, missing = keras_match.match([layer for layer in base if layer.kind != "dense"], shapes, without)
    ours = {id(layer) for layer in matched.values()}
    others = [layer for layer in base if id(layer) not in ours and layer.kind != "dense"]
    # Another member of the family has convolutions left over, or lacks some; its layers stay, to be named.
    fits = not missing and all(map(_may_be_a_heads, others))
    if fits and others and top is not None and top.name != top_name:
        top = None  # a norm before it that the network hasn't: a head of its own
    left = {id(layer) for layer in dense if layer is not top} | {id(layer) for layer in others if fits}
    rest = [layer for layer in base if id(layer) in left] + rest
    base = [layer for layer in base if id(layer) not in left]
    if rest and head == "keep":
        found = [layer for layer in rest if layer.kind == "dense"]
        if top is not None or len(rest) != 1 or len(found) != 1 or found[0].arrays["kernel"].shape[0] != inputs:
            raise ValueError(
                f"{path}: the head is {_words(rest)}; --head keep takes one Dense of {inputs} inputs, which becomes "
                "the backbone's top. Use --head drop: the classifier gets a head of its own"
            )
        top = dataclasses.replace(found[0], name=top_name)
        return Parts([*base, top], [], top)
    if rest:
        log.info("%s: left out, as the head of a fine-tuned model: %s", path, _words(rest))
    return Parts(base, rest, top)


def _may_be_a_heads(layer: KerasLayer) -> bool:
    """Whether a layer that the network hasn't may stand in a head: of a kind or under a name that no backbone has, and
    not of the image."""
    if layer.kind not in _CONVOLUTIONS:
        return True
    kernel = layer.arrays.get("kernel", layer.arrays.get("depthwise_kernel"))
    return layer.name is None and kernel is not None and kernel.ndim == 4 and kernel.shape[2] > 4


def warn_of_changes(path: Path, changes: Sequence[Change], base: str, *, has_own: bool) -> None:
    """Says which layers without weights the model has and the backbone has not: the base may have seen another input.

    `has_own`: the backbone has such layers itself, within the model `base`.
    """
    foreign = [c for c in changes if not (has_own and (c.model == base or c.model.startswith(f"{base}/")))]
    if not foreign:
        return
    one = (foreign[0].scale, foreign[0].offset or 0.0)
    plain = len(foreign) == 1 and all(isinstance(value, (int, float)) for value in one)
    saw = [mode for mode, scale in _SCALES.items() if plain and np.allclose(one, scale, rtol=1e-5, atol=0)]
    log.warning(
        "%s: the model has %s, which are left out; if the image goes through them before the base, tell what the base "
        "saw by --preprocess%s",
        path,
        ", ".join(c.layer for c in foreign),
        f" {saw[0]}" if saw else "",
    )


def _words(layers: Sequence[KerasLayer]) -> str:
    return ", ".join(
        f"{layer.kind} {layer.name or layer.stored!r} {'x'.join(map(str, max(a.shape for a in layer.arrays.values())))}"
        for layer in layers
    )


def member_of(layers: Sequence[KerasLayer]) -> str | None:
    """The backbone of the catalog with exactly as many values as a base, or None; up to three norms are a head's."""
    counted = [layer for layer in layers if layer.kind in (*_CONVOLUTIONS, "norm")]
    norms = [layer for layer in counted if layer.kind == "norm"]
    by_values = {record.parameters: record.backbone for record in catalog.RECORDS if not record.top}
    total = sum(array.size for layer in counted for array in layer.arrays.values())
    for extra in range(min(4, len(norms) + 1)):
        values = total - sum(a.size for n in norms[len(norms) - extra :] for a in n.arrays.values())
        if values in by_values:
            return by_values[values]
    return None
