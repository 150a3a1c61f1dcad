"""The confusion matrix, and the figures that it alone decides."""

from __future__ import annotations

import numpy as np


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, k: int) -> np.ndarray:
    """Counts int [k, k], rows the true class, columns the predicted one."""
    return np.bincount(labels.astype(np.int64) * k + predictions, minlength=k * k).reshape(k, k)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Mean of the classes' F1, of confusion matrices [..., k, k], counts or shares; a class neither present nor
    predicted is left out."""
    hits, total = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-2) + counts.sum(-1)
    return (2 * hits / np.where(total > 0, total, 1)).sum(-1) / (total > 0).sum(-1)


def check_labels(labels: np.ndarray, k: int) -> None:
    """Raises a ValueError unless labels [n], n >= 1, are 0..k-1."""
    if labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels range from {labels.min()} to {labels.max()}; expected 0 to {k - 1}")


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean recall of the classes present, of confusion matrices [..., k, k] (counts or shares)."""
    true = counts.sum(-1)
    recall = np.diagonal(counts, axis1=-2, axis2=-1) / np.where(true > 0, true, 1)
    return recall.sum(-1) / np.maximum((true > 0).sum(-1), 1)


def class_shares(counts: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerators and denominators [..., k] of each class's scores, of confusion matrices [..., k, k]."""
    hits, true, predicted = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    negatives = counts.sum((-2, -1))[..., None] - true
    return {
        "sensitivity": (hits, true),
        "specificity": (negatives - (predicted - hits), negatives),
        "precision": (hits, predicted),
        "f1": (2 * hits, true + predicted),
    }
