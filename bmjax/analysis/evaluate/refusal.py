"""When to say "don't know": a threshold for a wanted error rate, and sets that hold the true class.

Both guarantees are for finite samples and assume only that new images come as those of validation did; neither needs
the probabilities to be right. They do not hold for another laboratory's images, or for classes never seen.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

UNSURE = "don't know"
FAILURE = 0.1
"""Share of validation sets from which a threshold may come that answers too much."""
_STEP = 0.02
"""Shares of the images that are answered are tried in these steps, from each of _STARTS on."""
_STARTS = (0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What validation says of a wanted error `rate`, by n images.

    `threshold`: images of at least this confidence are answered, and wrong in at most `rate` of cases, with probability
    0.9 over validation sets; infinite where no threshold is known to do so. `set_bound`: classes of at least this
    probability, and the likeliest, make a set that holds the true class in at least 1 - rate of cases. `answered` and
    `wrong`: shares of these n images answered, and of those answered wrongly.
    """

    rate: float
    threshold: float
    set_bound: float
    n: int
    answered: float
    wrong: float


def error_threshold(confidence: np.ndarray, right: np.ndarray, rate: float, failure: float = FAILURE) -> float:
    """The least threshold of confidence [n] above which at most `rate` of answers are wrong, known with probability
    1 - failure; infinite where there is none.

    The threshold at which a share of the images is answered is tested by the binomial distribution of its errors. Tests
    go from several fixed shares up, each until it fails first, and divide the failure among them, so that the error
    holds for all together: "Learn then test", Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052, with fixed
    sequences. Exact where errors become rarer as confidence rises.
    """
    from scipy.stats import binom

    n, falling = len(confidence), -np.sort(-confidence)
    best, steps = math.inf, round(1 / _STEP)
    for start in _STARTS:
        for step in range(round(start / _STEP), steps + 1):
            threshold = float(falling[max(math.ceil(step * n / steps), 1) - 1])
            answered = confidence >= threshold
            wrong = int((answered & ~right).sum())
            if binom.cdf(wrong, int(answered.sum()), rate) > failure / len(_STARTS):
                break
            best = min(best, threshold)
    return best


def set_bound(labels: np.ndarray, probs: np.ndarray, rate: float) -> float:
    """The probability that a class needs to be in a prediction set: 1 minus the conformal quantile of 1 - p of the true
    class (Sadinle et al. 2019, https://arxiv.org/abs/1609.00451); 0, every class, where there are too few images."""
    n = len(labels)
    place = math.ceil((n + 1) * (1 - rate))
    if place > n:
        return 0.0
    own = np.sort(probs[np.arange(n), labels])[::-1]
    return float(own[place - 1])


def sets_of(probs: np.ndarray, bound: float) -> np.ndarray:
    """Which classes are in each image's set, bool [n, k], of probabilities [n, k]: those of at least the bound, and the
    likeliest, so that no set is empty."""
    return (probs >= bound) | (np.arange(probs.shape[1]) == probs.argmax(1)[:, None])


def fit_refusal(labels: np.ndarray, probs: np.ndarray, rate: float, answerable: np.ndarray | None = None) -> Refusal:
    """`Refusal` by labels [n] and probabilities [n, k] of images that the network was not trained on. Sets are of all;
    the threshold is of `answerable` ones, bool [n], where others are refused whatever their confidence."""
    keep = np.ones(len(labels), bool) if answerable is None else answerable
    confidence, right = probs[keep].max(-1), probs[keep].argmax(-1) == labels[keep]
    threshold = error_threshold(confidence, right, rate) if keep.any() else math.inf
    answers = confidence >= threshold
    wrong = float((~right)[answers].mean()) if answers.any() else 0.0
    share = float(answers.mean()) if keep.any() else 0.0
    return Refusal(rate, threshold, set_bound(labels, probs, rate), int(keep.sum()), share, wrong)


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(shares answered [m], shares of those that are wrong [m], mean of the latter): answering the surest first.

    Images of equal confidence are answered together. Geifman and El-Yaniv 2017, https://arxiv.org/abs/1705.08500.
    """
    order = np.argsort(-confidence, kind="stable")
    falling, wrong = confidence[order], np.cumsum(~right[order])
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    risk = wrong[last] / (last + 1)
    each = np.repeat(risk, np.diff(last, prepend=-1))
    return (last + 1) / len(confidence), risk, float(each.mean())


def answers(probs: np.ndarray, classes: tuple[str, ...], refusal: Refusal) -> tuple[list[str | None], list[str | None]]:
    """(the answer of each image, its class or UNSURE; its set, classes joined by `|`, likeliest first), of
    probabilities [n, k]; None where they are no numbers."""
    named: list[str | None] = []
    sets: list[str | None] = []
    for row, inside in zip(probs, sets_of(probs, refusal.set_bound), strict=True):
        if not np.isfinite(row).all():
            named.append(None)
            sets.append(None)
            continue
        order = np.argsort(-row, kind="stable")
        named.append(classes[order[0]] if row[order[0]] >= refusal.threshold else UNSURE)
        sets.append("|".join(classes[c] for c in order if inside[c]))
    return named, sets


def without_guarantee(
    matched: bool, adapt: bool, prior: bool, *, elsewhere: bool = False, unmatched: bool = False
) -> str:
    """Why a threshold or a set promises nothing here; "" where it does. `unmatched`: the images are in colours of their
    own, and those of validation were not."""
    parts = (("the colours", matched), ("the norms", adapt), ("the frequencies", prior))
    changed = [name for name, is_so in parts if is_so]
    why = [f"{' and '.join(changed)} were adapted after the thresholds were set on validation"] if changed else []
    why += ["these images are in colours of their own, and those of validation were matched"] if unmatched else []
    why += ["these images did not come as those of validation did"] if elsewhere else []
    return f"threshold and sets promise nothing here: {'; '.join(why)}" if why else ""
