"""What each change of a sweep is worth: its runs against the first one's, paired over seeds, on validation.

    python tools/ablation.py FOLDER

FOLDER is that of a sweep whose cells are named CHANGE-SEED, as those of experiments/bm7_recipe.py. Prints Markdown:
mean accuracy, the difference to the first change with its simultaneous interval and p (docs/statistics.md), minutes.
Changes of which a seed is missing are left out, and named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bmjax.analysis.compare import statistics
from bmjax.analysis.study.records import hits_of, seconds_of
from bmjax.analysis.study.tables import Mean, Table, against, markdown
from bmjax.analysis.sweep import plan
from bmjax.analysis.sweep.rows import FINISHED, read_row


def by_change(folder: str | Path) -> dict[str, list[Path]]:
    """The finished runs of each change, in the sweep's order.

    Raises:
      ValueError: a cell is not named CHANGE-SEED.
    """
    found: dict[str, list[Path]] = {}
    for cell in plan.load(Path(folder)).cells:
        change, _, seed = cell.name.rpartition("-")
        if not change or not seed.isdecimal():
            raise ValueError(f"{folder}: a cell is called {cell.name!r}; expected CHANGE-SEED")
        row = read_row(cell)
        found.setdefault(change, []).extend([Path(cell.config.run_dir)] if row and row["status"] == FINISHED else [])
    return found


def table(folder: str | Path) -> Table:
    """The table of a sweep's folder.

    Raises:
      ValueError: it is no such sweep, or none of its first change's runs has finished.
    """
    runs = by_change(folder)
    baseline = next(iter(runs))
    if not runs[baseline]:
        raise ValueError(f"{folder}: no run of {baseline!r} has finished; expected the change that others are held to")
    whole = {change: paths for change, paths in runs.items() if len(paths) == len(runs[baseline])}
    hits = {change: hits_of(paths, "val") for change, paths in whole.items()}
    seeds, n = hits[baseline].shape
    rows = []
    for row in statistics.compare(hits, baseline):
        accuracy = Mean(row.accuracy, row.low, row.high, seeds, n)
        minutes = np.mean([seconds_of(path) for path in whole[row.variant]]) / 60
        rows.append((row.variant, str(accuracy), *against(row), f"{minutes:.1f}"))
    left = [f"{change} ({len(paths)} of {seeds} runs)" for change, paths in runs.items() if change not in whole]
    notes = (f"{n} validation images, {seeds} seeds.", *([f"Not finished: {', '.join(left)}."] if left else []))
    return Table(
        "What each change is worth",
        ("change", "validation accuracy", f"difference to {baseline}, points", "p, corrected", "minutes"),
        tuple(rows),
        notes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="a sweep's folder")
    print(markdown([table(parser.parse_args().folder)]))


if __name__ == "__main__":
    main()
