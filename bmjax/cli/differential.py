"""`bmjax differential`: the differential count of a smear, with intervals that know how the classifier errs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.cli.output import add_checkpoint, check_out
from bmjax.cli.reading import add_pixel_size, add_threshold, check_pixel_size, check_threshold

if TYPE_CHECKING:
    from bmjax.analysis.differential.smear import Cells, Differential
    from bmjax.analysis.evaluate.judge import Judge
    from bmjax.cli.predict import Input

_NAMED = 20
"""Cells that are named on the terminal; the table for review has all."""


def add_parser(verbs: Any) -> None:
    """Adds `differential` to a parser's verbs."""
    p = verbs.add_parser(
        "differential",
        help="count the cells of a smear by class, with intervals",
        description="Classifies all cells of a smear and gives each class's share: as counted, and adjusted by the "
        "run's confusion matrix, with 95 % intervals. Undecided cells go into a table for review.",
        epilog="Exit status: 0 the tables are written; 1 no file could be read; 2 wrong input. Not for diagnosis.",
    )
    p.add_argument("run_dir", metavar="run", help="folder of a run")
    p.add_argument("paths", metavar="folder", nargs="+",
                   help="further runs, to be averaged; then a folder of one smear's cells, or images")  # fmt: skip
    p.add_argument("--out", metavar="FILE", default="differential.csv",
                   help="a row for each class; beside it <name>_review.csv (default: %(default)s)")  # fmt: skip
    add_pixel_size(p)
    add_threshold(p)
    add_checkpoint(p)
    p.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    check_threshold(options)
    check_pixel_size(options)
    out = Path(options.out)
    if out.suffix != ".csv":
        raise ValueError(f"--out is {options.out!r}; expected a name ending in .csv")
    review = out.with_name(f"{out.stem}_review.csv")
    check_out(out, options.paths)
    check_out(review, options.paths, what="the table for review beside --out")
    from bmjax.analysis.differential.smear import COLUMNS, REVIEW, differential_of, errors_of, write_table
    from bmjax.analysis.evaluate.judge import Judge, at_pixel_size, say_unmatched
    from bmjax.analysis.evaluate.undecided import kept_calibrations, undecided_below
    from bmjax.cli.predict import runs_first
    from bmjax.runs.folder import load_run

    run_dirs, paths = runs_first(options)
    if not paths:
        raise ValueError("differential: expected a folder of cells, or images, after the runs")
    runs = [load_run(run_dir, options.which, trust=options.trust) for run_dir in run_dirs]
    calibrations = kept_calibrations(runs)
    say_unmatched(runs)
    judge = Judge(at_pixel_size(runs, options.pixel_size), calibrated=calibrations[0] is not None)
    errors = errors_of(judge)  # known to be there before any image is read
    threshold = undecided_below(runs, calibrations, options.error_rate, options.undecided)
    cells = _classify(judge, paths, threshold)
    if cells is None:
        return 1
    result = differential_of(judge.classes, errors, cells)
    write_table(out, COLUMNS, result.rows())
    write_table(review, REVIEW, result.review())
    _print(result, threshold)
    print(f"\n{out}: the table; {review}: the undecided cells")
    return 0


def _classify(judge: Judge, paths: Sequence[str], threshold: float) -> Cells | None:
    """The cells of files and folders; names those that can't be read, and None where none can."""
    import numpy as np

    from bmjax.analysis.differential.smear import Cells
    from bmjax.cli.answers import Answers
    from bmjax.cli.predict import blocks_of, inputs_of, predictions_of
    from bmjax.files import printable

    names, probs, failed = [], [], 0
    once = _Once(inputs_of(paths))
    for block in predictions_of(judge, blocks_of(once), Answers(judge, None, 0.0), None):
        for path, error, row in zip(block.paths, block.errors, block.probs, strict=True):
            if error is None:
                names.append(path)
                probs.append(row)
            elif (failed := failed + 1) <= _NAMED:
                print(f"  {printable(path)}: {printable(error)}", file=sys.stderr)
    if once.repeated:
        print(f"{once.repeated} files were given again, and are counted once", file=sys.stderr)
    if failed:
        print(f"{failed} of {failed + len(names)} images can't be read, and are not counted", file=sys.stderr)
    if not names:
        if not failed:
            raise ValueError(f"{', '.join(map(printable, paths))}: no image; expected a folder of cells")
        return None
    found = np.stack(probs)
    return Cells(tuple(names), found, found.max(-1) < threshold)


class _Once:
    """Inputs without those whose file came before, under whatever path: a cell counts once. `repeated`: how many were
    left out so far."""

    def __init__(self, inputs: Iterator[Input]):
        self._inputs, self._seen, self.repeated = inputs, set[str](), 0

    def __iter__(self) -> Iterator[Input]:
        return self

    def __next__(self) -> Input:
        while (given := next(self._inputs)).error is None:
            if (path := os.path.realpath(given.path)) not in self._seen:
                self._seen.add(path)
                break
            self.repeated += 1
        return given


def _print(result: Differential, threshold: float) -> None:
    from bmjax.analysis.differential.estimate import FEW
    from bmjax.files import printable

    errors = result.errors
    accuracy = errors.confusion.trace() / errors.n
    print(
        f"{len(result.cells.paths)} cells. Adjusted by the confusion matrix of {errors.split}: n {errors.n}, accuracy "
        f"{accuracy:.3f}.\n"
    )
    rows = result.rows()
    width = max(8, *(len(printable(row[0])) + 2 for row in rows))
    print("class".ljust(width) + "   count  undecided   raw %  adjusted %  95 % interval")
    for name, count, undecided, raw, adjusted, low, high, _ in rows:
        print(
            printable(name).ljust(width)
            + f"{count:8d}{undecided:11d}{raw:8.1f}{adjusted:12.1f}  {low:.1f} to {high:.1f}"
        )
    if few := [f"{printable(row[0])} ({row[-1]})" for row in rows if int(row[-1]) < FEW]:
        print(
            f"\nFewer than {FEW} labelled cells say how these classes are mistaken: {', '.join(few)}. Do not rely on "
            "their intervals, nor on the others' where these classes are frequent."
        )
    review = result.review()
    print(f"\n{len(review)} of {len(result.cells.paths)} cells are undecided (probability below {threshold:.3f})")
    for path, first, p, second, q in review[:_NAMED]:
        print(f"  {printable(path)}: {printable(first)} {p:.2f}, {printable(second)} {q:.2f}")
    if len(review) > _NAMED:
        print(f"  and {len(review) - _NAMED} more")
