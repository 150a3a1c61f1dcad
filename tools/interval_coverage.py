"""How often 95 % intervals of macro F1, balanced accuracy and per-class figures hold the truth, by simulation.

Part of tools/simulate_verdicts.py. The truth is the figure of the population over all its classes, also those the
sample lacks. Each repeat has another population: recalls and where errors go are drawn again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats

from bmjax.data.builders.bm_cytomorphology import COUNTS
from bmjax.runs import intervals
from bmjax.runs.confusion import balanced_accuracy, macro_f1

FIGURES = {"macro_f1": macro_f1, "balanced_accuracy": balanced_accuracy}
Intervals = dict[str, tuple[float, float]]
Method = Callable[[np.ndarray, np.ndarray, np.random.Generator], Intervals]  # of counts and matrices drawn from them


@dataclasses.dataclass(frozen=True)
class Population:
    """k classes: `skew` (equal, zipf 1/rank, geometric 0.75^rank, marrow as in the collection of 171,374 cells),
    mean recall, how recalls differ (alike, varied, falling by 35 points toward the rarest), and n images."""

    k: int
    n: int
    skew: str
    recall: float
    kind: str

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities [k, k], counts [k, k] of a sample)."""
        rank = np.arange(self.k)
        frequency = {
            "equal": np.ones(self.k),
            "zipf": 1 / (rank + 1),
            "geometric": 0.75**rank,
            "marrow": np.array(sorted(COUNTS.values(), reverse=True), float)[: self.k],
        }[self.skew]
        frequency = frequency / frequency.sum()
        recall = {
            "alike": np.full(self.k, self.recall),
            "varied": rng.beta(8 * self.recall, 8 * (1 - self.recall), self.k),
            "falling": self.recall - 0.35 * rank / max(self.k - 1, 1),
        }[self.kind]
        to = rng.exponential(size=(self.k, self.k)) * frequency ** rng.uniform(0.5, 1)
        np.fill_diagonal(to, 0)
        to /= to.sum(1, keepdims=True)
        p = frequency[:, None] * (np.diag(recall) + (1 - recall)[:, None] * to)
        return p, rng.multinomial(self.n, p.ravel() / p.sum()).reshape(p.shape)


POPULATIONS = [
    *(Population(21, n, "marrow", 0.8, kind) for n in (422, 30) for kind in ("alike", "varied", "falling")),
    *(Population(21, n, "zipf", 0.8, kind) for n in (422, 30) for kind in ("alike", "varied", "falling")),
    *(Population(21, n, "geometric", 0.65, "varied") for n in (2000, 422, 100, 30)),
    Population(21, 5000, "marrow", 0.9, "varied"),
    *(Population(7, n, "zipf", 0.9, "varied") for n in (422, 60, 30)),
    *(Population(7, n, "equal", 0.7, "alike") for n in (195, 60)),
    Population(7, 422, "zipf", 0.64, "falling"),
    Population(4, 80, "geometric", 0.95, "alike"),
    Population(2, 50, "equal", 0.9, "alike"),
    Population(2, 100, "zipf", 0.95, "varied"),
    Population(3, 40, "zipf", 0.6, "alike"),
    Population(21, 422, "equal", 0.95, "alike"),
]


def _percentile(counts: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> Intervals:
    return {name: tuple(np.quantile(f(drawn), [0.025, 0.975])) for name, f in FIGURES.items()}


def _bca(counts: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> Intervals:
    """Bias-corrected and accelerated (Efron 1987)."""
    n, cells, found = counts.sum(), np.flatnonzero(counts), {}
    without = np.repeat(counts.reshape(1, -1), len(cells), 0)
    without[np.arange(len(cells)), cells] -= 1
    weight, z = counts.ravel()[cells], np.array([-1.959964, 1.959964])
    for name, f in FIGURES.items():
        values, own = f(drawn), f(counts)
        share = np.clip((values < own).mean() + (values == own).mean() / 2, 0.001, 0.999)
        jack = f(without.reshape(-1, *counts.shape))
        u = (jack * weight).sum() / n - jack
        acceleration = (weight * u**3).sum() / (6 * (weight * u**2).sum() ** 1.5 + 1e-12)
        z0 = stats.norm.ppf(share)
        found[name] = tuple(np.quantile(values, stats.norm.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))))
    return found


def _logit(counts: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> Intervals:
    """Normal on the logit scale, with the bootstrap's standard error."""
    n, found = counts.sum(), {}
    for name, f in FIGURES.items():
        own = np.clip(f(counts), 0.5 / n, 1 - 0.5 / n)
        half = 1.96 * f(drawn).std() / (own * (1 - own))
        middle = np.log(own / (1 - own))
        found[name] = (1 / (1 + np.exp(half - middle)), 1 / (1 + np.exp(-half - middle)))
    return found


def _dirichlet(counts: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> Intervals:
    """Bayesian bootstrap, each cell of the matrix with a prior count of 1 / k."""
    matrices = rng.standard_gamma(counts + 1 / len(counts), drawn.shape)
    return {name: tuple(np.quantile(f(matrices), [0.025, 0.975])) for name, f in FIGURES.items()}


def _new(counts: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> Intervals:
    return intervals.macro_intervals(counts, seed=int(rng.integers(1 << 30)), resamples=len(drawn))


METHODS: dict[str, Method] = {
    "percentile (old)": _percentile,
    "BCa": _bca,
    "logit": _logit,
    "Dirichlet": _dirichlet,
    "new": _new,
}
HEADER = ("classes", "images", "skew", "recall", *METHODS, "per class: recall", "precision", "F1")


def row(population: Population, repeats: int, resamples: int = 400) -> list[str]:
    """Coverage in percent, macro F1 / balanced accuracy, by method; and of the classes' own intervals, all classes
    taken together that have at least ten images (of which at least ten were taken for them, for precision)."""
    rng = np.random.default_rng(6)
    held = np.zeros((len(METHODS), 2))
    own = np.zeros((3, 2))
    for _ in range(repeats):
        p, counts = population.draw(rng)
        truth = {name: float(f(p)) for name, f in FIGURES.items()}
        drawn = rng.multinomial(population.n, counts.ravel() / population.n, resamples).reshape(-1, *counts.shape)
        for i, method in enumerate(METHODS.values()):
            found = method(counts, drawn, rng)
            held[i] += [found[name][0] - 1e-12 <= truth[name] <= found[name][1] + 1e-12 for name in FIGURES]
        hits, true, predicted = np.diag(p), p.sum(1), p.sum(0)
        truths = (hits / true, hits / predicted, 2 * hits / (true + predicted))
        n, taken = counts.sum(1), counts.sum(0)
        enough = (n >= 10, taken >= 10, n + taken - np.diag(counts) >= 10)
        for i, (low, high) in enumerate(intervals.class_intervals(counts)[x] for x in ("recall", "precision", "f1")):
            own[i] += ((low <= truths[i]) & (truths[i] <= high))[enough[i]].sum(), enough[i].sum()
    return [
        str(population.k),
        str(population.n),
        population.skew,
        f"{100 * population.recall:.0f}, {population.kind}",
        *(f"{100 * a / repeats:.1f} / {100 * b / repeats:.1f}" for a, b in held),
        *(f"{100 * a / b:.1f}" if b else "" for a, b in own),
    ]
