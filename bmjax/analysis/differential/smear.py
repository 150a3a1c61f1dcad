"""A smear's table: counts, shares with intervals, and the cells to look at again."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
from pathlib import Path

import numpy as np

from bmjax.analysis.differential.estimate import Shares, estimate_shares
from bmjax.analysis.evaluate.judge import Judge
from bmjax.files import write_text
from bmjax.runs.confusion import confusion_matrix
from bmjax.runs.folder import split_size

log = logging.getLogger(__name__)
COLUMNS = ("class", "count", "undecided", "raw_percent", "adjusted_percent", "low", "high", "labelled")
REVIEW = ("path", "predicted", "probability", "second", "second_probability")


@dataclasses.dataclass(frozen=True)
class Errors:
    """How a run errs: its confusion matrix counts [k, k] on a split, rows the true class."""

    split: str
    confusion: np.ndarray

    @property
    def n(self) -> int:
        return int(self.confusion.sum())


def errors_of(judge: Judge) -> Errors:
    """How a run errs, or the mean of several: by the predictions of the test split, where it was opened by these
    checkpoints, else by those of validation.

    Raises:
      ValueError: there are predictions of neither, of one split for all runs; names the command that makes them.
    """
    problems = []
    for split in ("test", "val"):
        try:
            found = judge.saved(split)
        except ValueError as e:
            problems.append(e)
            continue
        return Errors(split, confusion_matrix(found.labels, found.predicted, len(judge.classes)))
    has_val = all(split_size(run.run_dir, "val") for run in judge.runs)
    raise problems[1 if has_val else 0]


@dataclasses.dataclass(frozen=True)
class Cells:
    """Cells that were classified: paths [n], probabilities [n, k], and whether each is undecided [n]."""

    paths: tuple[str, ...]
    probs: np.ndarray
    undecided: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        return self.probs.argmax(-1)


@dataclasses.dataclass(frozen=True)
class Differential:
    """A smear's differential count. Undecided cells are counted by their likeliest class, as the matrix counts them."""

    classes: tuple[str, ...]
    cells: Cells
    errors: Errors
    shares: Shares

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.cells.predicted, minlength=len(self.classes))

    def rows(self) -> list[list[str | int | float]]:
        """A row for each class, as `COLUMNS`; percentages with two decimals."""
        counts, labelled = self.counts, self.errors.confusion.sum(1)
        undecided = np.bincount(self.cells.predicted[self.cells.undecided], minlength=len(self.classes))
        percent = [np.round(100 * x, 2) for x in (counts / counts.sum(), *dataclasses.astuple(self.shares))]
        return [
            [name, int(counts[i]), int(undecided[i]), *(float(x[i]) for x in percent), int(labelled[i])]
            for i, name in enumerate(self.classes)
        ]

    def review(self) -> list[list[str | float]]:
        """A row for each undecided cell, as `REVIEW`, the least sure first."""
        rows = np.flatnonzero(self.cells.undecided)
        out = []
        for i in rows[np.argsort(self.cells.probs[rows].max(1), kind="stable")]:
            probs = self.cells.probs[i]
            first, second = np.argsort(-probs, kind="stable")[:2]
            ranked = [(self.classes[c], round(float(probs[c]), 4)) for c in (first, second)]
            out.append([self.cells.paths[i], *ranked[0], *ranked[1]])
        return out


def differential_of(classes: tuple[str, ...], errors: Errors, cells: Cells) -> Differential:
    """The differential count of cells by a classifier that errs so.

    Raises:
      ValueError: there is no cell.
    """
    shares = estimate_shares(np.bincount(cells.predicted, minlength=len(classes)), errors.confusion)
    return Differential(classes, cells, errors, shares)


def write_table(path: Path, header: tuple[str, ...], rows: list[list]) -> None:
    """A CSV file, written whole or not at all; bytes of names that are no UTF-8 stay."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows([header, *rows])
    write_text(path, text.getvalue(), "surrogateescape")
