"""Tests for a comparison that were tried beside the one in bmjax/analysis/comparison.py, and the one it replaced.

Each maps hits bool [v, s, n], the baseline first, to bool [v - 1]: which differences it would claim at 5 % in all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from bmjax.analysis.compare import statistics as comparison

ERROR = 0.05
TINY = 1e-12
Test = Callable[[np.ndarray], np.ndarray]


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number, in the same order (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]), 1.0)
    return adjusted


def crossed_bootstrap(values: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """Percentile interval of the mean of values [s, n], seeds and images drawn with replacement (Owen 2007).

    Images by their normal limit, given the seeds drawn: from 100 images on that is the same, and much faster.
    """
    s, n = values.shape
    drawn = rng.multinomial(s, np.full(s, 1 / s), resamples) @ values / s
    means = drawn.mean(1) + np.sqrt(drawn.var(1) / n) * rng.standard_normal(resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def old(hits: np.ndarray, resamples: int = 400) -> np.ndarray:
    """The test this one replaced: McNemar's exact test over images with Holm's correction, and the percentile interval
    over images and seeds, which is drawn only where the first agrees (400 resamples instead of 10,000)."""
    score = hits.sum(1, dtype=int)
    score = score[1:] - score[0]
    better, worse = (score > 0).sum(1), (score < 0).sum(1)
    p = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(better, worse), better + worse, 0.5))
    found = holm(p) < ERROR
    for i in np.flatnonzero(found):
        paired = hits[i + 1].astype(np.float64) - hits[0]
        low, high = crossed_bootstrap(paired, np.random.default_rng(0), resamples)
        found[i] = low > 0 or high < 0
    return found


def paired_t(hits: np.ndarray) -> np.ndarray:
    """Student's t over the seeds' differences in accuracy, Holm. Takes the images as given."""
    m = hits.mean(2)
    d = m[1:] - m[0]
    t = d.mean(1) / np.sqrt(np.maximum(d.var(1, ddof=1), TINY) / d.shape[1])
    return holm(2 * stats.t.sf(np.abs(t), d.shape[1] - 1)) < ERROR


def welch_t(hits: np.ndarray) -> np.ndarray:
    """Welch's t over the runs' accuracies, Holm. Takes the images as given."""
    m, s = hits.mean(2), hits.shape[1]
    part = np.maximum(m.var(1, ddof=1), TINY) / s
    variance = part[1:] + part[0]
    df = variance**2 / ((part[1:] ** 2 + part[0] ** 2) / (s - 1))
    return holm(2 * stats.t.sf(np.abs(m[1:].mean(1) - m[0].mean()) / np.sqrt(variance), df)) < ERROR


def _studentised(m: np.ndarray) -> np.ndarray:
    """|t| [..., v - 1] over runs' accuracies m [..., v, s]."""
    part = np.maximum(m.var(-1, ddof=1), TINY) / m.shape[-1]
    return np.abs(m[..., 1:, :].mean(-1) - m[..., :1, :].mean(-1)) / np.sqrt(part[..., 1:] + part[..., :1])


def permutation(hits: np.ndarray, draws: int = 399) -> np.ndarray:
    """Runs exchanged between all variants, the largest studentised difference of each (Westfall and Young 1993)."""
    m, rng = hits.mean(2), np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(m.size), (draws, 1)), axis=1)
    largest = _studentised(m.ravel()[order].reshape(draws, *m.shape)).max(1)
    return (1 + (largest >= _studentised(m)[:, None] - 1e-9).sum(1)) / (draws + 1) <= ERROR


def cluster_bootstrap(hits: np.ndarray, draws: int = 399) -> np.ndarray:
    """Runs of each variant drawn with replacement, images likewise, the largest studentised difference of each."""
    v, s, n = hits.shape
    rng, m, p = np.random.default_rng(0), hits.mean(2), hits.mean(1)
    paired = p[1:] - p[0]
    images = paired.var(1, ddof=1) / n
    chosen = rng.integers(0, s, (draws, v, s))
    runs = np.take_along_axis(np.broadcast_to(m - m.mean(1, keepdims=True), (draws, v, s)), chosen, axis=2)
    weights = rng.multinomial(n, np.full(n, 1 / n), draws) / n
    moved = runs[:, 1:].mean(2) - runs[:, :1].mean(2) + weights @ (paired - paired.mean(1, keepdims=True)).T
    part = runs.var(2, ddof=1) / s
    largest = (np.abs(moved) / np.sqrt(np.maximum(part[:, 1:] + part[:, :1] + images, TINY))).max(1)
    part = m.var(1, ddof=1) / s
    t = np.abs(paired.mean(1)) / np.sqrt(np.maximum(part[1:] + part[0] + images, TINY))
    return (1 + (largest >= t[:, None]).sum(1)) / (draws + 1) <= ERROR


def crossed(hits: np.ndarray, pool: bool) -> np.ndarray:
    """Images and runs both random: Satterthwaite's degrees of freedom (1946), each variant's own luck with
    Bonferroni's correction, or one luck for all with Dunnett's."""
    v, s, n = hits.shape
    luck = comparison._luck(hits)
    total, df = hits.mean(2).var(1, ddof=1), s - 1
    total = np.full(v, total.mean()) if pool else total
    paired = (hits[1:].sum(1, dtype=np.int32) - hits[0].sum(0, dtype=np.int32)) / s
    covariance = np.cov(paired).reshape(v - 1, v - 1) / n
    images, runs = np.diag(covariance), (total[1:] + total[0]) / s
    variance = np.maximum(images + np.maximum(0, runs - (luck.rest[1:] + luck.rest[0]) / (s * n)), TINY)
    of_runs = runs**2 / (v * df) if pool else (total[1:] ** 2 + total[0] ** 2) / s**2 / df
    freedom = variance**2 / np.maximum(of_runs + images**2 / (n - 1), 1e-300)
    p = 2 * stats.t.sf(np.abs(paired.mean(1)) / np.sqrt(variance), freedom)
    if not pool:
        return p * (v - 1) < ERROR
    shared = covariance + max(0.0, total[0] - luck.rest[0] / n) / s
    correlation = np.clip(shared / np.sqrt(np.outer(variance, variance)), -0.99, 0.99)
    np.fill_diagonal(correlation, 1.0)
    return comparison._corrected(p, correlation, ERROR)[0] < ERROR


def new(hits: np.ndarray) -> np.ndarray:
    """The test of bmjax.analysis.comparison."""
    rows = comparison.compare({str(i): h for i, h in enumerate(hits)}, "0")
    return np.array([bool(row.shown) for row in rows[1:]])


CANDIDATES: dict[str, Test] = {
    "old": old,
    "paired t": paired_t,
    "Welch": welch_t,
    "permutation": permutation,
    "bootstrap": cluster_bootstrap,
    "crossed, own": lambda hits: crossed(hits, pool=False),
    "crossed, pooled": lambda hits: crossed(hits, pool=True),
    "new": new,
}
