"""Statistics of classifiers compared on the same images over several seeds. NumPy in, plain numbers out.

`hits` is bool [s, n]: whether the run of seed s was right about image n. Images and runs are both samples: another test
set and another training would have given other figures. All variants see the same images, so an image's difficulty
cancels in a difference; runs of one seed share only the split and the order of the data, so their luck is taken to be
independent. docs/statistics.md has the method in ten sentences and how often it errs. Images are taken to be
independent; where several come from one slide, every interval here is too narrow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
FEWEST_SEEDS = 3  # below, the spread between runs is not known well enough for any verdict
FEWEST_FOLDS = 3
# Variance of the logarithm of the variants' luck that is assumed at least, however alike they look: with few seeds
# they look alike by chance. 0.5 says that luck of 2 points and of 1.2 points in one table is nothing unusual.
_LEAST_SPREAD = 0.5
# Share of the error that is spent: Satterthwaite's degrees of freedom are an approximation, which by simulation errs
# up to 1.15 times as often as it says where two to four variants have three seeds. The rest is a margin.
_SPENT = 0.8
_DRAWS = 20000


@dataclasses.dataclass(frozen=True)
class Spread:
    """What the variance of a difference is made of; with s seeds and n images: images/n + runs/s + rest/(s n).

    `images` is how far images differ in the difference itself, `runs` the luck of both variants' runs, `rest` what
    is neither. runs_df: degrees of freedom of the luck; alpha: the error left to one comparison of the family.
    """

    images: float
    runs: float
    rest: float
    runs_df: float
    alpha: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant: mean accuracy over seeds with its interval, and against the baseline (None for the baseline
    itself) the difference with its simultaneous interval, the p-value of this comparison alone and corrected for
    the family, and `shown`, whether the interval leaves out zero. With too few seeds only the difference is given."""

    variant: str
    accuracy: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_corrected: float | None = None
    shown: bool | None = None
    spread: Spread | None = None

    @property
    def p_holm(self) -> float | None:
        """`p_corrected`, under the name it had when the correction was Holm's; scripts still read it."""
        return self.p_corrected


class _Luck(NamedTuple):
    """Spread between the runs of each variant: `total` [v], the variance of a run's accuracy; `rest` [v], the part of
    a single answer that is neither the image's nor the run's; df of each total, and of all together."""

    total: np.ndarray
    rest: np.ndarray
    df: float
    all_df: float


def moderated(variances: np.ndarray, df: int) -> tuple[np.ndarray, float]:
    """(variances [v] drawn toward their mean, degrees of freedom of each), as far as they look alike.

    Empirical Bayes (Smyth 2004, limma, https://doi.org/10.2202/1544-6115.1027): the variants' true variances are taken
    from a scaled inverse chi-square, whose degrees of freedom come from the spread of the observed logarithms. No more
    are claimed than all variants have together, and none where there is one variant only.
    """
    from scipy.special import digamma, polygamma

    v = len(variances)
    mean = variances.mean()
    if v == 1 or mean == 0:
        return variances, float(df * v)
    logs = np.log(np.maximum(variances, 0.02 * mean)) - digamma(df / 2) + np.log(df / 2)
    excess = max(float(logs.var(ddof=1) - polygamma(1, df / 2)), _LEAST_SPREAD)
    half = 1 / excess  # of the prior's degrees of freedom; solves polygamma(1, half) = excess by Newton's method
    for _ in range(8):
        trigamma = polygamma(1, half)
        half = max(float(half + trigamma * (1 - trigamma / excess) / polygamma(2, half)), 0.01)
    prior = 2 * half
    return (prior * mean + df * variances) / (prior + df), min(prior + df, float(v * df))


def _luck(hits: np.ndarray) -> _Luck:
    """Of hits bool [v, s, n], s >= 2, n >= 2."""
    v, s, n = hits.shape
    of_run, of_image = hits.mean(2), hits.sum(1, dtype=np.int32) / s
    mean = of_run.mean(1)
    squares = n * s * (mean + mean**2) - n * (of_run**2).sum(1) - s * (of_image**2).sum(1)  # two-way residual
    total, df = moderated(of_run.var(1, ddof=1), s - 1)
    return _Luck(total, np.maximum(squares, 0) / ((s - 1) * (n - 1)), df, float(v * (s - 1)))


