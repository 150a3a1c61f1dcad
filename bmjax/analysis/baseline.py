"""Linear baselines by scikit-learn: what a network's accuracy is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np

from bmjax.runs.metrics import classification_metrics

# Inverse strengths of regularisation to choose from. On pixels less is known to overfit, and takes the longest.
PROBE_C = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PIXELS_C = (1e-3, 1e-2, 1e-1)


def logistic(c: float, seed: int):
    """Logistic regression, not fitted yet, on features scaled to unit variance; `c` as in scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=10000, random_state=seed))


def _choose(candidates, features: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, seed: int):
    """(C, model) with the highest accuracy on the validation rows; of equal ones the most regularised."""
    models = [(c, logistic(c, seed).fit(features, labels)) for c in candidates]
    return max(models, key=lambda pair: pair[1].score(val, val_labels))


def shrink(images: np.ndarray, size: int = 16) -> np.ndarray:
    """Images uint8 [n, h, w, 3] -> means of blocks of pixels, float32 [n, size * size * 3].

    Raises:
      ValueError: a side is smaller than `size`.
    """
    n, h, w, _ = images.shape
    if min(h, w) < size:
        raise ValueError(f"images of {h}x{w} pixels; expected at least {size}x{size}")
    block_h, block_w = h // size, w // size
    out = np.empty((n, size * size * 3), np.float32)
    for i, image in enumerate(images):  # one at a time: the images may be a memory map larger than memory
        cropped = image[: block_h * size, : block_w * size].astype(np.float32)
        out[i] = cropped.reshape(size, block_h, size, block_w, 3).mean((1, 3)).ravel()
    return out


def linear_pixels(
    images: np.ndarray, labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    """Metrics on the test images of logistic regression on 16x16 pixels (images uint8 [n, h, w, 3]).

    Its strength of regularisation, `C` in the metrics, is chosen on a fifth of the training images, then all train.
    """
    from sklearn.model_selection import train_test_split

    features = shrink(images)
    rows, held = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    c, _ = _choose(PIXELS_C, features[rows], labels[rows], features[held], labels[held], seed)
    model = logistic(c, seed).fit(features, labels)
    return classification_metrics(test_labels, model.predict_proba(shrink(test_images))) | {"C": c}


def linear_probe(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Metrics by split of logistic regression on features float [n, c]; keys train, val, test.

    Its strength of regularisation is chosen on the validation split; `C` stands in the metrics.
    """
    c, model = _choose(PROBE_C, features["train"], labels["train"], features["val"], labels["val"], seed)
    return {s: classification_metrics(labels[s], model.predict_proba(features[s])) | {"C": c} for s in features}
