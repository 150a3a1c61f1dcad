"""The bootstrap over images or over groups of them (patients, slides), and intervals by its deviation.

How often the intervals hold what they say: tests/analysis/evaluate/test_scores.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from bmjax.runs.confusion import balanced_accuracy, class_shares, macro_f1
from bmjax.runs.intervals import wilson_interval

_BLOCK = 250
"""Resamples at a time: 5 MB of weights for 5,000 images."""
DRAWS = 2000
_LEAST, _LEAST_DEVIATION = 1e-12, 1e-9

Scale = Literal["share", "signed", "log"]
"""What a figure lies between: 0 and 1, -1 and 1, or 0 and infinity."""


def resamples(n: int, r: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks float32 [n, <= r]: how often each of n images stands in a draw of n with replacement, r draws in all."""
    rng = np.random.default_rng(seed)
    for start in range(0, r, _BLOCK):
        b = min(_BLOCK, r - start)
        drawn = rng.integers(0, n, (b, n)) + np.arange(b)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n).T.astype(np.float32)


def group_resamples(groups: np.ndarray, r: int, seed: int) -> Iterator[np.ndarray]:
    """As `resamples`, of whole groups: blocks [n, <= r] by the group 0..g-1 of each image, groups [n]. Images of one
    patient or slide are alike, and what varies from sample to sample is which groups are in it."""
    for block in resamples(int(groups.max()) + 1, r, seed):
        yield block[groups]


def group_numbers(groups: Sequence[str]) -> np.ndarray:
    """The group 0..g-1 of each image, [n]; those without a name have one each."""
    names = [("group", name) if name else ("image", str(i)) for i, name in enumerate(groups)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], np.int64)


def normal_interval(
    value: float, drawn: np.ndarray, n: int, scale: Scale = "share", images: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a figure of n independent draws that is normal on a scale without bounds, logit or
    logarithm, with the deviation of the resamples [r] there; NaN where it can't be told, as of n < 2 or of groups that
    are all alike. `images`: how many the draws hold, where a draw is a group; 0: one each.

    Percentiles hold too little near a bound: docs/evaluation.md. A resample of n draws varies by n - 1 of them, so the
    deviation is that much larger and the interval Student's. Where no resample differs from a perfect score, nothing is
    known but that errors are rare: Wilson's interval of n in n. And of none in n for a score of 0.
    """
    known = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(known) or n < 2:
        return float("nan"), float("nan")
    from scipy.stats import t as student

    # What a logit can't tell from 0 or 1. A share of images is no nearer to them than half an image, others may be.
    edge = 0.5 / images if images else 0.5 / n**2
    every = np.array([value, *known])
    if scale != "log" and (every >= 1 - edge).all():
        return min(wilson_interval(n, n)[0], float(value)), 1.0
    if scale == "share" and (every <= edge).all():
        return 0.0, max(wilson_interval(0, n)[1], float(value))
    middle, *free = _free(every, edge, scale)
    deviation = float(np.std(free))
    if deviation < _LEAST_DEVIATION:  # too few images to vary, or groups that are all alike
        return float("nan"), float("nan")
    half = float(student.ppf(0.975, n - 1)) * np.sqrt(n / (n - 1)) * deviation
    low, high = (_bounded(middle + sign * half, scale) for sign in (-1, 1))
    return min(low, float(value)), max(high, float(value))


def _free(x: np.ndarray, edge: float, scale: Scale) -> np.ndarray:
    if scale == "log":
        return np.log(np.maximum(x, _LEAST))
    least = -1.0 if scale == "signed" else 0.0
    share = np.clip((x - least) / (1 - least), edge, 1 - edge)
    return np.log(share / (1 - share))


def _bounded(z: float, scale: Scale) -> float:
    if scale == "log":
        return float(np.exp(z))
    least = -1.0 if scale == "signed" else 0.0
    return float(least + (1 - least) / (1 + np.exp(-z)))


def share_of(top: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Numerators over denominators; NaN where there is nothing to be a share of."""
    return np.where(below > 0, top / np.maximum(below, 1), np.nan)


def images_told_by(labels: np.ndarray, predicted: np.ndarray, c: int) -> dict[str, np.ndarray]:
    """Which images, bool [n], each of class c's scores is a share of: so many groups are independent draws of it."""
    true, said = labels == c, predicted == c
    return {"sensitivity": true, "specificity": ~true, "precision": said, "f1": true | said}


def over_groups(
    metrics: dict[str, Any], labels: np.ndarray, predicted: np.ndarray, groups: Sequence[str]
) -> dict[str, Any]:
    """The figures of `classification_metrics` of labels [n] and predictions [n] with intervals about images of new
    groups, where some of `groups` [n] hold several images; else as they are. `intervals_groups` is their number. What
    one group alone tells may be anything: 0 to 1."""
    of_group = group_numbers(groups)
    if len(np.unique(of_group)) == len(labels) or not len(of_group):
        return metrics
    g, k = int(of_group.max()) + 1, len(metrics["confusion"])
    cells = np.zeros((g, k * k))
    np.add.at(cells, (of_group, labels * k + predicted), 1)
    drawn = np.concatenate([block.T @ cells for block in resamples(g, DRAWS, 0)]).reshape(-1, k, k)
    found = dict(metrics)
    figures = {"accuracy": np.trace(drawn, axis1=-2, axis2=-1) / drawn.sum((-2, -1)), "macro_f1": macro_f1(drawn)}
    figures["balanced_accuracy"] = balanced_accuracy(drawn)
    for name, values in figures.items():
        found |= _bounds(name, metrics[name], values, (g, len(labels)))
    shares = {name: share_of(*part) for name, part in class_shares(drawn).items()}
    per_class = []
    for c, one in enumerate(metrics["per_class"]):
        there, bounds = images_told_by(labels, predicted, c), {}
        for name, same in (("recall", "sensitivity"), ("precision", "precision"), ("f1", "f1")):
            draws = (len(np.unique(of_group[there[same]])), int(there[same].sum()))
            bounds |= _bounds(name, one[name], shares[same][:, c], draws)
        per_class.append(one | bounds)
    note = groups_note(np.bincount(labels, minlength=k), g)
    return found | {"per_class": per_class, "intervals_groups": g, "intervals_note": note}


def groups_note(true: np.ndarray, g: int) -> str:
    """What intervals over g groups are about, of so many images of each class, [k]."""
    absent = int((true == 0).sum())
    notes = [f"the intervals are about images of new groups, by a bootstrap over {g} of them"]
    notes += [f"{absent} of {len(true)} classes have no image, and are left out of the means"] if absent else []
    return "; ".join(notes)


def _bounds(name: str, value: float, drawn: np.ndarray, draws: tuple[int, int]) -> dict[str, float]:
    """draws: (groups, images in them)."""
    low, high = normal_interval(value, drawn, draws[0], images=draws[1])
    return {f"{name}_low": low, f"{name}_high": high} if np.isfinite(low) else {f"{name}_low": 0.0, f"{name}_high": 1.0}