@functools.lru_cache(maxsize=4)
def _normal_draws(m: int) -> np.ndarray:
    return np.ascontiguousarray(np.random.default_rng(0).standard_normal((_DRAWS, m)).T)  # so that maxima are fast


def largest_of_family(correlation: np.ndarray) -> np.ndarray:
    """Draws of the largest of |z_1| ... |z_m|, normal with this correlation [m, m] (Dunnett 1955)."""
    values, vectors = np.linalg.eigh(correlation)  # a correlation of estimates may be slightly indefinite
    root = vectors * np.sqrt(np.maximum(values, 0))
    root /= np.sqrt((root**2).sum(1, keepdims=True))
    z = root @ _normal_draws(len(correlation))
    return np.abs(z, out=z).max(0)


def _corrected(p: np.ndarray, correlation: np.ndarray, error: float) -> tuple[np.ndarray, float]:
    """(p-values [m] corrected for the family, the p that one comparison may have at this family-wise error).

    By the joint distribution of the family; Bonferroni's where that is smaller or too far out to be simulated.
    """
    from scipy.stats import norm

    m, error = len(p), _SPENT * error
    if m == 1:
        return np.minimum(p / _SPENT, 1.0), error
    largest = largest_of_family(correlation)
    beyond = (largest >= norm.isf(p / 2)[:, None]).sum(1)
    corrected = np.where(beyond < 50, m * p, np.minimum(m * p, beyond / _DRAWS))
    place = _DRAWS - round(error * _DRAWS)
    alpha = 2 * float(norm.sf(np.partition(largest, place)[place]))
    return np.minimum(corrected / _SPENT, 1.0), max(alpha, error / m)


def _accuracy_interval(own: np.ndarray, luck: float, rest: float, df: float, level: float) -> tuple[float, float]:
    """Interval of the mean accuracy of own [s, n]: Wilson's score interval (Wilson 1927) at the number of images that
    would give the same variance, with Student's t. One seed: of the images alone."""
    from scipy.stats import t as student

    s, n = own.shape
    mean, effective, freedom = float(own.mean()), float(n), float(max(n - 1, 1))
    if s > 1 and n > 1 and 0 < mean < 1:
        images = float(own.mean(0).var(ddof=1)) / n
        variance = max(images, images + luck / s - rest / (s * n))
        if variance > 0:
            effective = mean * (1 - mean) / variance
            freedom = variance**2 / ((luck / s) ** 2 / df + images**2 / (n - 1))
    z2 = float(student.isf((1 - level) / 2, max(freedom, 1.0))) ** 2 / effective
    middle = (mean + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * mean * (1 - mean) + z2 * z2 / 4) / (1 + z2)
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))


def _against(hits: np.ndarray, luck: _Luck, place: int, level: float) -> dict[int, dict[str, object]]:
    """Fields of `Row` by the place of each variant but the baseline's."""
    from scipy.stats import t as student

    v, s, n = hits.shape
    others = np.array([i for i in range(v) if i != place])
    of_image = hits.sum(1, dtype=np.int32) / s
    paired = of_image[others] - of_image[place]
    difference = paired.mean(1)
    covariance = np.cov(paired).reshape(v - 1, v - 1) / n
    images = np.diag(covariance)
    both, rest = luck.total[others] + luck.total[place], luck.rest[others] + luck.rest[place]
    # Never below the images' part, which holds the rest already: the luck found may be below zero by chance.
    variance = np.maximum(images, images + both / s - rest / (s * n))
    variance = np.where(variance > 0, variance, 1 / n**2)  # all images alike: one image's worth is not known better
    both_df = np.full(v - 1, luck.all_df)
    squares = luck.total[others] ** 2 + luck.total[place] ** 2
    np.divide(both**2, squares, out=both_df, where=squares > 0)
    both_df = np.minimum(both_df * luck.df, luck.all_df)  # Satterthwaite's
    df = variance**2 / np.maximum((both / s) ** 2 / both_df + images**2 / (n - 1), 1e-300)
    df = np.clip(df, 1.0, 1e9)
    error = np.sqrt(variance)
    shared = covariance + max(0.0, luck.total[place] - luck.rest[place] / n) / s
    correlation = np.clip(shared / np.outer(error, error), -0.99, 0.99)
    np.fill_diagonal(correlation, 1.0)
    p = 2 * student.sf(np.abs(difference) / error, df)
    corrected, alpha = _corrected(p, correlation, 1 - level)
    half = student.isf(alpha / 2, df) * error
    found: dict[int, dict[str, object]] = {}
    for j, i in enumerate(others):
        low, high = float(difference[j] - half[j]), float(difference[j] + half[j])
        spread = Spread(
            images=max(0.0, float(n * images[j] - rest[j] / s)),
            runs=max(0.0, float(both[j] - rest[j] / n)),
            rest=float(rest[j]),
            runs_df=float(both_df[j]),
            alpha=alpha,
        )
        found[int(i)] = {
            "difference_low": low,
            "difference_high": high,
            "p": float(p[j]),
            "p_corrected": float(corrected[j]),
            "shown": low > 0 or high < 0,
            "spread": spread,
        }
    return found


