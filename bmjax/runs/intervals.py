"""Intervals of figures of merit: Wilson's, the bootstrap, and those of means over few or unequal classes.

How often they hold what they say: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bmjax.runs.confusion import balanced_accuracy, macro_f1

# The prior of `class_draws`: centre (logit), trend over the logarithm of a class's count, and concentration of recalls.
_CENTRES, _TRENDS, _CONCENTRATIONS = np.linspace(-4, 6, 41), np.linspace(-1.2, 1.2, 9), 2.0 ** np.arange(7)
_TREND_SPREAD, _CENTRE_POWER = 0.5, 0.5
_RARITIES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 2.0, 5.0])
_SEEN = 0.75  # share of the observed in where errors are taken to go, beside the classes' frequencies
_UNSEEN = 1.0  # errors taken to have gone into each class beside those seen; fewer make F1 of the rarest too high
_FEW = 10  # images of a class below which no interval of its figures can hold 95 %


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion of k in n (Wilson 1927), by SciPy."""
    from scipy.stats import binomtest

    interval = binomtest(int(k), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    counts: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap over images (Efron 1979) of a statistic of the confusion matrix, counts [k, k].

    `statistic` maps matrices [r, k, k] to [r]. The matrix of n images drawn with replacement is multinomial, so it is
    drawn as such, which is the same and does not depend on n in time or memory.
    """
    n = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, counts.ravel() / n, resamples)
    low, high = np.quantile(statistic(drawn.reshape(-1, *counts.shape)), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _recall_priors(n: np.ndarray, hits: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple:
    """Beta parameters (a, b) [r, k] of the classes' recalls, drawn from their posterior on a grid, and within a cell
    of the grid evenly."""
    from scipy.special import betaln, expit

    x = np.log(n + 1.0)
    x -= x.mean()
    mean = expit(_CENTRES[:, None, None] + _TRENDS[:, None] * x)[:, :, None]
    a, b = mean * _CONCENTRATIONS[:, None], (1 - mean) * _CONCENTRATIONS[:, None]
    fit = (betaln(hits + a, n - hits + b) - betaln(a, b)).sum(-1)
    centre = expit(_CENTRES)
    fit += _CENTRE_POWER * np.log(centre * (1 - centre))[:, None, None]
    fit -= 0.5 * ((_TRENDS / _TREND_SPREAD) ** 2)[:, None]
    weights = np.exp(fit - fit.max()).ravel()
    place = rng.choice(len(weights), resamples, p=weights / weights.sum())
    i, j, c = np.unravel_index(place, fit.shape)
    within = rng.uniform(-0.5, 0.5, (2, resamples))
    drawn = _CENTRES[i] + within[0] * (_CENTRES[1] - _CENTRES[0]), _TRENDS[j] + within[1] * (_TRENDS[1] - _TRENDS[0])
    mean = np.clip(expit(drawn[0][:, None] + drawn[1][:, None] * x), 1e-4, 1 - 1e-4)
    return mean * _CONCENTRATIONS[c, None], (1 - mean) * _CONCENTRATIONS[c, None]


def class_draws(counts: np.ndarray, *, seed: int = 0, resamples: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Recalls and F1 [r, k] of the classes in the population, as the confusion matrix counts [k, k] leaves them open.

    A Bayesian bootstrap (Rubin 1981, https://doi.org/10.1214/aos/1176345338) whose prior the classes themselves give
    (empirical Bayes): frequencies Dirichlet; a class's recall from a beta distribution around a mean that may rise or
    fall with the class's frequency; errors go to the other classes as they did, and as those are frequent. A class of
    which no image was seen so counts as one like the others, with all that is not known of it.
    """
    from scipy.special import gammaln

    rng, k = np.random.default_rng(seed), len(counts)
    n, hits = counts.sum(1), np.diag(counts)
    fit = gammaln(k * _RARITIES) - gammaln(n.sum() + k * _RARITIES)
    fit += (gammaln(n[:, None] + _RARITIES) - gammaln(_RARITIES)).sum(0)
    weights = np.exp(fit - fit.max())
    rarity = rng.choice(_RARITIES, (resamples, 1), p=weights / weights.sum())
    frequency = rng.standard_gamma(n + rarity) + 1e-300
    frequency /= frequency.sum(1, keepdims=True)
    a, b = _recall_priors(n, hits, rng, resamples)
    recall = rng.beta(hits + a, n - hits + b)
    errors = counts - np.diag(hits)
    seen = errors.sum(0) + _UNSEEN
    target = (1 - _SEEN) * frequency + _SEEN * seen / seen.sum()
    wrong = np.zeros((resamples, k))  # share of all images that are taken for a class wrongly
    for c in range(k):
        to = rng.standard_gamma(errors[c] + target)
        to[:, c] = 0
        missed = frequency[:, c] * (1 - recall[:, c])
        wrong += to * (missed / np.maximum(to.sum(1), 1e-300))[:, None]
    right = frequency * recall
    return recall, 2 * right / np.maximum(frequency + right + wrong, 1e-300)


def macro_intervals(
    counts: np.ndarray, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Intervals of `macro_f1` and `balanced_accuracy` over all k classes of the population, by `class_draws`.

    They are widened to hold the figure of the sample itself, which leaves out classes it does not hold.
    """
    recall, f1 = class_draws(counts, seed=seed, resamples=resamples)
    found = {}
    for name, drawn, figure in (("macro_f1", f1, macro_f1), ("balanced_accuracy", recall, balanced_accuracy)):
        low, high = np.quantile(drawn.mean(1), [(1 - level) / 2, (1 + level) / 2])
        own = float(figure(counts))
        found[name] = min(float(low), own), max(float(high), own)
    return found


def proportion_intervals(k: np.ndarray, n: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score intervals (low, high) of proportions k in n, arrays; 0 to 1 where n is 0."""
    from scipy.stats import norm

    z2 = float(norm.isf((1 - level) / 2)) ** 2
    total = np.maximum(n, 1)
    middle = (k + z2 / 2) / (total + z2)
    half = np.sqrt(z2 * (k * (total - k) / total + z2 / 4)) / (total + z2)
    return np.where(n > 0, np.maximum(middle - half, 0), 0.0), np.where(n > 0, np.minimum(middle + half, 1), 1.0)


def class_intervals(counts: np.ndarray, level: float = 0.95) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(low, high) [k] each of the classes' recall, precision and f1.

    F1 is 2 j / (1 + j) of the share j of hits among all images that are of the class or were taken for it (Jaccard's
    index), which is a proportion of its own.
    """
    hits, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    low, high = proportion_intervals(hits, true + predicted - hits, level)
    return {
        "recall": proportion_intervals(hits, true, level),
        "precision": proportion_intervals(hits, predicted, level),
        "f1": (2 * low / (1 + low), 2 * high / (1 + high)),
    }


def intervals_note(counts: np.ndarray) -> str:
    """What the intervals of confusion matrix counts [k, k] rest on beside its images; "" where on little else."""
    true, union = counts.sum(1), counts.sum(1) + counts.sum(0) - np.diag(counts)
    absent, few = int((true == 0).sum()), int(((union > 0) & (union < _FEW)).sum())
    notes = []
    if absent:
        notes.append(
            f"{absent} of {len(counts)} classes have no image: the intervals of macro F1 and balanced accuracy take "
            "them to be like the others, all means leave them out; no interval of a mean then holds exactly 95 %"
        )
    if few:
        notes.append(
            f"{few} of {len(counts)} classes have fewer than {_FEW} images, of them or taken for them: no interval of "
            "their own figures holds exactly 95 %"
        )
    return "; ".join(notes)
