"""How often `bmjax compare` claims what is not so, and how often it shows what is: its level and power by simulation.

    python tools/simulate_verdicts.py [--quick] [--only verdicts candidates luck folds sequential intervals]

Answers come from a threshold: an image has a difficulty, a variant its own view of each image, a run its luck, and the
rest is the single answer's. Prints the tables of docs/statistics.md; every row has seeds of its own, so that the
figures depend neither on the parts asked for nor on the number of processes (--processes).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: processes share the cores

import interval_coverage
import numpy as np
from scipy import stats
from verdict_candidates import CANDIDATES, new, old

from bmjax.analysis.compare.planning import detectable, looks, until_shown
from bmjax.analysis.compare.statistics import compare, corrected_resampled_t

UNEQUAL, EQUAL = (1.5, 0.25, 0.35), (0.0, 0.0, 1.0)  # spread over images, of a variant's view of them, of answers


@dataclasses.dataclass(frozen=True)
class Setting:
    """A comparison: variants, seeds, images, true accuracy, luck in points (of each variant in turn), difficulty."""

    v: int = 8
    s: int = 5
    n: int = 422
    accuracy: float = 0.64
    luck: tuple[float, ...] = (1.0,)
    unequal: bool = True

    def draw(self, rng: np.random.Generator, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Hits [v, s, n] of equal variants, and the same draw with variant 1 worse by `effect`, from the same luck."""
        image, view, answer = (np.float32(x) for x in (UNEQUAL if self.unequal else EQUAL))
        sigma = float(np.sqrt(image**2 + view**2 + answer**2))
        luck = np.resize(self.luck, self.v) / 100 * sigma / stats.norm.pdf(stats.norm.ppf(self.accuracy))
        spread = np.sqrt(sigma**2 + luck**2)
        fixed = image * rng.standard_normal(self.n, np.float32)[None]
        fixed = fixed + view * rng.standard_normal((self.v, self.n), np.float32)
        fixed += (stats.norm.ppf(self.accuracy) * spread)[:, None].astype(np.float32)
        run = (luck[:, None] * rng.standard_normal((self.v, self.s))).astype(np.float32)
        x = rng.standard_normal((self.v, self.s, self.n), np.float32)
        x *= answer
        x += fixed[:, None]
        x += run[..., None]
        hits = x > 0
        worse = hits.copy()
        low = max(self.accuracy - effect, 0.01)
        worse[1] = x[1] > spread[1] * (stats.norm.ppf(self.accuracy) - stats.norm.ppf(low))
        return hits, worse

    def showable(self, rng: np.random.Generator, repeats: int = 20) -> float:
        """The difference that the new test says it shows with 80 % power, the mean over draws."""
        rows = [compare(dict(enumerate(self.draw(rng)[0])), 0)[1] for _ in range(repeats)]  # type: ignore[arg-type]
        return float(np.mean([detectable(row.spread, self.s, self.n) for row in rows if row.spread]))

    def cells(self) -> list[str]:
        luck = " and ".join(f"{x:g}" for x in dict.fromkeys(self.luck))
        difficulty = "unequal" if self.unequal else "equal"
        return [str(self.v), str(self.s), str(self.n), f"{100 * self.accuracy:.0f}", luck, difficulty]


SETTING_HEADER = ("variants", "seeds", "images", "accuracy, %", "luck, points", "difficulty")


def settings(quick: bool) -> Iterator[Setting]:
    """The settings of the level and power table."""
    for v in (2, 8, 22):
        for s in (3, 5, 20):
            for luck in (0.0, 1.0, 2.0, 3.0):
                if not quick or (v, s) in ((2, 3), (8, 5), (22, 3)):
                    yield Setting(v, s, luck=(luck,))
    for n, v, s in ((100, 2, 3), (100, 8, 3), (100, 22, 10), (5000, 2, 3), (5000, 8, 3), (5000, 22, 5)):
        for accuracy in (0.6, 0.9, 0.99):
            for unequal, luck in ((True, 0.0), (False, 1.0)) if n == 100 else ((True, 3.0), (False, 0.0)):
                if not quick or (n == 100 and v == 8):
                    yield Setting(v, s, n, accuracy, (luck,), unequal)


def upper(k: int, n: int) -> float:
    """Upper 95 % bound of k in n, in percent (Clopper and Pearson 1934, one-sided)."""
    return 100 * float(stats.beta.ppf(0.95, k + 1, n - k)) if k < n else 100.0


