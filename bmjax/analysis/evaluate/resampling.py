"""Every score of resampled images at once: weights of images in, scores of each resample out.

A resample is how often each image was drawn (bmjax.runs.resampling). All scores are sums over images by these
weights, so that a block of resamples is a few matrix products, and for the areas under curves a sum along each class's
ranking.
"""

from __future__ import annotations

import numpy as np

from bmjax.runs.confusion import balanced_accuracy, macro_f1

COUNTED = ("macro_precision", "macro_recall", "weighted_precision", "weighted_recall", "weighted_f1", "kappa", "mcc")
"""Scores of the confusion matrix alone whose intervals are the bootstrap's."""


def counted(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [...] of confusion matrices [..., k, k], rows the true class.

    A class neither present nor predicted is left out of macro means, as in scikit-learn; what is divided by zero is 0.
    kappa: Cohen 1960; mcc: the correlation of Gorodkin 2004; both are NaN where one class has all images, for then
    nothing can be right beyond chance.
    """
    hits, true, predicted = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    n, there = true.sum(-1), (true + predicted > 0).sum(-1)
    precision, recall = hits / np.where(predicted > 0, predicted, 1), hits / np.where(true > 0, true, 1)
    f1 = 2 * hits / np.where(true + predicted > 0, true + predicted, 1)
    share, right, chance = true / n[..., None], hits.sum(-1) / n, (true * predicted).sum(-1) / n**2
    covariance, several = right - chance, (true > 0).sum(-1) > 1
    spread = (1 - (predicted**2).sum(-1) / n**2) * (1 - (true**2).sum(-1) / n**2)
    return {
        "accuracy": right,
        "balanced_accuracy": balanced_accuracy(counts),
        "macro_precision": precision.sum(-1) / there,
        "macro_recall": recall.sum(-1) / there,
        "macro_f1": macro_f1(counts),
        "weighted_precision": (share * precision).sum(-1),
        "weighted_recall": (share * recall).sum(-1),
        "weighted_f1": (share * f1).sum(-1),
        "kappa": np.where(several, covariance / np.where(several, 1 - chance, 1), np.nan),
        "mcc": np.where(several, covariance / np.sqrt(np.where(spread > 0, spread, 1)), np.nan),
    }


class Ranking:
    """One class's images against all others, by its probability [n], best first: what is the same in each resample."""

    def __init__(self, positive: np.ndarray, score: np.ndarray):
        self._order = np.argsort(-score, kind="stable")
        falling = -score[self._order]
        self._positive = np.flatnonzero(positive[self._order])
        at = falling[self._positive]
        # Images of one probability share the place of the last of them.
        self._start = np.searchsorted(falling, at, side="left")
        self._end = np.searchsorted(falling, at, side="right") - 1
        self._first = np.searchsorted(self._positive, self._start, side="left")
        self._last = np.searchsorted(self._positive, self._end, side="right") - 1

    def areas(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(area under the ROC curve, average precision), each [r], by weights [n, r]; NaN without images of both kinds.

        As scikit-learn's roc_auc_score and average_precision_score with sample weights.
        """
        if not len(self._positive):
            return np.full(weights.shape[1], np.nan), np.full(weights.shape[1], np.nan)
        ordered = weights[self._order]
        own = ordered[self._positive]
        zero = np.zeros((1, weights.shape[1]), np.float32)
        seen = np.concatenate([zero, np.cumsum(ordered, axis=0)])  # row i: of the i best
        found = np.concatenate([zero, np.cumsum(own, axis=0)])
        positives, negatives = found[-1].astype(np.float64), seen[-1] - found[-1].astype(np.float64)
        upto, right = seen[self._end + 1], found[self._last + 1]
        above = upto - right + seen[self._start] - found[self._first]  # negatives above, and those level with it twice
        both = np.where((positives > 0) & (negatives > 0), positives * negatives, np.nan)
        area = 1 - (own * above).sum(0, dtype=np.float64) / 2 / both
        precision = (own * right / np.maximum(upto, 1)).sum(0, dtype=np.float64)
        return area, precision / np.where((positives > 0) & (negatives > 0), positives, np.nan)


def mean_over_classes(values: np.ndarray) -> np.ndarray:
    """Means [r] of values [k, r], NaN left out; NaN where nothing is left."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)
