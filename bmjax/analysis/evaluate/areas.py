"""Intervals of areas under ROC and precision-recall curves, of few images too, and of their means over classes.

A bootstrap of few images, or of few errors, hardly varies: five images that all rank first would get the interval 1 to
1. How often the intervals hold what they say: tests/analysis/evaluate/test_areas.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bmjax.analysis.evaluate.resampling import Ranking
from bmjax.runs.intervals import proportion_intervals
from bmjax.runs.resampling import normal_interval, resamples

BOOTSTRAP, FORMULA = "bootstrap", "formula for few images"
FEW, _FEW_ERRORS = 20, 5
"""Images of a kind, and ranks among them lost in the mean, below which an area has an interval by a formula."""
_Z2, _EDGE = 1.959963984540054**2, 1e-9


def newcombe_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """The 95 % interval of an area under the ROC curve, by its number of images alone: of every area that lies within
    1.96 of the deviation that Hanley and McNeil's formula gives for it.

    Method 5 of Newcombe 2006, https://doi.org/10.1002/sim.2324: both kinds' numbers there are their mean.
    """
    from scipy.optimize import brentq

    both, mean = positives * negatives, (positives + negatives) / 2 - 1

    def beyond(t: float) -> float:
        variance = t * (1 - t) * (1 + mean * ((1 - t) / (2 - t) + t / (1 + t))) / both
        return (t - area) ** 2 - _Z2 * variance

    bounds = []
    for end, inside in ((_EDGE, area - _EDGE), (1 - _EDGE, area + _EDGE)):
        between = 0 < inside < 1 and beyond(end) > 0
        bounds.append(brentq(beyond, end, inside) if between else round(end))
    low, high = np.array(bounds, np.float64).tolist()
    return min(low, area), max(high, area)


def roc_interval(area: float, drawn: np.ndarray, positives: int, negatives: int) -> tuple[float, float, str]:
    """The 95 % interval of an area under the ROC curve with resamples' areas `drawn` [r], and what it is by; NaN
    without both kinds.

    By the resamples' deviation; Newcombe's where one kind has fewer than `FEW` images, or the area is so near 0 or 1
    that hardly a resample differs.
    """
    fewest = min(positives, negatives)
    if not fewest:
        return float("nan"), float("nan"), FORMULA
    if fewest < FEW or fewest * min(area, 1 - area) < _FEW_ERRORS:
        return *newcombe_interval(area, positives, negatives), FORMULA
    return *normal_interval(area, drawn, fewest), BOOTSTRAP


def pr_interval(precision: float, drawn: np.ndarray, positives: int) -> tuple[float, float, str]:
    """The 95 % interval of an average precision with resamples' `drawn` [r], and what it is by; NaN without
    images of both kinds.

    By the resamples' deviation, or where fewer than `FEW` images are positive Wilson's of a proportion of them (after
    the binomial interval of Boyd et al. 2013, https://doi.org/10.1007/978-3-642-40994-3_29). That holds 95 % where
    positives are told well; of scores that hardly tell a rare class it holds less, for the average precision of few
    positives is too high.
    """
    if not np.isfinite(precision):
        return float("nan"), float("nan"), FORMULA
    if positives >= FEW:
        return *normal_interval(precision, drawn, positives), BOOTSTRAP
    low, high = proportion_intervals(np.array([precision * positives]), np.array([positives]))
    return min(float(low[0]), precision), max(float(high[0]), precision), FORMULA


def mean_interval(values: np.ndarray, bounds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The 95 % interval of the mean of values [k], each with its own (MOVER: Zou and Donner 2008,
    https://doi.org/10.1002/sim.3095). They are taken to be independent."""
    low, high = np.array(bounds).T
    mean, k = float(np.mean(values)), len(values)
    below, above = (float(np.sqrt((gap**2).sum())) / k for gap in (values - low, high - values))
    return mean - below, mean + above


def auroc(known: np.ndarray, strange: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """(area under the ROC curve of scores that should be higher for the strange, its 95 % interval). The two kinds are
    drawn apart, for their numbers are not by chance."""
    n, m = len(known), len(strange)
    ranking = Ranking(np.repeat([False, True], [n, m]), np.concatenate([known, strange]))
    value = float(ranking.areas(np.ones((n + m, 1), np.float32))[0][0])
    drawn = np.zeros(0)
    if min(n, m) >= FEW:
        pairs = zip(resamples(n, draws, seed=0), resamples(m, draws, seed=1), strict=True)
        drawn = np.concatenate([ranking.areas(np.concatenate(pair))[0] for pair in pairs])
    return value, *roc_interval(value, drawn, m, n)[:2]
