"""The contract of a metric: f(labels int [n], probs [n, k]) -> a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bmjax.analysis.contract.verdict import Contract, say

N, K = 60, 4


class Subject:
    """A metric under examination."""

    def __init__(self, part: Callable[[np.ndarray, np.ndarray], Any]):
        self.part = part

    def example(self, n: int = N, classes: int = K) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n] of the first `classes` classes, and probabilities float32 [n, K] that are often right."""
        r = np.random.default_rng(0)
        labels = (np.arange(n) % classes).astype(np.int32)
        logits = r.standard_normal((n, K)) + 1.5 * np.eye(K)[labels]
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return labels, probs.astype(np.float32)

    def number(self, labels: np.ndarray, probs: np.ndarray) -> float:
        return float(self.part(labels.copy(), probs.copy()))


def call(s: Subject) -> str | None:
    """Takes NumPy's labels int [n] and probs float32 [n, k], and gives one finite number."""
    value = s.part(*s.example())
    try:
        number = float(value)
    except (TypeError, ValueError):
        return say(f"it gave {value!r}", "a number", "Of several figures make several metrics; .mean() of an array.")
    if not math.isfinite(number):
        return say(f"it gave {number}", "a finite number", "Look for a division by zero or the log of a zero.")
    return None


def single(s: Subject) -> str | None:
    """Gives a finite number for one image, too."""
    return _finite(s, "one image", s.example(1))


def absent(s: Subject) -> str | None:
    """Gives a finite number where a class has no image, or no prediction."""
    labels, probs = s.example(classes=K - 1)
    message = _finite(s, "a class without an image", (labels, probs))
    certain = np.eye(K, dtype=np.float32)[np.zeros(N, int)]
    return message or _finite(s, "all predictions the same class", (labels, certain))


def _finite(s: Subject, what: str, example: tuple[np.ndarray, np.ndarray]) -> str | None:
    number = s.number(*example)
    if math.isfinite(number):
        return None
    hint = "Divide by max(n, 1), and decide what it is where it is undefined: a small test split has such classes."
    return say(f"{what}: it gave {number}", "a finite number", hint)


def order(s: Subject) -> str | None:
    """Does not depend on the order of images."""
    labels, probs = s.example()
    plain = s.number(labels, probs)
    for seed in range(3):
        places = np.random.default_rng(seed).permutation(N)
        shuffled = s.number(labels[places], probs[places])
        if not math.isclose(plain, shuffled, rel_tol=1e-5, abs_tol=1e-6):
            hint = "Do labels and probs stay together? Look for a part of the images, or a sort of one of the two."
            return say(f"in another order it went from {plain:.6g} to {shuffled:.6g}", "the same", hint)
    return None


def deterministic(s: Subject) -> str | None:
    """The same images give the same number at each call."""
    first, again = s.number(*s.example()), s.number(*s.example())
    if first != again:
        hint = "Seed what is random (a bootstrap): a resume must find the same best checkpoint."
        return say(f"two calls gave {first!r} and {again!r}", "the same number", hint)
    return None


def keeps_input(s: Subject) -> str | None:
    """Does not change labels or probs."""
    labels, probs = s.example()
    given = labels.copy(), probs.copy()
    s.part(*given)
    for name, before, after in zip(("labels", "probs"), (labels, probs), given, strict=True):
        if not np.array_equal(before, after):
            hint = "Copy before changing in place (+=, .sort(), x[...] = y): other figures are computed from them."
            return say(f"it changed {name}", "arrays left as they are", hint)
    return None


def tells(s: Subject) -> str | None:
    """Differs between predictions that are all right and all wrong."""
    labels, _ = s.example()
    certain = np.full((N, K), 0.01 / (K - 1), np.float32)
    right, wrong = certain.copy(), certain.copy()
    right[np.arange(N), labels] = wrong[np.arange(N), (labels + 1) % K] = 0.99
    best, worst = s.number(labels, right), s.number(labels, wrong)
    if best == worst:
        return say(f"all right and all wrong both gave {best:.6g}", "two numbers", "Are labels and probs both used?")
    return None


CONTRACT = Contract(
    "metric", Subject, (call, single, absent, order, deterministic, keeps_input, tells), basis=("call",)
)
