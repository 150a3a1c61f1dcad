"""How many seeds or images a difference needs, and a design that stops once it is shown. NumPy in, plain numbers out.

Everything here goes on from a table of `comparison.compare`, whose rows say what the variance of a difference is made
of. Such forecasts are themselves estimates: with three seeds the luck they start from may be off by a factor of two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from bmjax.analysis.compare.statistics import FEWEST_SEEDS, LEVEL, Row, Spread, compare, largest_of_family

POWER = 0.8
_MOST = 10_000_000
_SPENT = 0.7  # of each look's error


def standard_error(spread: Spread, seeds: float, n: float) -> float:
    """Of a difference, with so many seeds and images."""
    return float(np.sqrt(spread.images / n + spread.runs / seeds + spread.rest / (seeds * n)))


def detectable(spread: Spread, seeds: int, n: int, *, measured: int | None = None, power: float = POWER) -> float:
    """The true difference that so many seeds and images show with this power; 0.02 is two points.

    `measured`: the number of seeds `spread` comes from, by default `seeds`; with more seeds the luck is known better.
    """
    from scipy.special import chdtri, nctdtrinc
    from scipy.stats import t as student

    measured = measured or seeds
    # The luck found is below the true one more often than above: its median is put right (chi-square's).
    luck = spread.runs * spread.runs_df / chdtri(spread.runs_df, 0.5)
    runs = (luck + spread.rest / n) / seeds
    images = (spread.images + spread.rest / seeds) / n
    variance = spread.images / n + luck / seeds + spread.rest / (seeds * n)
    runs_df = max(spread.runs_df * max(seeds - 1, 1) / max(measured - 1, 1), 1.0)
    df = max(variance**2 / max(runs**2 / runs_df + images**2 / max(n - 1, 1), 1e-300), 1.0)
    beyond = float(student.isf(spread.alpha / 2, df))
    away = nctdtrinc(df, 1 - power, beyond)  # in standard errors, by the non-central t distribution
    if not np.isfinite(away):  # where its routine gives up, far out
        away = beyond + student.ppf(power, df)
    return float(away * np.sqrt(variance))


def _fewest(enough, at_least: int) -> int | None:
    """The smallest count from `at_least` on that is enough, by doubling and halving; None where none is."""
    low, high = at_least, at_least
    while not enough(high):
        low, high = high + 1, 2 * high
        if high > _MOST:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def seeds_needed(spread: Spread, seeds: int, n: int, wanted: float, *, power: float = POWER) -> int | None:
    """Seeds in all, at least three, for a true difference `wanted` to be shown on these n images; None where no
    number is enough, since the images alone leave too much open."""
    return _fewest(lambda s: detectable(spread, s, n, measured=seeds, power=power) <= wanted, FEWEST_SEEDS)


def images_needed(spread: Spread, seeds: int, n: int, wanted: float, *, power: float = POWER) -> int | None:
    """Test images in all for a true difference `wanted` to be shown with these seeds; None where no number is enough,
    since the luck of the runs alone leaves too much open."""
    del n  # the spread is that of one image already
    return _fewest(lambda images: detectable(spread, seeds, images, power=power) <= wanted, 10)


def need(row: Row, seeds: int, n: int, wanted: float | None = None) -> str:
    """In words: what this design can show of a row's variant, and what a wanted difference needs."""
    if row.spread is None:
        return f"{row.variant}: at least {FEWEST_SEEDS} seeds are needed before anything can be said"
    text = f"{row.variant}: this design shows {100 * detectable(row.spread, seeds, n):.1f} points with 80 % power"
    if wanted is None:
        return text
    more = seeds_needed(row.spread, seeds, n, wanted), images_needed(row.spread, seeds, n, wanted)
    if (more[0] is not None and more[0] <= seeds) or (more[1] is not None and more[1] <= n):
        return f"{text}; {100 * wanted:.1f} points need no more"
    by_seeds = f"{more[0]} seeds" if more[0] is not None else "more than seeds can give"
    by_images = f"{more[1]:,} images" if more[1] is not None else "more than images can give"
    return f"{text}; {100 * wanted:.1f} points need {by_seeds} on these images, or {by_images} with these seeds"


