"""Another laboratory's colours, brought to those of training: one map for all of its images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.analysis.evaluate.looks import LOOKS, weighted_median
from bmjax.data.images.stain import lab_to_rgb, rgb_to_lab

_BATCH = 64
_WIDEST = 2.0
"""Times by which contrast is changed at most: a folder of nearly empty images tells none."""


@dataclasses.dataclass(frozen=True)
class ColourMap:
    """CIE L* times `contrast` about `light`, then L*, a*, b* plus `shift`; the same for every image, unlike
    `data.stain`, which brings each image to a reference and so takes from a cell what it has of its own colour."""

    light: float
    contrast: float
    shift: tuple[float, float, float]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 RGB [n, s, s, 3] -> the same mapped."""
        found = np.empty(images.shape, np.uint8)
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            padded = np.concatenate([part, np.repeat(part[-1:], _BATCH - len(part), axis=0)])  # one shape, one program
            numbers = np.array([self.light, self.contrast, *self.shift], np.float32)
            found[start : start + _BATCH] = np.asarray(_mapped(padded, numbers))[: len(part)]
        return found


@jax.jit
def _mapped(images: jax.Array, numbers: jax.Array) -> jax.Array:
    def one(image: jax.Array) -> jax.Array:
        lab = rgb_to_lab(image.astype(jnp.float32))
        light = numbers[0] + (lab[..., 0] - numbers[0]) * numbers[1]
        lab = jnp.stack([light, lab[..., 1], lab[..., 2]], axis=-1) + numbers[2:][None, None]
        return jnp.round(lab_to_rgb(lab)).astype(jnp.uint8)

    return jax.vmap(one)(images)


def match_colours(here: np.ndarray, training: np.ndarray, weights: np.ndarray | None = None) -> ColourMap:
    """The map by which images of looks [n, 6] get the medians of lightness, contrast and colour of the training's looks
    [m, 6], which count as their weights [m]."""
    weights = np.ones(len(training)) if weights is None else weights
    own, target = np.median(here, axis=0), weighted_median(training, weights)
    at = {name: i for i, name in enumerate(LOOKS)}
    light, a, b = (at[name] for name in ("lightness", "green to red", "blue to yellow"))
    contrast = float(target[at["contrast"]] / max(own[at["contrast"]], 1e-3))
    shift = tuple(float(target[i] - own[i]) for i in (light, a, b))
    return ColourMap(float(own[light]), float(np.clip(contrast, 1 / _WIDEST, _WIDEST)), shift)  # type: ignore[arg-type]