def _with_bound(k: int, n: int) -> str:
    return f"{100 * k / n:.1f} ({upper(k, n):.1f})"


def verdicts(case: tuple[int, Setting], repeats: int) -> list[str]:
    """Level and power of the old and the new test, the power at the difference the new one says it shows with 80 %."""
    (number, setting), few = case, max(repeats // 5, 1)
    rng = np.random.default_rng([1, number])  # luck of its own, or one odd draw would be seen in many rows
    effect = setting.showable(rng)
    possible = effect < setting.accuracy - 0.02
    level, power = np.zeros(2, int), np.zeros(2, int)
    for i in range(repeats):
        equal, worse = setting.draw(rng, effect)
        level[1] += new(equal).any()
        if i < few:
            level[0] += old(equal).any()
            power += [old(worse)[0], new(worse)[0]]
    return [
        *setting.cells(),
        f"{100 * level[0] / few:.1f}",
        _with_bound(level[1], repeats),
        f"{100 * effect:.1f}",
        *(f"{100 * x / few:.0f}" if possible else "" for x in power),
    ]


def candidates(case: tuple[int, int, int], repeats: int) -> list[str]:
    """Level / power of every test; power at 4 points and 2 more for each point of luck."""
    v, s, luck = case
    setting, rng = Setting(v, s, luck=(float(luck),)), np.random.default_rng(2)
    count = np.zeros((len(CANDIDATES), 2), int)
    for _ in range(repeats):
        equal, worse = setting.draw(rng, 0.04 + 0.02 * luck)
        for i, test in enumerate(CANDIDATES.values()):
            count[i] += test(equal).any(), test(worse)[0]
    return [str(v), str(s), str(luck), *(f"{100 * a / repeats:.1f} / {100 * b / repeats:.0f}" for a, b in count)]


UNEQUAL_LUCK = {
    "every second variant": (0.5, 3.0),
    "one variant in eight": (*(0.5,) * 7, 3.0),
    "the baseline alone": (3.0, *(0.5,) * 21),
}


def unequal_luck(case: tuple[int, int, str], repeats: int) -> list[str]:
    """Level where the variants' luck differs, which is beyond what was asked of the test."""
    names = ("old", "crossed, own", "crossed, pooled", "new")
    v, s, words = case
    setting, rng = Setting(v, s, luck=UNEQUAL_LUCK[words]), np.random.default_rng(3)
    count = np.zeros(len(names), int)
    for _ in range(repeats):
        equal, _ = setting.draw(rng)
        count += [CANDIDATES[name](equal).any() for name in names]
    return [str(v), str(s), words, *(f"{100 * x / repeats:.1f}" for x in count)]


def folds(case: tuple[int, int, float], repeats: int) -> list[str]:
    """Level over five folds of 422 images: each fold's run has its luck, a fifth of whose variance the folds of a
    variant share, as their training images; and each fold's training set has a luck that all its seeds share."""
    (v, s, luck), k, n = case, 5, 422
    rng, count = np.random.default_rng([4, v, s, int(luck)]), np.zeros(4, int)
    for _ in range(repeats):
        hits, fold = draw_folds(rng, (v, s, k, n), luck)
        d = (hits[1].astype(np.float32) - hits[0]).mean(0)
        each = np.array([d[fold == j].mean() for j in range(k)])
        worse = hits.copy()
        worse[1] &= rng.random((s, n)) > 0.08  # of what was right, so that about 5 points are lost
        rows = compare(_named(hits), "0", folds=fold), compare(_named(worse), "0", folds=fold)
        count += [
            corrected_resampled_t(each, 0.0) < 0.05,
            s >= 3 and new(hits).any(),
            any(row.shown for row in rows[0]),
            bool(rows[1][1].shown),
        ]
    texts = [f"{100 * x / repeats:.1f}" for x in count]
    split = texts[1] if s >= 3 else "no verdict"
    return [str(v), str(s), f"{luck:g}", texts[0], split, _with_bound(count[2], repeats), texts[3]]


def draw_folds(
    rng: np.random.Generator, shape: tuple[int, int, int, int], luck: float
) -> tuple[np.ndarray, np.ndarray]:
    """(hits [v, s, n] of equal variants, each image tested in one of k folds; the fold of each image [n])."""
    v, s, k, n = shape
    fold = rng.permutation(np.arange(n) % k)
    parts = np.sqrt(0.2) * rng.standard_normal((v, 1, 1)), np.sqrt(0.2) * rng.standard_normal((v, 1, k))
    run = luck / 100 / 0.235 * (sum(parts) + np.sqrt(0.6) * rng.standard_normal((v, s, k)))
    x = 0.55 + 1.5 * rng.standard_normal(n) + 0.25 * rng.standard_normal((v, 1, n)) + run[:, :, fold]
    return x + 0.35 * rng.standard_normal((v, s, n)) > 0, fold


def sequential(case: tuple[int, float], repeats: int) -> list[str]:
    """`until_shown` at 2 points and up to 20 seeds: its level, its power at 5 points, and the seeds it takes."""
    (v, luck), at = case, looks(20)
    setting, rng = Setting(v, 20, n=1000, luck=(luck,)), np.random.default_rng([5, v, int(luck)])
    wrong, right, took = 0, 0, []
    for i in range(repeats):
        equal, worse = setting.draw(rng, 0.05)
        wrong += bool(until_shown(_named(equal), "0", 0.02, at).shown)
        if i < repeats // 5:
            found = until_shown(_named(worse), "0", 0.02, at).shown
            right += "1" in found
            took.append(found.get("1", 20))
    power = f"{100 * right / (repeats // 5):.0f}"
    return [str(v), f"{luck:g}", _with_bound(wrong, repeats), power, f"{np.median(took):.0f}"]


def _named(hits: np.ndarray) -> dict[str, np.ndarray]:
    return {str(i): h for i, h in enumerate(hits)}


@dataclasses.dataclass(frozen=True)
class Part:
    """A table: a row of each case, with so many repeats."""

    header: tuple[str, ...]
    cases: list[Any]
    row: Callable[..., list[str]]
    repeats: int

    def print(self, pool: concurrent.futures.Executor) -> None:
        """Prints the table in Markdown, each row once it and those above are known."""
        print(f"\n| {' | '.join(self.header)} |\n|{'---|' * len(self.header)}", flush=True)
        for row in pool.map(functools.partial(self.row, repeats=self.repeats), self.cases):
            print(f"| {' | '.join(row)} |", flush=True)


def parts(quick: bool) -> dict[str, Part]:
    """All tables, in their order."""
    repeats, lucks = (100 if quick else 1000), (0.0, 2.0) if quick else (0.0, 1.0, 2.0, 3.0)
    tried = [(8, 5, 0), (8, 5, 2)]
    if not quick:
        tried = [(2, 3, 2), (8, 3, 0), (8, 3, 2), *tried, (8, 10, 1), (22, 3, 2), (22, 5, 2)]
    tests = ("old: level, %", "new: level, % (bound)", "difference, points", "old: power, %", "new: power, %")
    crossed = ("old", "crossed, own", "crossed, pooled", "new")
    of_folds = ("t over folds, two of them", "as one split", "new: level, % (bound)", "new: power at 5 points, %")
    of_looks = ("level, % (bound)", "power at 5 points, %", "seeds taken, median")
    unequal = [(v, s, w) for v, s in ([(8, 5)] if quick else [(8, 3), (8, 5), (22, 3), (22, 5)]) for w in UNEQUAL_LUCK]
    cross = [(v, s, luck) for v, s in ((2, 1), (2, 3), (8, 1), (8, 2), (22, 2)) for luck in lucks]
    populations = interval_coverage.POPULATIONS[:6] if quick else interval_coverage.POPULATIONS
    return {
        "verdicts": Part((*SETTING_HEADER, *tests), list(enumerate(settings(quick))), verdicts, repeats),
        "candidates": Part(("variants", "seeds", "luck", *CANDIDATES), tried, candidates, repeats // 4),
        "luck": Part(
            ("variants", "seeds", "luck of 3 points, others 0.5", *crossed), unequal, unequal_luck, repeats // 4
        ),
        "folds": Part(("variants", "seeds", "luck", *of_folds), cross, folds, repeats),
        "sequential": Part(
            ("variants", "luck", *of_looks), [(v, luck) for v in (2, 8) for luck in lucks], sequential, repeats
        ),
        "intervals": Part(interval_coverage.HEADER, populations, interval_coverage.row, repeats // 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the repeats and a few settings")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    names = tuple(parts(True))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    began = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
        for name in args.only:
            parts(args.quick)[name].print(pool)
            minutes = (time.perf_counter() - began) / 60
            print(f"\n{name}: {minutes:.1f} min on {args.processes} processes so far", flush=True)


if __name__ == "__main__":
    main()
