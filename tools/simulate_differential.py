"""How often the intervals of `bmjax differential` hold the truth, by simulation.

    python tools/simulate_differential.py [--repeats 200] [--many-repeats 40]

A population has classes with recalls of their own and errors that go where they go. Labelled cells of it give the
confusion matrix, as a run's test split does; a smear of other shares gives the counts. Each repeat draws all of it
again. Prints the table of docs/differential.md: the share of intervals that hold the true share, for classes of 5 % and
more, rarer ones, and absent ones; and that of Wilson's interval of the raw count, which takes no errors into account.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

import numpy as np
from interval_coverage import Population

from bmjax.analysis.differential.estimate import FEW, estimate_shares
from bmjax.runs.intervals import proportion_intervals

CELLS = (20, 100, 500)
SEVEN, MARROW = Population(7, 300, "equal", 0.75, "varied"), Population(21, 2000, "marrow", 0.8, "varied")


def smears(trained: np.ndarray, labelled: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, shares [k]) of smears; classes with fewer than `FEW` labelled cells are not made frequent."""
    k, known = len(trained), np.flatnonzero(labelled >= FEW)
    yield "as in training", trained
    rest = trained.copy()
    rest[known[-1]] = 0
    rest *= 0.4 / rest.sum()
    rest[known[-1]] = 0.6
    yield "the rarest at 60 %", rest
    half = np.zeros(k)
    half[known[::2]] = 1 / len(known[::2])
    yield "half of them absent", half


@dataclasses.dataclass
class Tally:
    """Intervals that held the truth, and all, of [classes of 5 % and more, rarer, absent]; and the sum of lengths."""

    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    raw: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    all: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    length: float = 0.0

    def add(self, truth: np.ndarray, judged: np.ndarray, ours: tuple, raw: tuple) -> None:
        kinds = (truth >= 0.05, (truth > 0) & (truth < 0.05), truth == 0)
        holds = [(low <= truth) & (truth <= high) for low, high in (ours, raw)]
        for i, kind in enumerate(kinds):
            rows = kind & judged
            self.all[i] += rows.sum()
            self.held[i] += holds[0][rows].sum()
            self.raw[i] += holds[1][rows].sum()
        rows = kinds[0] & judged
        self.length += float((ours[1] - ours[0])[rows].sum())

    @property
    def coverage(self) -> np.ndarray:
        """In percent [3]; not a number where there is no such class."""
        return 100 * self.held / np.where(self.all > 0, self.all, np.nan)

    def cells(self) -> list[str]:
        shown = ["" if np.isnan(c) else f"{c:.1f}" for c in self.coverage]
        return [
            *shown,
            f"{100 * self.raw[0] / max(self.all[0], 1):.1f}",
            f"{100 * self.length / max(self.all[0], 1):.0f}",
        ]


def simulate(population: Population, cells: int, repeats: int, seed: int = 0, chains: int = 100) -> dict[str, Tally]:
    """A tally for each kind of smear of so many cells."""
    rng, found = np.random.default_rng([seed, population.k, cells]), dict[str, Tally]()
    for repeat in range(repeats):
        joint, confusion = population.draw(rng)
        joint = joint / joint.sum()
        trained, labelled = joint.sum(1), confusion.sum(1)
        rows = joint / trained[:, None]
        for name, shares in smears(trained, labelled):
            counts = rng.multinomial(cells, shares @ rows)
            ours = estimate_shares(counts, confusion, seed=repeat, chains=chains)
            raw = proportion_intervals(counts, np.full(len(counts), cells))
            found.setdefault(name, Tally()).add(shares, labelled >= FEW, (ours.low, ours.high), raw)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="of 7 classes (default: %(default)s)")
    parser.add_argument("--many-repeats", type=int, default=40, help="of 21 classes, slower (default: %(default)s)")
    parser.add_argument("--cells", type=int, nargs="+", default=CELLS, help="of a smear (default: %(default)s)")
    options = parser.parse_args()
    print(
        "| classes | labelled cells | smear | cells | 5 % and more | rarer | absent | raw, 5 % and more "
        "| length, points |"
    )
    print("|---" * 9 + "|")
    for population, repeats in ((SEVEN, options.repeats), (MARROW, options.many_repeats)):
        for cells in options.cells if repeats else ():
            for name, tally in simulate(population, cells, repeats).items():
                row = [str(population.k), str(population.n), name, str(cells), *tally.cells()]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
