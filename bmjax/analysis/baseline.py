"""Linear baselines by scikit-learn: what a network's accuracy is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np

from bmjax.metrics import classification_metrics


def _logistic(c: float, seed: int):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, random_state=seed))


def shrink(images: np.ndarray, size: int = 16) -> np.ndarray:
    """Images uint8 [n, h, w, 3] -> mean pixels of blocks, float32 [n, size * size * 3].

    Raises:
      ValueError: the side is smaller than `size`.
    """
    n, h, w, _ = images.shape
    if min(h, w) < size:
        raise ValueError(f"images of {h}x{w} pixels; expected at least {size}x{size}")
    block_h, block_w = h // size, w // size
    images = images[:, : block_h * size, : block_w * size].astype(np.float32)
    return images.reshape(n, size, block_h, size, block_w, 3).mean((2, 4)).reshape(n, -1)


def linear_pixels(
    images: np.ndarray, labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    """Metrics on the test images of logistic regression on 16x16 pixels (images uint8 [n, h, w, 3])."""
    model = _logistic(1e-2, seed).fit(shrink(images), labels)
    return classification_metrics(test_labels, model.predict_proba(shrink(test_images)))


def linear_probe(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Metrics by split of logistic regression on features float [n, c]; keys train, val, test.

    Its strength of regularisation is chosen on the validation split; `C` stands in the metrics.
    """
    best: tuple[float, float, Any] | None = None
    for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        model = _logistic(c, seed).fit(features["train"], labels["train"])
        score = float(model.score(features["val"], labels["val"]))
        if best is None or score > best[0]:
            best = (score, c, model)
    assert best is not None
    _, c, model = best
    return {s: classification_metrics(labels[s], model.predict_proba(features[s])) | {"C": c} for s in features}
