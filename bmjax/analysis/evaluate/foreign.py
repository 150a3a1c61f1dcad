"""A word when images look unlike those that a run was trained on, with figures."""

from __future__ import annotations

import numpy as np

from bmjax.analysis.evaluate.looks import as_frequent, compare_looks
from bmjax.analysis.evaluate.reader import Seen
from bmjax.analysis.evaluate.reference import Reference

FEWEST = 10
"""Images below which nothing is said: a few may be odd by chance."""
_STRANGE, _MARGIN = 0.05, 0.1
"""Cells stranger than all but so many of validation's, and by how much their share may be larger here."""


def foreign_words(reference: Reference, seen: Seen, familiar: np.ndarray | None = None) -> list[str]:
    """Sentences on each look that is foreign, and on strangeness, where the run keeps features; none for images as
    those of training. Looks are held against training cells of the classes that are predicted here.
    `familiar` [n]: the images' familiarity, where it is known already."""
    n = len(seen.probs)
    if n < FEWEST:
        return []
    words = foreign_looks(reference, seen.looks, seen.probs)
    if reference.has_features:
        words += strange_words(reference.familiarity(reference.strangeness(seen)) if familiar is None else familiar)
    return words


def strange_words(familiar: np.ndarray) -> list[str]:
    """A sentence where too many images are strange to the network, by their familiarity [n], n >= 1."""
    n, share = len(familiar), float((familiar <= _STRANGE).mean())
    if share <= _STRANGE + _MARGIN + 3 * np.sqrt(_STRANGE * (1 - _STRANGE) / n):
        return []
    return [
        f"{100 * share:.0f} % of {n} images are stranger to the network than {100 * (1 - _STRANGE):.0f} % of the "
        f"validation cells, where {100 * _STRANGE:.0f} % are expected"
    ]


def foreign_looks(reference: Reference, looks: np.ndarray, probs: np.ndarray) -> list[str]:
    """A sentence on each look that is foreign, of looks [n, 6] and probabilities [n, k]."""
    return [
        f"{s.look} is {s.here:.2f} (median of {len(looks)} images) and was {s.training:.2f} in training: "
        f"{abs(s.shift):.1f} deviations {'higher' if s.shift > 0 else 'lower'}"
        for s in compare_looks(looks, reference.looks, as_frequent(reference.labels, probs))
        if s.is_foreign
    ]


REMEDY = (
    "the run may err more here than on its own test split, and its probabilities may be too high; for what helps, see "
    "Another laboratory in docs/evaluation.md"
)
