"""Laboratories to train on together, each brought to the colours of all by one map for all of its images."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from bmjax.data.batches import evenly
from bmjax.data.images.colours import ColourMap, colour_shares, mean_quantiles, quantiles, to_quantiles
from bmjax.data.sources.listing import Listing
from bmjax.files import printable

log = logging.getLogger(__name__)
VERSION = 1
"""Of how colours are matched; a change makes other caches."""
_MEASURED = 2048
"""Images of a laboratory at most whose colours are measured."""
_FEWEST, _APART = 30, 0.1


def check_laboratories(listing: Listing, kept: Sequence[int] | None = None) -> None:
    """Refuses images without a laboratory, and fewer than two laboratories of the images `kept`; None: of all.

    Raises:
      ValueError: names the first image, or the laboratory.
    """
    names = listing.laboratories or ("",) * len(listing)
    if without := [name for name, laboratory in zip(listing.ids, names, strict=True) if not laboratory]:
        raise ValueError(
            f"{listing.origin}: {len(without)} of {len(names)} images have no laboratory, the first {without[0]!r}; "
            "expected one of each, in a table's column laboratory or in Listing.laboratories, since data.match_colours "
            "is set"
        )
    there = set(names) if kept is None else {names[i] for i in kept}
    if len(there) == 1:
        raise ValueError(
            f"{listing.origin}: all images that can be read are of the laboratory {there.pop()!r}; expected two or "
            "more, since data.match_colours brings each to the colours of all"
        )


def colours_of_all(images: np.ndarray, labels: np.ndarray, laboratories: Sequence[str]) -> dict[str, ColourMap]:
    """Each laboratory's map to the colours of all, of images uint8 [n, s, s, 3] with labels [n] and laboratories [n].

    The target is the mean of the laboratories' quantiles in the logarithm, in which a gain and a power are a straight
    line, so that laboratories that differ by a gain alone get one. All laboratories count alike. Labels only serve to
    warn of laboratories whose classes differ, for then their colours do, too.
    """
    names = np.array(laboratories)
    own = {}
    for name in dict.fromkeys(laboratories):
        rows = np.flatnonzero(names == name)
        _warn(name, labels[rows], labels)
        some = rows[evenly(len(rows), _MEASURED)]
        own[name] = quantiles(colour_shares(images[some], np.zeros(len(some), np.int64), 1)[0])
    target = mean_quantiles(list(own.values()))
    maps = {name: to_quantiles(values, target) for name, values in own.items()}
    for name, one in maps.items():
        log.info("laboratory %s: colours are changed: %s", printable(name), one)
    return maps


def _warn(name: str, labels: np.ndarray, of_all: np.ndarray) -> None:
    k = int(of_all.max()) + 1
    here, there = (np.bincount(x, minlength=k) / len(x) for x in (labels, of_all))
    if len(labels) < _FEWEST:
        log.warning("laboratory %s has %d images; fewer than %d hardly tell its colours", printable(name), len(labels),
                    _FEWEST)  # fmt: skip
    if (apart := float(np.abs(here - there).sum()) / 2) > _APART:
        log.warning(
            "laboratory %s: %.0f %% of its images would need another class to have the classes of all laboratories; "
            "data.match_colours takes colours of classes for those of the laboratory", printable(name), 100 * apart,
        )  # fmt: skip
