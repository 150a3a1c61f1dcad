"""Figures of merit, each with its n; accuracies with a 95 % interval. NumPy in, plain numbers out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bmjax.registry import label_of, load_own


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


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, k: int) -> np.ndarray:
    """Counts int [k, k], rows the true class, columns the predicted one."""
    return np.bincount(labels.astype(np.int64) * k + predictions, minlength=k * k).reshape(k, k)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Mean of the classes' F1, of confusion matrices [..., k, k]; a class neither present nor predicted is left out."""
    hits, total = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-2) + counts.sum(-1)
    return (2 * hits / np.maximum(total, 1)).sum(-1) / (total > 0).sum(-1)


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean recall of the classes present, of confusion matrices [..., k, k]."""
    true = counts.sum(-1)
    recall = np.diagonal(counts, axis1=-2, axis2=-1) / np.maximum(true, 1)
    return recall.sum(-1) / np.maximum((true > 0).sum(-1), 1)


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of the confidence (Guo et al. 2017)."""
    confidence, hit = probs.max(-1), probs.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(hit[which == i].mean() - confidence[which == i].mean()) * (which == i).mean() for i in np.unique(which)]
    return float(sum(gaps))


Metric = Callable[[np.ndarray, np.ndarray], float]
"""metric(labels int [n], probs [n, k]) -> a number."""


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Short name -> function, of metrics of one's own: `module:name` or the path of a `.py` file.

    Raises:
      ValueError, FileNotFoundError: there is none, or two are called alike.
    """
    found = {label_of(name): load_own("metric", name, callable, "a function of (labels, probs)") for name in names}
    if len(found) < len(names):
        raise ValueError(f"config field 'train.metrics' is {names!r}; expected names that differ")
    return found


def try_metrics(names: Sequence[str], k: int) -> None:
    """Calls metrics of one's own on made-up predictions of k classes, so that one that gives no number is known early.

    Raises:
      ValueError, FileNotFoundError: as `load_metrics`, or a metric gives no number.
    """
    r = np.random.default_rng(0)
    labels, probs = np.repeat(np.arange(k), 4).astype(np.int32), r.dirichlet(np.ones(k), 4 * k).astype(np.float32)
    for name, metric in load_metrics(names).items():
        try:
            value = metric(labels.copy(), probs.copy())
        except Exception as e:
            raise ValueError(f"metric {name!r} of labels [n] and probabilities [n, {k}]: {e!r}") from e
        _number(name, value)


def classification_metrics(
    labels: np.ndarray, probs: np.ndarray, own: Mapping[str, Metric] | None = None
) -> dict[str, Any]:
    """All figures of labels int [n] (0..k-1) and probabilities [n, k].

    n, accuracy with accuracy_low and accuracy_high (Wilson, 95 %), macro_f1 with its bootstrap interval over images,
    balanced_accuracy (mean recall of the classes present), loss (mean negative log-likelihood), ece, per_class
    (precision, recall, f1, n), confusion (counts, [true][predicted]); and those of `own`, by their names.

    Raises:
      ValueError: no image, shapes that don't fit, a label out of range, or a figure of one's own that is no number.
    """
    labels, probs = np.asarray(labels), np.asarray(probs)
    if probs.ndim != 2 or len(labels) != len(probs) or len(labels) == 0:
        raise ValueError(f"labels {labels.shape} and probabilities {probs.shape}; expected [n] and [n, k] with n >= 1")
    n, k = probs.shape
    if labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels range from {labels.min()} to {labels.max()}; expected 0 to {k - 1}")
    predictions = probs.argmax(-1)
    counts = confusion_matrix(labels, predictions, k)
    hits, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    recall, precision = hits / np.maximum(true, 1), hits / np.maximum(predicted, 1)
    f1 = 2 * hits / np.maximum(true + predicted, 1)
    low, high = wilson_interval(hits.sum(), n)
    f1_low, f1_high = bootstrap_interval(macro_f1, counts)
    # Float32 probabilities may round to zero; the loss of a wrong image is then large, not infinite.
    likelihood = np.maximum(probs[np.arange(n), labels].astype(np.float64), np.finfo(np.float32).tiny)
    return {
        "n": int(n),
        "accuracy": float(hits.sum() / n),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": float(macro_f1(counts)),
        "macro_f1_low": f1_low,
        "macro_f1_high": f1_high,
        "balanced_accuracy": float(balanced_accuracy(counts)),
        "loss": float(-np.log(likelihood).mean()),
        "ece": expected_calibration_error(labels, probs),
        "per_class": [
            {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(t)}
            for p, r, f, t in zip(precision, recall, f1, true, strict=True)
        ],
        "confusion": counts.tolist(),
    } | {name: _number(name, metric(labels, probs)) for name, metric in (own or {}).items()}


def _number(name: str, value: Any) -> float:
    """A figure of one's own as a number."""
    try:
        return float(value)
    except (TypeError, ValueError) as e:
        raise ValueError(f"metric {name!r} gives {value!r}; expected a number") from e
