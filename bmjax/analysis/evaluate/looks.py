"""What images look like, in a few numbers of each: colour, contrast, focus and the size of what is in them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.data.images.stain import rgb_to_lab

LOOKS = ("lightness", "green to red", "blue to yellow", "contrast", "focus", "scale")
_BATCH = 64
_FEWEST = 30
"""Training cells whose median and deviation are believed."""
_LEAST_SHIFT, _DEVIATIONS = 0.5, 3.0
"""A look is foreign where its median lies so many deviations of the training cells away, and beyond that farther
than chance by so many standard errors. The bound is ours."""


def _look(image: jax.Array) -> jax.Array:
    """Looks [5] of an image [h, w, 3], RGB 0..255: means of L*, a*, b*, the deviation of L*, and focus, log10 of the
    share of the variance of L* that its Laplacian has."""
    lab = rgb_to_lab(image)
    light = lab[..., 0]
    inner = light[1:-1, 1:-1]
    laplacian = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * inner
    focus = jnp.log10((laplacian.var() + 1e-6) / (light.var() + 1e-6))
    return jnp.concatenate([lab.mean((0, 1)), jnp.stack([light.std(), focus])])


_looks = jax.jit(jax.vmap(_look))


def _otsu(grey: np.ndarray) -> float:
    """The threshold between two kinds of values 0..255 that leaves them least varied (Otsu 1979)."""
    counts = np.bincount(grey.ravel(), minlength=256).astype(float)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    gap = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
    return float((below * above * gap * gap).argmax())


def _scale(image: np.ndarray) -> float:
    """log2 of the diameter of a disc as large as the dark patch nearest the middle, over the image's side.

    Nuclei are dark in green; the patch is what is darker than Otsu's threshold, after some smoothing.
    """
    from scipy.ndimage import gaussian_filter, label

    h, w, _ = image.shape
    green = gaussian_filter(image[..., 1].astype(np.float32), h / 64).astype(np.uint8)
    dark = green <= max(_otsu(green), green.min())
    patches: np.ndarray = label(dark)[0]  # type: ignore[index]
    y, x = np.nonzero(dark)
    nearest = np.argmin((y - (h - 1) / 2) ** 2 + (x - (w - 1) / 2) ** 2)
    area = int((patches == patches[y[nearest], x[nearest]]).sum())
    return float(0.5 * np.log2(area * 4 / np.pi / (h * w)))


def looks(images: np.ndarray) -> np.ndarray:
    """Looks float32 [n, 6], in the order of `LOOKS`, of images uint8 [n, h, w, 3]."""
    n = len(images)
    found = []
    for start in range(0, n, _BATCH):
        part = np.asarray(images[start : start + _BATCH])
        shape = _BATCH if n > 1 else 1  # two shapes, two programs
        padded = np.concatenate([part, np.repeat(part[-1:], -len(part) % shape, axis=0)])
        rest = np.asarray(_looks(padded.astype(np.float32)))[: len(part)]
        scale = np.array([_scale(image) for image in part], np.float32)
        found.append(np.concatenate([rest, scale[:, None]], axis=1))
    return np.concatenate(found) if found else np.zeros((0, len(LOOKS)), np.float32)


@dataclasses.dataclass(frozen=True)
class Shift:
    """How far images are from the training's in one look: medians, and their distance in the training's deviations."""

    look: str
    here: float
    training: float
    shift: float
    is_foreign: bool


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The median [d] of values [m, d], each row counted as its weight [m]."""
    order = np.argsort(values, axis=0, kind="stable")
    shares = np.cumsum(weights[order], axis=0) / weights.sum()
    low, high = (shares < 0.5 - 1e-9).sum(0), np.minimum((shares < 0.5 + 1e-9).sum(0), len(values) - 1)
    ordered = np.take_along_axis(values, order, 0)
    return (np.take_along_axis(ordered, low[None], 0)[0] + np.take_along_axis(ordered, high[None], 0)[0]) / 2


def compare_looks(here: np.ndarray, training: np.ndarray, weights: np.ndarray | None = None) -> list[Shift]:
    """A shift for each look, of looks [n, 6] against the training's [m, 6], which count as their weights [m]."""
    weights = np.ones(len(training)) if weights is None else weights
    middle, others = weighted_median(training, weights), np.median(here, axis=0)
    # 1.4826 times the median distance from the median is the deviation of a normal distribution.
    deviation = np.maximum(1.4826 * weighted_median(np.abs(training - middle), weights), 1e-3)
    shift = (others - middle) / deviation
    chance = 1.2533 * np.sqrt(1 / max(len(here), 1) + 1 / _worth(weights))  # standard error of the medians
    foreign = np.abs(shift) > _LEAST_SHIFT + _DEVIATIONS * chance
    rows = zip(LOOKS, others.tolist(), middle.tolist(), shift.tolist(), foreign.tolist(), strict=True)
    return [Shift(*row) for row in rows]


def as_frequent(labels: np.ndarray, probs: np.ndarray) -> np.ndarray | None:
    """Weights [m] that give training cells of labels [m] the classes' frequencies among probabilities [n, k]: a smear
    of one kind of cell is not another laboratory's. None where no training cell is of those classes."""
    counts, shares = np.bincount(labels, minlength=probs.shape[1]), probs.mean(0, dtype=np.float64)
    weights = (shares / np.maximum(counts, 1))[labels]
    if shares[counts > 0].sum() < 0.5 or _worth(weights) < _FEWEST:
        return None
    return weights


def _worth(weights: np.ndarray) -> float:
    """As many rows of equal weights (Kish 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())
