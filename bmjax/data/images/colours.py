"""Another laboratory's colours, brought to those of training or of all laboratories: one map for all of its images.

A lamp and a white balance multiply what a camera sees, and a camera's gamma is a power of it; in the logarithm of a
value both are a straight line. So each channel has a gain and a power of its own, by which its values get the quantiles
of the training cells'. An image's own colour stays, unlike with `data.stain`, which brings each image to a reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_LEVELS = np.linspace(0.05, 0.95, 19)
"""Quantiles that the line is fitted by. Those that are black or white are left out: what was cut off is not there."""
_FEWEST, _BLACK, _WHITE = 5, 2, 253
_OFFSET = 2.0  # to values before the logarithm, so that the darkest count little
_POWERS, _LEAST_SPREAD = (0.5, 2.0), 10
"""No power goes beyond these, and it is 1 where fewer quantiles are left or they lie within so many grey levels, as of
nearly empty images."""


def colour_shares(images: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """How often each value comes in each channel, as a share, in the images of each class: float32 [k, 3, 256], of
    images uint8 [n, s, s, 3] and labels [n]; 0 for a class without an image."""
    found = np.zeros((k, 3, 256))
    for image, label in zip(images, labels, strict=True):
        for c in range(3):
            found[label, c] += np.bincount(image[..., c].ravel(), minlength=256)
    return (found / np.maximum(found.sum(-1, keepdims=True), 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ColourMap:
    """Each channel's values v become gain (v + 2)^power - 2."""

    gains: tuple[float, ...]
    powers: tuple[float, ...]

    @property
    def tables(self) -> np.ndarray:
        """What each value becomes: uint8 [3, 256]."""
        values = np.arange(256) + _OFFSET
        lines = [gain * values**power - _OFFSET for gain, power in zip(self.gains, self.powers, strict=True)]
        return np.clip(np.round(lines), 0, 255).astype(np.uint8)

    def __str__(self) -> str:
        channels = zip(("red", "green", "blue"), self.tables[:, 128].tolist(), self.powers, strict=True)
        return "128 becomes " + ", ".join(f"{name} {value} (power {power:.2f})" for name, value, power in channels)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 RGB [..., 3] -> the same mapped."""
        found = np.empty(images.shape, np.uint8)
        for c, table in enumerate(self.tables):
            found[..., c] = table[images[..., c]]
        return found


def match_colours(here: np.ndarray, training: np.ndarray) -> ColourMap:
    """The map that gives values of the shares [3, 256] the quantiles of those of training, [3, 256]."""
    return to_quantiles(quantiles(here), quantiles(training))


def quantiles(shares: np.ndarray) -> np.ndarray:
    """Those of each channel that maps are fitted by, [3, levels], of values 0..255 that come with shares [3, 256]."""
    return np.stack([_quantiles(own) for own in shares])


def mean_quantiles(each: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of several quantiles [3, levels] in the logarithm: maps to it have gains and powers about 1 in the
    mean."""
    return np.exp(np.log(np.stack(each) + _OFFSET).mean(0)) - _OFFSET


def to_quantiles(here: np.ndarray, target: np.ndarray) -> ColourMap:
    """The map that gives values of some quantiles [3, levels] those of a target."""
    gains, powers = [], []
    for x, y in zip(here, target, strict=True):
        inside = (np.minimum(x, y) > _BLACK) & (np.maximum(x, y) < _WHITE)
        x, y = x[inside], y[inside]
        power = 1.0
        a, b = np.log(x + _OFFSET), np.log(y + _OFFSET)
        if len(x) >= _FEWEST and np.ptp(x) > _LEAST_SPREAD:
            power = float(np.clip(((a - a.mean()) * b).sum() / ((a - a.mean()) ** 2).sum(), *_POWERS))
        powers.append(power)
        gains.append(float(np.exp((b - power * a).mean())) if len(x) else 1.0)
    return ColourMap(tuple(gains), tuple(powers))


def _quantiles(shares: np.ndarray) -> np.ndarray:
    """Those of `_LEVELS`, of values 0..255 that come with shares [256]; a value stands for all within half of it."""
    upto = np.cumsum(shares, dtype=np.float64)
    levels = _LEVELS * upto[-1]
    at = np.searchsorted(upto, levels)
    return at + 0.5 - (upto[at] - levels) / shares[at]