def looks(max_seeds: int, first: int = FEWEST_SEEDS) -> tuple[int, ...]:
    """Numbers of seeds after which a sequential comparison looks at its table: each about a third more than the last.

    Raises:
      ValueError: fewer seeds than the first look has, or a first look at fewer than three.
    """
    if first < FEWEST_SEEDS or max_seeds < first:
        raise ValueError(f"looks from {first} to {max_seeds} seeds; expected at least {FEWEST_SEEDS}, and no fewer")
    found = [first]
    while found[-1] < max_seeds:
        found.append(min(max(found[-1] + 1, round(found[-1] * 1.35)), max_seeds))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def look_level(at: tuple[int, ...], comparisons: int, level: float = LEVEL) -> float:
    """The level each look's simultaneous intervals need, for all intervals of all looks to hold together at `level`.

    Equal at each look (Pocock 1977), and 0.7 of that error: the first looks' few degrees of freedom are an
    approximation, which matters more the smaller the error (by simulation 6 instead of 5 % of two variants). The
    looks' statistics are taken to be normal and correlated as those of a mean over seeds, sqrt(s_1 / s_2); the images
    they share correlate them further, which errs on the safe side. The variants are taken to be correlated by the
    baseline they share (0.5).
    """
    if len(at) == 1:
        return level
    seeds = np.array(at, float)
    between = np.sqrt(np.minimum.outer(seeds, seeds) / np.maximum.outer(seeds, seeds))
    family = np.full((comparisons, comparisons), 0.5) + 0.5 * np.eye(comparisons)
    one = np.sort(largest_of_family(family))
    roots = np.linalg.cholesky(between), np.linalg.cholesky(family)
    rng, smallest = np.random.default_rng(0), []
    for _ in range(20):  # a block at a time, for memory
        z = np.einsum("kl,rlm,wm->rkw", roots[0], rng.standard_normal((2000, len(at), comparisons)), roots[1])
        beyond = 1 - np.searchsorted(one, np.abs(z).max(2)) / len(one)
        smallest.append(beyond.min(1))
    return 1 - _SPENT * float(np.quantile(np.concatenate(smallest), 1 - level))


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a sequential comparison stands: rows as of the look that decided them (else the newest), the variants
    whose difference is shown or excluded with the seeds they took, and the number of seeds at which to look next
    (None: it ends here)."""

    rows: tuple[Row, ...]
    shown: dict[str, int]
    excluded: dict[str, int]
    next_look: int | None


def until_shown(
    hits: Mapping[str, np.ndarray], baseline: str, wanted: float, at: Sequence[int], *, level: float = LEVEL
) -> Progress:
    """Where a comparison stands that goes on until each variant's difference is shown or is less than `wanted`.

    `hits` bool [s, n] of the seeds so far, in the order they were trained in; `at`: all planned looks, as `looks`
    gives them, planned before the first. Looks are computed again from the hits, so nothing else has to be kept.

    Raises:
      ValueError: as `compare`; or the number of seeds is none of the looks.
    """
    at, seeds = tuple(at), len(hits[baseline])
    if seeds not in at:
        raise ValueError(f"{seeds} seeds; expected one of the planned looks: {', '.join(map(str, at))}")
    each = look_level(at, max(len(hits) - 1, 1), level)
    decided: dict[str, Row] = {}
    shown: dict[str, int] = {}
    excluded: dict[str, int] = {}
    rows: list[Row] = []
    for look in at[: at.index(seeds) + 1]:
        rows = compare({name: h[:look] for name, h in hits.items()}, baseline, level=each)
        for row in rows:
            if row.shown is None or row.variant in decided:
                continue
            bounds = row.difference_low, row.difference_high
            small = all(bound is not None and abs(bound) < wanted for bound in bounds)
            if row.shown or small:
                decided[row.variant] = row
                (shown if row.shown else excluded)[row.variant] = look
    left = len(decided) < len(hits) - 1
    follow = at[at.index(seeds) + 1] if left and seeds < at[-1] else None
    return Progress(tuple(decided.get(r.variant, r) for r in rows), shown, excluded, follow)
