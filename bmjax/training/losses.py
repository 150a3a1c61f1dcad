"""Losses: one value an image, so that padding, weights and means stay with the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config.training import TrainConfig
from bmjax.registry import is_own, load_own

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""loss(logits [b, k], labels int [b]) -> [b]."""


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    class_weights: jax.Array | None = None,
    focal_gamma: float = 0.0,
) -> jax.Array:
    """Cross-entropy of logits [b, k] against labels int [b] (0..k-1) -> [b], in float32 at least.

    Smoothing takes the target to (1 - s) * one_hot + s / k (Szegedy et al. 2016, as in Keras). `class_weights` [k]
    multiplies each image's loss by the weight of its class, `focal_gamma` by (1 - p)^gamma, p being the probability of
    its class (Lin et al. 2017, with a softmax).
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(-1)
    if focal_gamma:
        # log(1 - p) from the other classes' logits: 1 - p rounds to zero, and its power has no finite gradient there.
        is_own = jnp.arange(logits.shape[-1])[None] == labels[:, None]
        log_rest = jax.nn.logsumexp(jnp.where(is_own, -jnp.inf, log_probs), axis=-1)
        loss = loss * jnp.exp(focal_gamma * log_rest)
    return loss if class_weights is None else loss * class_weights.astype(loss.dtype)[labels]


def balanced_class_weights(counts: np.ndarray) -> np.ndarray:
    """n / (k * n_class) of the classes' counts int [k] -> [k] (King and Zeng 2001, as in scikit-learn's "balanced")."""
    return counts.sum() / (len(counts) * counts)


def effective_class_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """1 / effective number of the classes' counts int [k] -> [k], of mean 1 (Cui et al. 2019, "Class-balanced loss").

    The effective number of n images is (1 - beta^n) / (1 - beta): beta 0 weighs classes alike, beta near 1 by 1 / n.
    """
    weights = (1 - beta) / -np.expm1(counts * np.log(beta)) if beta else np.ones(len(counts))
    return weights * len(counts) / weights.sum()


def _check_shape(name: str, loss: Callable[..., Any], k: int) -> None:
    """A mean in place of a value an image would silently be divided by the batch again."""
    found = jax.eval_shape(loss, jax.ShapeDtypeStruct((2, k), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32))
    shape = getattr(found, "shape", None)
    if shape != (2,):
        given = list(shape) if shape is not None else repr(found)
        raise ValueError(f"loss {name!r} gives {given} of logits [2, {k}]; expected [2], one value an image")


def make_loss(config: TrainConfig, counts: np.ndarray) -> Loss:
    """The loss to train on, as configured, for classes of `counts` training images, int [k].

    Logit adjustment (Menon et al. 2021) adds tau * log(share of the class) to the logits in training only: the network
    then need not learn how frequent a class is.

    Raises:
      ValueError: a class has no image, and its frequency is to be corrected; or a loss of one's own can't be made.
    """
    if is_own(config.loss):
        make = load_own("loss", config.loss, callable, "a function make(counts, **options) that gives a loss")
        try:
            own = make(counts, **config.loss_options)
        except TypeError as e:
            raise ValueError(f"loss {config.loss!r} can't be made with options {config.loss_options!r}: {e}") from e
        if not callable(own):
            raise ValueError(f"loss {config.loss!r} gives {own!r}; expected a function of (logits, labels)")
        _check_shape(config.loss, own, len(counts))
        return cast(Loss, own)
    corrected = config.class_weights != "none" or config.logit_adjustment
    if corrected and (counts == 0).any():
        raise ValueError(f"class {int(np.argmin(counts))} has no image to train on; expected at least one")
    weights = prior = None
    if config.class_weights == "balanced":
        weights = jnp.asarray(balanced_class_weights(counts), jnp.float32)
    elif config.class_weights == "effective":
        weights = jnp.asarray(effective_class_weights(counts, config.effective_beta), jnp.float32)
    if config.logit_adjustment:
        prior = jnp.asarray(config.logit_adjustment * np.log(counts / counts.sum()), jnp.float32)[None]

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        if prior is not None:
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) + prior
        return cross_entropy(logits, labels, config.label_smoothing, weights, config.focal_gamma)

    return loss
