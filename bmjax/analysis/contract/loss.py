"""The contract of a loss: make(counts [k], **options) -> loss(logits [b, k], labels int [b]) -> [b]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.analysis.contract.verdict import Contract, not_finite, say, unequal

B, K = 6, 5
COUNTS = np.array([50, 30, 15, 4, 1])
_HUGE = 1e4
_PER_IMAGE = "Give one value an image: weights, padding and the mean over the batch are the training step's."


class Subject:
    """A loss under examination; `part` makes it from the classes' counts."""

    def __init__(self, part: Callable[[np.ndarray], Any]):
        self.part = part

    @functools.cached_property
    def loss(self) -> Any:
        return self.part(COUNTS)

    @functools.cached_property
    def labels(self) -> jax.Array:
        return jnp.asarray(np.arange(B) % K, jnp.int32)

    def logits(self, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
        """[B, K], standard normal."""
        return jnp.asarray(np.random.default_rng(seed).standard_normal((B, K)), dtype)

    @functools.cached_property
    def program(self) -> Any:
        """(logits, labels) -> (losses [b], gradient of their sum [b, k]); compiled."""

        def both(logits: jax.Array, labels: jax.Array) -> Any:
            def total(logits: jax.Array) -> Any:
                losses = self.loss(logits, labels)
                return losses.sum(), losses

            gradient, losses = jax.grad(total, has_aux=True)(logits)
            return losses, gradient

        return jax.jit(both)


def made(s: Subject) -> str | None:
    """Made by make(counts), the classes' counts in the training split, int [k]."""
    if callable(s.loss):
        return None
    hint = "`make` returns the loss: a function within it, that may use the counts."
    return say(f"make(counts) gave {s.loss!r}", "a function of (logits, labels)", hint)


def call(s: Subject) -> str | None:
    """Takes logits [b, k] and labels int [b], under jit, and gives one value an image, [b]; with one image too."""
    for b in (B, 1):
        logits = jax.ShapeDtypeStruct((b, K), jnp.float32)
        found = jax.eval_shape(s.loss, logits, jax.ShapeDtypeStruct((b,), jnp.int32))
        shape = getattr(found, "shape", None)
        if shape != (b,):
            seen = f"logits {[b, K]} gave {list(shape) if shape is not None else type(found).__name__}"
            return say(seen, f"{[b]}, one value an image", _PER_IMAGE)
    return None


def dtype(s: Subject) -> str | None:
    """float32 of float32 logits; float64 in a float64 run."""
    for name in ("float32", "float64"):
        with jax.enable_x64(name == "float64"):
            logits = jax.ShapeDtypeStruct((B, K), jnp.dtype(name))
            got = jax.eval_shape(s.loss, logits, jax.ShapeDtypeStruct((B,), jnp.int32)).dtype
        if got != jnp.dtype(name):
            hint = "Compute in logits.dtype: look for a fixed type, or a NumPy array of float64 that takes part."
            return say(f"{name} logits gave {got}", name, hint)
    return None


def finite(s: Subject) -> str | None:
    """Values and gradients are finite for logits of zero, random ones and huge ones, right and wrong."""
    right = jax.nn.one_hot(s.labels, K)
    cases = {"all zero": jnp.zeros((B, K)), "random": s.logits(), "huge": _HUGE * s.logits()}
    cases |= {"sure and right": _HUGE * right, "sure and wrong": -_HUGE * right}
    for what, logits in cases.items():
        losses, gradient = s.program(logits, s.labels)
        for name, values in (("loss", losses), ("gradient", gradient)):
            if not_finite(values) is not None:
                hint = "Look for log(softmax(x)), a division or a root at zero; jax.nn.log_softmax is safe."
                return say(f"{what} logits: the {name} is not finite", "finite numbers", hint)
    return None


def gradients(s: Subject) -> str | None:
    """Each image's logits get a gradient."""
    _, gradient = s.program(s.logits(), s.labels)
    still = [i for i, row in enumerate(np.abs(np.asarray(gradient)).max(1)) if row < 1e-6]
    if still:
        hint = "Look for an argmax, a comparison, a rounding or a stop_gradient."
        return say(f"no gradient at the logits of images {still} of {B}", "one at each", hint)
    return None


def per_image(s: Subject) -> str | None:
    """An image's loss depends on that image alone."""
    logits, labels = s.logits(), s.labels
    whole, _ = s.program(logits, labels)
    other, _ = s.program(logits.at[0].set(s.logits(1)[0]), labels.at[0].set(int(labels[0] + 1) % K))
    hint = "Look for a mean, softmax or maximum over axis 0. " + _PER_IMAGE
    if differs := unequal({"loss": other[1:]}, {"loss": whole[1:]}, 1e-6):
        return say(f"another first image changed the others' {differs}", "no change", hint)
    alone, _ = s.program(logits[1:2], labels[1:2])
    if differs := unequal({"loss": alone}, {"loss": whole[1:2]}, 1e-6):
        return say(f"an image alone and the same in a batch of {B} differ in {differs}", "no difference", hint)
    return None


def deterministic(s: Subject) -> str | None:
    """The same logits give the same loss at each call, with and without jit, within 1e-5."""
    first, again = s.loss(s.logits(), s.labels), s.loss(s.logits(), s.labels)
    if differs := unequal({"loss": again}, {"loss": first}):
        hint = "Look for random numbers of NumPy, or a variable outside that each call changes."
        return say(f"two calls differ in {differs}", "the same loss", hint)
    if differs := unequal({"loss": s.program(s.logits(), s.labels)[0]}, {"loss": first}, 1e-5):
        hint = "Look for Python code that acts on the kind of array, or a global that is read while tracing."
        return say(f"with jit differs from without in {differs}", "at most 1e-05", hint)
    return None


def falls(s: Subject) -> str | None:
    """The loss falls when the logit of the right class rises."""
    near = 0.1 * s.logits()
    before, _ = s.program(near, s.labels)
    after, _ = s.program(near + jax.nn.one_hot(s.labels, K), s.labels)
    rising = [i for i, (a, b) in enumerate(zip(after, before, strict=True)) if not a < b]
    if rising:
        i = rising[0]
        seen = f"image {i}: the loss went from {before[i]:.4g} to {after[i]:.4g} as its class's logit rose by 1"
        return say(seen, "a smaller one", "Look at the sign, and at the axis by which labels pick their class.")
    return None


CONTRACT = Contract(
    "loss", Subject, (made, call, dtype, finite, gradients, per_image, deterministic, falls), basis=("made", "call")
)
