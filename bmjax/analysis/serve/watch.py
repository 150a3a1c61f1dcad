"""Whether the images sent lately look unlike those that the run was trained on."""

from __future__ import annotations

import collections
import threading

import numpy as np

from bmjax.analysis.evaluate.foreign import FEWEST, foreign_looks, strange_words
from bmjax.analysis.evaluate.looks import looks
from bmjax.analysis.evaluate.reader import Seen
from bmjax.analysis.evaluate.reference import Reference

LAST = 200
"""Images that are looked back on."""


class Watch:
    """Keeps looks, probabilities and, where the run keeps features, the familiarity of the last images of side `size`,
    in memory alone. May be used by several threads."""

    def __init__(self, reference: Reference, size: int):
        self._reference, self._lock = reference, threading.Lock()
        self._image = np.zeros((size, size, 3), np.uint8)
        looks(self._image[None])  # compiled now, and not while a client waits
        self._last: collections.deque[tuple[np.ndarray, np.ndarray, float]] = collections.deque(maxlen=LAST)

    def begin(self, probs: np.ndarray, inside: dict[str, np.ndarray]) -> None:
        """Computes what strangeness needs once, before a client waits for it, of an image's probabilities and insides.

        Raises:
          ValueError: reference.npz is of other features than the network's.
        """
        try:
            self._familiarity(_seen(self._image, probs, inside))
        except ValueError as e:
            raise ValueError(
                f"reference.npz does not fit the run's features ({e}); `bmjax eval RUN --reference` writes it again"
            ) from e

    def _familiarity(self, seen: Seen) -> float:
        return float(self._reference.familiarity(self._reference.strangeness(seen))[0])

    def add(self, image: np.ndarray, probs: np.ndarray, inside: dict[str, np.ndarray] | None = None) -> None:
        """An image uint8 [s, s, 3] as the model reads it, its probabilities [k], and what strangeness is told by, where
        the engine gives it."""
        seen = _seen(image, probs, inside or {})
        familiar = float("nan") if inside is None else self._familiarity(seen)
        with self._lock:
            self._last.append((seen.looks[0], probs, familiar))

    def words(self) -> list[str]:
        """A sentence on each look that is foreign, and on strangeness; none for fewer than `FEWEST` images."""
        with self._lock:
            last = list(self._last)
        if len(last) < FEWEST:
            return []
        seen, probs, familiar = (np.stack(part) for part in zip(*last, strict=True))
        known = familiar[np.isfinite(familiar)]
        return foreign_looks(self._reference, seen, probs) + (strange_words(known) if len(known) >= FEWEST else [])


def _seen(image: np.ndarray, probs: np.ndarray, inside: dict[str, np.ndarray]) -> Seen:
    none = np.zeros((1, 0), np.float32)
    energy, features, maps = (inside[name][None] if inside else none for name in ("energy", "features", "maps"))
    return Seen(probs[None], energy, features, maps, image[None], np.arange(1))
