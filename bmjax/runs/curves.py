"""Curves of one class against the rest, read off on a fixed grid, so that a page of 4,000 cells stays small."""

from __future__ import annotations

import numpy as np

GRID = np.linspace(0.0, 1.0, 101)
"""Where ROC (false positive rates) and PR (recalls) are read off."""


def _steps(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(true positives, false positives) [m] above each threshold, falling; images of equal scores go together."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    hits = np.cumsum(positive[order])[last]
    return hits, last + 1 - hits


def roc(positive: np.ndarray, scores: np.ndarray, grid: np.ndarray = GRID) -> np.ndarray:
    """The highest true positive rate at no more than each false positive rate of `grid`, [len(grid)].

    `positive` bool [n], `scores` [n], such as a class's probabilities. NaN where one side has no image.
    """
    hits, misses = _steps(positive, scores)
    if not hits[-1] or not misses[-1]:
        return np.full(len(grid), np.nan)
    rates, reached = np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1])
    return reached[np.searchsorted(rates, grid + 1e-12, side="right") - 1]


def precision_recall(positive: np.ndarray, scores: np.ndarray, grid: np.ndarray = GRID) -> np.ndarray:
    """The precision at the highest threshold that reaches each recall of `grid`, [len(grid)]; as `roc`."""
    hits, misses = _steps(positive, scores)
    if not hits[-1]:
        return np.full(len(grid), np.nan)
    found = np.searchsorted(hits / hits[-1], np.maximum(grid, 1e-12) - 1e-12, side="left")
    first = np.flatnonzero(hits)[0]  # no recall at all is read off where the first hit stands
    found = np.maximum(found, first)
    return hits[found] / (hits + misses)[found]
