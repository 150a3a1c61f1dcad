"""Figures of merit, each with its n and a 95 % interval. NumPy in, plain numbers out.

How often the intervals hold what they say, with few images and unequal classes: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bmjax.registry import label_of, load_own
from bmjax.runs.confusion import balanced_accuracy, check_labels, confusion_matrix, macro_f1
from bmjax.runs.intervals import class_intervals, intervals_note, macro_intervals, wilson_interval


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of the confidence (Guo et al. 2017)."""
    confidence, hit = probs.max(-1), probs.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(hit[which == i].mean() - confidence[which == i].mean()) * (which == i).mean() for i in np.unique(which)]
    return float(sum(gaps))


_BUILT_IN = {
    *("n", "loss", "ece", "per_class", "confusion", "step", "checkpoint", "intervals_note", "intervals_groups"),
    *(f"{name}{end}" for name in ("accuracy", "macro_f1", "balanced_accuracy") for end in ("", "_low", "_high")),
}
Metric = Callable[[np.ndarray, np.ndarray], float]
"""metric(labels int [n], probs [n, k]) -> a number."""


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Short name -> function, of metrics of one's own: `module:name` or the path of a `.py` file.

    Raises:
      ValueError, FileNotFoundError: there is none, or two are called alike, or one as a built-in figure.
    """
    found = {label_of(name): load_own("metric", name, callable, "a function of (labels, probs)") for name in names}
    if len(found) < len(names):
        raise ValueError(f"config field 'train.metrics' is {names!r}; expected names that differ")
    if taken := [name for name in found if name in _BUILT_IN]:
        raise ValueError(
            f"config field 'train.metrics' is {names!r}, and {taken[0]!r} is a figure of every run; expected another "
            "name of the function or its file"
        )
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
    labels: np.ndarray, probs: np.ndarray, own: Mapping[str, Metric] | None = None, *, intervals: bool = False
) -> dict[str, Any]:
    """All figures of labels int [n] (0..k-1) and probabilities [n, k].

    n, accuracy with accuracy_low and accuracy_high (Wilson, 95 %), macro_f1 and balanced_accuracy (mean recall of the
    classes present) with their intervals (`macro_intervals`), loss (mean negative log-likelihood), ece, per_class
    (precision, recall, f1, n), confusion (counts, [true][predicted]); and those of `own`, by their names.

    `intervals`: per_class has the bounds of each figure too (recall_low, ...), the means' intervals come from 2,000
    draws instead of 200, which is all that each epoch is worth, and intervals_note says where they rest on little.

    Raises:
      ValueError: no image, shapes that don't fit, a label out of range, or a figure of one's own that is no number.
    """
    labels, probs = np.asarray(labels), np.asarray(probs)
    if probs.ndim != 2 or len(labels) != len(probs) or len(labels) == 0:
        raise ValueError(f"labels {labels.shape} and probabilities {probs.shape}; expected [n] and [n, k] with n >= 1")
    n, k = probs.shape
    check_labels(labels, k)
    counts = confusion_matrix(labels, probs.argmax(-1), k)
    hits = int(np.trace(counts))
    low, high = wilson_interval(hits, n)
    means = macro_intervals(counts, resamples=2000 if intervals else 200)
    # Float32 probabilities may round to zero; the loss of a wrong image is then large, not infinite.
    likelihood = np.maximum(probs[np.arange(n), labels].astype(np.float64), np.finfo(np.float32).tiny)
    found = {
        "n": int(n),
        "accuracy": hits / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": float(macro_f1(counts)),
        "macro_f1_low": means["macro_f1"][0],
        "macro_f1_high": means["macro_f1"][1],
        "balanced_accuracy": float(balanced_accuracy(counts)),
        "balanced_accuracy_low": means["balanced_accuracy"][0],
        "balanced_accuracy_high": means["balanced_accuracy"][1],
        "loss": float(-np.log(likelihood).mean()),
        "ece": expected_calibration_error(labels, probs),
        "per_class": _per_class(counts, intervals),
        "confusion": counts.tolist(),
    }
    found |= {name: _number(name, metric(labels, probs)) for name, metric in (own or {}).items()}
    return found | {"intervals_note": intervals_note(counts)} if intervals else found


def _number(name: str, value: Any) -> float:
    """A figure of one's own as a number."""
    try:
        return float(value)
    except (TypeError, ValueError) as e:
        raise ValueError(f"metric {name!r} gives {value!r}; expected a number") from e


def _per_class(counts: np.ndarray, intervals: bool) -> list[dict[str, Any]]:
    hits, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    figures = {
        "precision": hits / np.maximum(predicted, 1),
        "recall": hits / np.maximum(true, 1),
        "f1": 2 * hits / np.maximum(true + predicted, 1),
    }
    if intervals:
        for name, (low, high) in class_intervals(counts).items():
            figures |= {f"{name}_low": low, f"{name}_high": high}
    return [{**{name: float(v[c]) for name, v in figures.items()}, "n": int(true[c])} for c in range(len(counts))]