def _against_in_folds(hits: np.ndarray, folds: np.ndarray, place: int, level: float) -> dict[int, dict[str, object]]:
    """As `_against`, of images [n] each tested in one fold, by the spread between folds alone.

    Folds share training images, so a mean over them is less certain than their spread says: its variance is that of
    the corrected resampled t (Nadeau and Bengio 2003). Each variant's own spread is what is left of its accuracies by
    fold when the variant's and the fold's mean are taken away; it is drawn toward the mean of all, as luck is.
    """
    from scipy.stats import t as student

    v, s, n = hits.shape
    each = np.unique(folds)
    k = len(each)
    of_fold = np.stack([hits[:, :, folds == fold].mean((1, 2)) for fold in each], 1)
    left = of_fold - of_fold.mean(0)
    own = ((left - left.mean(1, keepdims=True)) ** 2).sum(1) / (k - 1) * v / (v - 1)
    all_df = float((v - 1) * (k - 1))
    own, df = moderated(own, k - 1)
    factor = 1 / k + 1 / (k - 1)  # test images for each training image
    others = np.array([i for i in range(v) if i != place])
    means = hits.mean((1, 2))
    difference = means[others] - means[place]
    both = own[others] + own[place]
    both = np.where(both > 0, both, 1 / n**2)
    dfs = np.minimum(both**2 / np.maximum(own[others] ** 2 + own[place] ** 2, 1e-300) * min(df, all_df), all_df)
    error = np.sqrt(both * factor)
    correlation = np.clip(own[place] / np.sqrt(np.outer(both, both)), 0, 0.99)
    np.fill_diagonal(correlation, 1.0)
    found: dict[int, dict[str, object]] = {}
    p = 2 * student.sf(np.abs(difference) / error, dfs)
    corrected, alpha = _corrected(p, correlation, 1 - level)
    half = student.isf(alpha / 2, dfs) * error
    for j, i in enumerate(others):
        low, high = float(difference[j] - half[j]), float(difference[j] + half[j])
        # All of it counts as luck of the runs, so that `detectable` of as many seeds gives this design's.
        spread = Spread(images=0.0, runs=float(s * error[j] ** 2), rest=0.0, runs_df=float(dfs[j]), alpha=alpha)
        found[int(i)] = {
            "difference_low": low, "difference_high": high, "p": float(p[j]), "p_corrected": float(corrected[j]),
            "shown": low > 0 or high < 0, "spread": spread,
        }  # fmt: skip
    return found


