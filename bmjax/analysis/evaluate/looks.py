"""What images look like, in a few numbers of each: colour, contrast, focus and the size of what is dark in them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.data.images.stain import rgb_to_lab

LOOKS = ("lightness", "green to red", "blue to yellow", "contrast", "focus", "scale")
_BATCH = 64
_LEAST_SHIFT, _DEVIATIONS = 1.0, 3.0
"""A look is foreign where its median lies so many deviations of the training cells away, and farther than chance by
so many standard errors. The bound is ours."""


def _look(image: jax.Array) -> jax.Array:
    """Looks [6] of an image [h, w, 3], RGB 0..255.

    Means of L*, a*, b* and the deviation of L*; focus: log10 of the share of the variance of L* that its Laplacian has;
    scale: log2 of the diameter, as a share of the image's side, of a disc as large as all that is darker than Otsu's
    threshold of green, in which nuclei are dark.
    """
    lab = rgb_to_lab(image)
    light = lab[..., 0]
    inner = light[1:-1, 1:-1]
    laplacian = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * inner
    focus = jnp.log10((laplacian.var() + 1e-6) / (light.var() + 1e-6))
    green = jnp.clip(image[..., 1], 0, 255)
    counts = jnp.zeros(256).at[jnp.round(green).astype(jnp.int32).ravel()].add(1.0)
    below, levels = jnp.cumsum(counts), jnp.arange(256.0)
    sums = jnp.cumsum(counts * levels)
    above, n = below[-1] - below, below[-1]
    gap = sums / jnp.maximum(below, 1) - (sums[-1] - sums) / jnp.maximum(above, 1)
    threshold = jnp.argmax(below * above * gap * gap)  # Otsu 1979: the variance between the two sides
    area = below[threshold] / n
    scale = 0.5 * jnp.log2(jnp.maximum(area, 1e-4) * 4 / jnp.pi)
    return jnp.concatenate([lab.mean((0, 1)), jnp.stack([light.std(), focus, scale])])


_looks = jax.jit(jax.vmap(_look))


def looks(images: np.ndarray) -> np.ndarray:
    """Looks float32 [n, 6], in the order of `LOOKS`, of images uint8 [n, h, w, 3]."""
    n = len(images)
    found = []
    for start in range(0, n, _BATCH):
        part = np.asarray(images[start : start + _BATCH], np.float32)
        padded = np.concatenate([part, np.repeat(part[-1:], -len(part) % _BATCH, axis=0)])  # one shape, one program
        found.append(np.asarray(_looks(padded))[: len(part)])
    return np.concatenate(found) if found else np.zeros((0, len(LOOKS)), np.float32)


@dataclasses.dataclass(frozen=True)
class Shift:
    """How far images are from the training's in one look: medians, and their distance in the training's deviations."""

    look: str
    here: float
    training: float
    shift: float
    is_foreign: bool


def compare_looks(here: np.ndarray, training: np.ndarray) -> list[Shift]:
    """A shift for each look, of looks [n, 6] against the training's [m, 6]."""
    middle, others = np.median(training, axis=0), np.median(here, axis=0)
    # 1.4826 times the median distance from the median is the deviation of a normal distribution.
    deviation = np.maximum(1.4826 * np.median(np.abs(training - middle), axis=0), 1e-3)
    shift = (others - middle) / deviation
    chance = 1.2533 * np.sqrt(1 / max(len(here), 1) + 1 / len(training))  # standard error of the medians
    foreign = np.abs(shift) > _LEAST_SHIFT + _DEVIATIONS * chance
    rows = zip(LOOKS, others.tolist(), middle.tolist(), shift.tolist(), foreign.tolist(), strict=True)
    return [Shift(*row) for row in rows]
