"""Whether a map shows what decided: deletion and insertion against maps that know nothing, and randomised networks.

Deletion and insertion are those of Petsiuk et al. 2018 (https://arxiv.org/abs/1806.07421), the sanity check that of
Adebayo et al. 2018 (https://arxiv.org/abs/1810.03292).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from scipy import ndimage, stats

from bmjax.analysis.explain.maps import Explainer, Maps, centre_map, edge_map
from bmjax.model.classifier import Classifier
from bmjax.model.create import init

Tree = Any
GRID = 8
STEPS = 16
LEVEL = 0.05
LARGEST_CORRELATION = 0.5
RULE = (
    "A map passes if its score (insertion minus deletion) is above both the random and the centre map's, each by a "
    f"one-sided paired Wilcoxon test at {LEVEL:g}, and if its mean rank correlation with the map after the whole "
    f"network is randomised is below {LARGEST_CORRELATION:g}."
)


def cells_of(shape: tuple[int, int], grid: int) -> np.ndarray:
    """[h, w], which of grid * grid cells a pixel is in."""
    rows, columns = (np.arange(side) * grid // side for side in shape)
    return rows[:, None] * grid + columns[None]


def cell_means(maps: np.ndarray, grid: int = GRID) -> np.ndarray:
    """Maps [n, h, w] -> their means over cells [n, grid * grid]."""
    cells = cells_of(maps.shape[1:], grid)
    return np.stack([ndimage.mean(m, cells, np.arange(grid * grid)) for m in np.asarray(maps, np.float64)])


def deletion_insertion(
    explainer: Explainer, variables: Tree, images: np.ndarray, targets: np.ndarray, values: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Areas under the target's probability [n], 0..1, as the cells with the highest values [n, cells] go, or come.

    Deletion paints them in the image's mean colour: low is good. Insertion brings them back into a blurred image: high
    is good. Ties go in random order. The paper takes pixels; here all maps are compared on the same squares, so that
    neither a map's resolution nor its speckle tells.
    """
    order = np.argsort(np.random.default_rng(seed).random(values.shape), axis=1)
    order = np.take_along_axis(order, np.argsort(-np.take_along_axis(values, order, 1), axis=1, kind="stable"), 1)
    cells = cells_of(images.shape[1:3], round(values.shape[1] ** 0.5))
    areas = []
    for image, target, places in zip(np.asarray(images), targets, order, strict=True):
        mean = np.broadcast_to(image.mean((0, 1)).round(), image.shape)
        side = min(image.shape[:2])
        blurred = np.stack([ndimage.gaussian_filter(np.float32(image[..., c]), side / 16) for c in range(3)], axis=-1)
        counts = np.linspace(0, len(places), STEPS + 1).round().astype(int)
        taken = np.stack([np.isin(cells, places[:k]) for k in counts])[..., None]
        deleted, inserted = np.where(taken, mean, image), np.where(taken, image, blurred.round())
        probs = explainer.probabilities(variables, np.concatenate([deleted, inserted]).astype(np.uint8))[:, target]
        areas.append(np.trapezoid(probs.reshape(2, -1), counts / len(places), axis=1))
    return tuple(np.array(areas).T)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity -1..1 of two maps [h, w] in 0..1 (Wang et al. 2004): Gaussian windows of sigma 1.5."""

    def mean(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, 1.5, truncate=3.5)

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(found.mean())


def unit(maps: np.ndarray) -> np.ndarray:
    """Maps [n, h, w], each stretched to 0..1; a constant one is zero."""
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return (maps - low) / np.where(high > low, high - low, 1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation [n] of values [n, cells] before and after.

    Values all equal have none: before, nothing can change, so it is 1; after, what there was is gone, so it is 0.
    """
    found = np.ones(len(a))
    for i, (before, after) in enumerate(zip(a, b, strict=True)):
        if np.ptp(before) > 0:
            ranks = stats.rankdata(before), stats.rankdata(after)
            found[i] = np.corrcoef(*ranks)[0, 1] if np.ptp(after) > 0 else 0.0
    return found


