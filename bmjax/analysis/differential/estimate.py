"""Shares of the classes among cells, from a classifier's counts and its confusion matrix, with credible intervals.

How often the intervals hold the truth: docs/differential.md, printed by tools/simulate_differential.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np

FEW = 10
"""Labelled cells of a class below which its interval is not reliable."""
_CHAINS, _BURN_IN, _KEPT = 200, 30, 20
_EACH, _ALL = 0.5, 3.5  # cells that the prior adds to each class, and to all that are known together at most
_ENTRY = 1 / 7  # cells that the prior adds to each entry of the confusion matrix
_MAYBE_NONE = 0.025  # probability of no cell of a class above which its interval begins at 0


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of each class [k]: the mean of its share, 0..1, and the bounds of its interval."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def draw_shares(
    counts: np.ndarray, confusion: np.ndarray, *, seed: int = 0, chains: int = _CHAINS
) -> tuple[np.ndarray, np.ndarray]:
    """(shares [draws, k] of the true classes, probabilities [k] that the cells hold none of a class).

    `counts` int [k]: cells by predicted class. `confusion` int [k, k]: labelled cells, rows the true class. Gibbs
    sampling of a multinomial mixture: the true class of each cell, the shares (Dirichlet) and the rows of the confusion
    matrix (Dirichlet: the labelled cells and `_ENTRY`) in turn, so that what the matrix leaves open
    widens the intervals.
    """
    rng, k = np.random.default_rng(seed), len(counts)
    at_first, seen, labelled = confusion + _ENTRY, np.flatnonzero(counts), confusion.sum(1)
    known = max(int((labelled >= FEW).sum()), 1)
    # A class with few labelled cells could pass for any other, and would take from all of them: it is taken to be rare.
    prior = min(_EACH, _ALL / known) * np.minimum((labelled + 0.5) / FEW, 1)
    cells = np.broadcast_to(counts[seen], (chains, len(seen)))

    def dirichlet(given: np.ndarray) -> np.ndarray:
        drawn = rng.standard_gamma(given) + 1e-300
        return drawn / drawn.sum(-1, keepdims=True)

    rows = dirichlet(np.broadcast_to(at_first, (chains, k, k)))
    shares, kept, none = dirichlet(np.broadcast_to(counts + 1.0, (chains, k))), [], np.zeros(k)
    parameters = np.empty((chains, k, k))
    for step in range(_BURN_IN + _KEPT):
        joint = (shares[:, :, None] * rows[:, :, seen]).swapaxes(1, 2)  # [chains, predicted, true]
        true = rng.multinomial(cells, joint / joint.sum(-1, keepdims=True))
        there = true.sum(1)
        shares = dirichlet(there + prior)
        parameters[:] = at_first
        parameters[:, :, seen] += true.swapaxes(1, 2)
        rows = dirichlet(parameters)
        if step >= _BURN_IN:
            kept.append(shares)
            none += (there == 0).mean(0) / _KEPT
    return np.concatenate(kept), none


def estimate_shares(
    counts: np.ndarray, confusion: np.ndarray, *, level: float = 0.95, seed: int = 0, chains: int = _CHAINS
) -> Shares:
    """The shares of the true classes in what the cells are a sample of, as `draw_shares`; equal-tailed intervals that
    begin at 0 where there may be no cell of the class.

    Raises:
      ValueError: no cell, or shapes that do not fit.
    """
    k = len(counts)
    if confusion.shape != (k, k):
        raise ValueError(f"the confusion matrix is {list(confusion.shape)}; expected {[k, k]}")
    if not counts.sum():
        raise ValueError("no cell to count; expected at least one")
    drawn, none = draw_shares(counts, confusion, seed=seed, chains=chains)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Shares(drawn.mean(0), np.where(none > _MAYBE_NONE, 0.0, low), high)