def compare(
    hits: Mapping[str, np.ndarray], baseline: str, *, level: float = LEVEL, folds: np.ndarray | None = None
) -> list[Row]:
    """A row for each variant, in order, of hits bool [s, n] with the same seeds and images in the same order.

    The intervals of all differences hold together at `level`, and a difference is shown exactly where its own leaves
    out zero: in a table of equal variants any difference is claimed in at most 1 - level of cases. With fewer than
    `FEWEST_SEEDS` seeds there is no interval of a difference and no verdict.

    `folds` int [n]: the fold in which each image was tested, where a seed is a run for each fold. Verdicts then rest
    on the spread between folds, at least three, and one seed is enough; images of one group are in one fold, so that
    they need not be independent.

    Raises:
      ValueError: the baseline is not among the variants, the shapes differ, or there is no image; names them.
    """
    if baseline not in hits:
        raise ValueError(f"baseline {baseline!r} is none of the variants: {', '.join(hits)}")
    shapes = {name: h.shape for name, h in hits.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"seeds and images differ between variants: {shapes}; expected the same")
    stacked = np.stack([np.asarray(h, bool) for h in hits.values()])
    v, s, n = stacked.shape
    if not s or not n:
        raise ValueError(f"hits are {s} seeds of {n} images; expected at least one of each")
    place = list(hits).index(baseline)
    known = s > 1 and n > 1
    luck = _luck(stacked) if known else _Luck(np.zeros(v), np.zeros(v), 1.0, 1.0)
    if folds is not None:
        enough = v > 1 and len(np.unique(folds)) >= FEWEST_FOLDS
        against = _against_in_folds(stacked, folds, place, level) if enough else {}
    else:
        against = _against(stacked, luck, place, level) if s >= FEWEST_SEEDS and n > 1 and v > 1 else {}
    means = stacked.mean((1, 2))
    rows = []
    for i, name in enumerate(hits):
        low, high = _accuracy_interval(stacked[i], luck.total[i], luck.rest[i], luck.df, level)
        row = Row(name, float(means[i]), low, high, None if i == place else float(means[i] - means[place]))
        rows.append(dataclasses.replace(row, **against.get(i, {})))  # type: ignore[arg-type]
    return rows


def told_apart(hits: Mapping[str, np.ndarray], folds: np.ndarray | None = None) -> tuple[tuple[str, str], ...] | None:
    """Pairs of variants whose difference can be shown, all pairs together held to 1 - `LEVEL`; None where there are
    too few seeds or folds for any verdict.

    Each variant in turn is the baseline of those after it, with its share of the error (Bonferroni over baselines).
    """
    names, found = list(hits), []
    for i, first in enumerate(names[:-1]):
        rows = compare(hits, first, level=1 - (1 - LEVEL) / (len(names) - 1), folds=folds)
        if rows[i + 1].shown is None:
            return None
        found += [(first, row.variant) for row in rows[i + 1 :] if row.shown]
    return tuple(found)


def corrected_resampled_t(differences: np.ndarray, test_share: float) -> float:
    """p-value of the mean of differences [f], one a fold, of any number of repetitions of a cross-validation.

    The folds' trainings share images, so their mean is less certain than their spread says. test_share: test images
    for each training image, 1 / (k - 1) for k folds; 0 would be Student's t, which takes the folds as independent.
    One comparison, not corrected for others. Nadeau and Bengio 2003, https://doi.org/10.1023/A:1024068626366.

    Raises:
      ValueError: fewer than two differences.
    """
    from scipy.stats import t as student

    f = len(differences)
    if f < 2:
        raise ValueError(f"{f} differences; expected at least two folds")
    mean, error = float(np.mean(differences)), float(np.sqrt(np.var(differences, ddof=1) * (1 / f + test_share)))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * student.sf(abs(mean) / error, f - 1))


def corrected_resampled_interval(
    values: Sequence[float], test_share: float, level: float = LEVEL
) -> tuple[float, float]:
    """Interval of the mean of a figure over folds, values [f], by the variance of `corrected_resampled_t`.

    It is about training sets of a fold's size. Raises a ValueError for fewer than two values.
    """
    from scipy.stats import t as student

    f = len(values)
    if f < 2:
        raise ValueError(f"{f} values; expected at least two folds")
    half = student.isf((1 - level) / 2, f - 1) * np.sqrt(np.var(values, ddof=1) * (1 / f + test_share))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def verdict(row: Row, baseline: str, n: int, seeds: int, folds: int = 0) -> str:
    """What a row says, in words."""
    many = f"{seeds} seed" + "s" * (seeds != 1) + (f" in each of {folds} folds" if folds else "")
    if row.difference is None or row.shown is None:
        if n < 2 <= FEWEST_SEEDS <= seeds:
            return f"{row.variant}: no verdict on one image"
        return f"{row.variant}: no verdict with {many}; at least {FEWEST_SEEDS} are needed to know the luck of a run"
    if not row.shown:
        return f"{row.variant}: no difference to {baseline} can be shown with this n ({n} images, {many})"
    word = "better" if row.difference > 0 else "worse"
    return f"{row.variant}: {word} than {baseline} by {100 * abs(row.difference):.1f} points"