def randomised(
    model: Classifier, variables: Tree, seed: int, image_size: int, what: Literal["head", "whole"]
) -> dict[str, Tree]:
    """The variables with the head's, or all, drawn again, statistics too."""
    fresh = init(model, jax.random.key(seed), image_size)
    fresh = jax.tree.map(lambda old, new: np.asarray(new, old.dtype), dict(variables), fresh)
    if what == "whole":
        return fresh
    return {c: tree | {k: v for k, v in fresh[c].items() if k == "head"} for c, tree in variables.items()}


@dataclasses.dataclass(frozen=True)
class Score:
    """What became of one map over n images; `deletion`, `insertion` [n], the rest means over images.

    `p_random`, `p_centre`: of the tests that its score is above that map's. `correlation`, `similarity`: with the maps
    after randomising "head" and "whole", Spearman's over cells and SSIM.
    """

    deletion: np.ndarray
    insertion: np.ndarray
    p_random: float
    p_centre: float
    correlation: dict[str, float]
    similarity: dict[str, float]

    @property
    def scores(self) -> np.ndarray:
        """Insertion minus deletion [n], -1..1: high is good."""
        return self.insertion - self.deletion

    @property
    def above_random(self) -> bool:
        return self.p_random < LEVEL

    @property
    def above_centre(self) -> bool:
        return self.p_centre < LEVEL

    @property
    def faithful(self) -> bool:
        return self.above_random and self.above_centre

    @property
    def sane(self) -> bool:
        return self.correlation["whole"] < LARGEST_CORRELATION

    @property
    def passes(self) -> bool:
        """By RULE."""
        return self.faithful and self.sane


def _p_above(scores: np.ndarray, others: np.ndarray) -> float:
    """One-sided paired Wilcoxon test; 1 where nothing differs."""
    if np.array_equal(scores, others):
        return 1.0
    test: Any = stats.wilcoxon(scores, others, alternative="greater")
    return float(test.pvalue)


def score_maps(
    explainer: Explainer,
    model: Classifier,
    variables: Tree,
    images: np.ndarray,
    targets: np.ndarray,
    *,
    extra: Maps | None = None,
    draws: int = 3,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores by name of the explainer's maps of images uint8 [n, h, w, 3] and of `extra` maps, which know no network.

    Always among them are `edges` and `constant`, which must not pass. The random map's score is the mean of `draws`
    maps; the network is randomised as often.
    """
    maps = explainer.maps(variables, images, targets)
    constant = np.zeros(images.shape[:3])
    blind = {"edges": edge_map(images), "constant": constant, "centre": centre_map(images)} | (extra or {})

    def areas(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return deletion_insertion(explainer, variables, images, targets, values, seed)

    values = {name: cell_means(m) for name, m in (maps | blind).items()}
    found = {name: areas(v, seed) for name, v in values.items()}
    r = np.random.default_rng(seed)
    random = [areas(r.random((len(images), GRID * GRID)), seed) for _ in range(draws)]
    baseline = np.mean([insertion - deletion for deletion, insertion in random], axis=0)
    centre = found["centre"][1] - found["centre"][0]

    correlation: dict[str, dict[str, list[float]]] = {name: {"head": [], "whole": []} for name in values}
    similarity: dict[str, dict[str, list[float]]] = {name: {"head": [], "whole": []} for name in values}
    for draw in range(draws):
        for what in ("head", "whole"):
            other = randomised(model, variables, seed + 1 + draw, images.shape[1], what)
            after = explainer.maps(other, images, targets) | blind
            for name, before in (maps | blind).items():
                correlation[name][what] += [*rank_correlation(values[name], cell_means(after[name]))]
                pairs = zip(unit(before), unit(after[name]), strict=True)
                similarity[name][what] += [ssim(a, b) for a, b in pairs]

    def mean(by_what: dict[str, list[float]]) -> dict[str, float]:
        return {what: float(np.mean(v)) for what, v in by_what.items()}

    return {
        name: Score(
            deletion,
            insertion,
            p_random=_p_above(insertion - deletion, baseline),
            p_centre=_p_above(insertion - deletion, centre),
            correlation=mean(correlation[name]),
            similarity=mean(similarity[name]),
        )
        for name, (deletion, insertion) in found.items()
    }
