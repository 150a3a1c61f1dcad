"""Statistics of classifiers compared on the same images over several seeds. NumPy in, plain numbers out.

`hits` is bool [s, n]: whether the run of seed s was right about image n. Images and seeds are both samples: another
test set and another seed would have given other figures. Images are taken to be independent; where several come from
one slide, every interval here is too narrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant: mean accuracy over seeds, and against the baseline (None for the baseline itself) the difference,
    images decided for and against it, and the exact p-value, plain and corrected. `shown`: a difference is."""

    variant: str
    accuracy: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    better: int | None = None
    worse: int | None = None
    p: float | None = None
    p_holm: float | None = None
    shown: bool | None = None


def crossed_bootstrap(
    values: np.ndarray, *, seed: int = 0, resamples: int = 10000, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of the mean of values [s, n], over seeds and images drawn anew, each with replacement.

    Rows and columns are drawn independently (the pigeonhole bootstrap, Owen 2007, https://arxiv.org/abs/0712.1111):
    conservative for the part that is neither the image's nor the seed's. The spread between s seeds it understates by
    (s - 1) / s, as bootstraps do; with one seed it is the bootstrap over images.
    """
    s, n = values.shape
    rng = np.random.default_rng(seed)
    values = values.astype(np.float64)
    means = []
    for start in range(0, resamples, 500):  # a block at a time: the counts of all resamples may not fit in memory
        r = min(500, resamples - start)
        seeds, images = rng.multinomial(s, np.full(s, 1 / s), r), rng.multinomial(n, np.full(n, 1 / n), r)
        means.append(((seeds @ values) * images).sum(1) / (s * n))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def decided(hits: np.ndarray, baseline: np.ndarray) -> tuple[int, int]:
    """(images right for more seeds than the baseline was, images right for fewer), of hits bool [s, n] each.

    However many seeds there are, an image counts once: its runs are no independent trials. With one seed these are
    the two off-diagonal counts of McNemar's table.
    """
    score = hits.sum(0, dtype=int) - baseline.sum(0, dtype=int)
    return int((score > 0).sum()), int((score < 0).sum())


def mcnemar_exact(better: int, worse: int) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar 1947): a binomial of better + worse with one half."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the same order (Holm 1979): the family-wise error stays below alpha."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        running = max(running, (len(p) - rank) * p[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def compare(hits: Mapping[str, np.ndarray], baseline: str, *, seed: int = 0) -> list[Row]:
    """A row for each variant, in order, of hits bool [s, n] with the same seeds and images in the same order.

    A difference is shown where both agree at 95 %: the corrected exact test, which takes the trained networks as
    they are, and the interval over images and seeds, which does not.

    Raises:
      ValueError: the baseline is not among the variants, or the shapes differ; names them.
    """
    if baseline not in hits:
        raise ValueError(f"baseline {baseline!r} is none of the variants: {', '.join(hits)}")
    shapes = {name: h.shape for name, h in hits.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"seeds and images differ between variants: {shapes}; expected the same")
    others = [name for name in hits if name != baseline]
    counts = {name: decided(hits[name], hits[baseline]) for name in others}
    p = {name: mcnemar_exact(*counts[name]) for name in others}
    p_holm = dict(zip(others, holm([p[name] for name in others]), strict=True))
    rows = []
    for name, own in hits.items():
        row = Row(name, float(own.mean()), *crossed_bootstrap(own, seed=seed))
        if name != baseline:
            paired = own.astype(int) - hits[baseline]
            low, high = crossed_bootstrap(paired, seed=seed)
            row = dataclasses.replace(
                row,
                difference=float(paired.mean()),
                difference_low=low,
                difference_high=high,
                better=counts[name][0],
                worse=counts[name][1],
                p=p[name],
                p_holm=p_holm[name],
                shown=bool(p_holm[name] < 1 - LEVEL and (low > 0 or high < 0)),
            )
        rows.append(row)
    return rows


def verdict(row: Row, baseline: str, n: int, seeds: int) -> str:
    """What a row says, in words."""
    if not row.shown or row.difference is None:
        many = f"{seeds} seed" + "s" * (seeds != 1)
        return f"{row.variant}: no difference to {baseline} can be shown with this n ({n} images, {many})"
    word = "better" if row.difference > 0 else "worse"
    return f"{row.variant}: {word} than {baseline} by {100 * abs(row.difference):.1f} points"
