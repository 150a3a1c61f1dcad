"""Whether the images sent lately look unlike those that the run was trained on."""

from __future__ import annotations

import collections
import threading

import numpy as np

from bmjax.analysis.evaluate.foreign import FEWEST, foreign_looks
from bmjax.analysis.evaluate.looks import looks
from bmjax.analysis.evaluate.reference import Reference

LAST = 200
"""Images that are looked back on."""


class Watch:
    """Keeps looks and probabilities of the last images of side `size`, in memory alone. May be used by several
    threads."""

    def __init__(self, reference: Reference, size: int):
        self._reference, self._lock = reference, threading.Lock()
        looks(np.zeros((1, size, size, 3), np.uint8))  # compiled now, and not while a client waits
        self._last: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(maxlen=LAST)

    def add(self, image: np.ndarray, probs: np.ndarray) -> None:
        """An image uint8 [s, s, 3] as the model reads it, and its probabilities [k]."""
        look = looks(image[None])[0]
        with self._lock:
            self._last.append((look, probs))

    def words(self) -> list[str]:
        """A sentence on each look that is foreign; none for fewer than `FEWEST` images."""
        with self._lock:
            last = list(self._last)
        if len(last) < FEWEST:
            return []
        return foreign_looks(self._reference, *(np.stack(part) for part in zip(*last, strict=True)))
