"""Losses: one value an image, so that padding, weights and means stay with the caller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, class_weights: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of logits [b, k] against labels int [b] (0..k-1) -> [b], in float32 at least.

    Smoothing takes the target to (1 - s) * one_hot + s / k (Szegedy et al. 2016, as in Keras). `class_weights` [k]
    multiplies each image's loss by the weight of its class.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(-1)
    return loss if class_weights is None else loss * class_weights.astype(loss.dtype)[labels]


def balanced_class_weights(labels: np.ndarray, k: int) -> np.ndarray:
    """n / (k * n_class) of labels int [n] -> float32 [k] (King and Zeng 2001, as in scikit-learn's "balanced").

    Raises:
      ValueError: a class has no image.
    """
    counts = np.bincount(labels, minlength=k)
    if (counts == 0).any():
        raise ValueError(f"class {int(np.flatnonzero(counts == 0)[0])} has no image to train on; expected at least one")
    return (len(labels) / (k * counts)).astype(np.float32)
