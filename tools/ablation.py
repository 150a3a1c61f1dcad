"""What each change of a sweep is worth: its runs against the first one's, paired over images, on validation.

    python tools/ablation.py FOLDER

FOLDER is that of a sweep whose cells are named CHANGE-SEED, as those of experiments/bm7_recipe.py. Prints Markdown:
mean accuracy, the difference to the first change with its simultaneous interval and p (docs/statistics.md), minutes.
The seeds are those of which the first change has a run; changes without one of them are left out, and named.
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


def by_change(folder: str | Path) -> dict[str, dict[int, Path | None]]:
    """The run of each change and seed, in the sweep's order; None where it has not finished.

    Raises:
      ValueError: a cell is not named CHANGE-SEED.
    """
    found: dict[str, dict[int, Path | None]] = {}
    for cell in plan.load(Path(folder)).cells:
        change, _, seed = cell.name.rpartition("-")
        if not change or not seed.isdecimal():
            raise ValueError(f"{folder}: a cell is called {cell.name!r}; expected CHANGE-SEED")
        row = read_row(cell)
        finished = row is not None and row["status"] == FINISHED
        found.setdefault(change, {})[int(seed)] = Path(cell.config.run_dir) if finished else None
    return found


def table(folder: str | Path) -> Table:
    """The table of a sweep's folder.

    Raises:
      ValueError: it is no such sweep, or none of its first change's runs has finished.
    """
    runs = by_change(folder)
    baseline = next(iter(runs))
    held = [seed for seed, path in runs[baseline].items() if path is not None]
    if not held:
        raise ValueError(f"{folder}: no run of {baseline!r} has finished; expected the change that others are held to")
    whole = {change: [path for seed in held if (path := paths.get(seed)) is not None] for change, paths in runs.items()}
    whole = {change: paths for change, paths in whole.items() if len(paths) == len(held)}
    hits = {change: hits_of(paths, "val") for change, paths in whole.items()}
    seeds, n = hits[baseline].shape
    rows = []
    for row in statistics.compare(hits, baseline):
        accuracy = Mean(row.accuracy, row.low, row.high, seeds, n)
        minutes = np.mean([seconds_of(path) for path in whole[row.variant]]) / 60
        rows.append((row.variant, str(accuracy), *against(row), f"{minutes:.1f}"))
    left = [
        f"{change} ({len(finished)} of {len(paths)} runs)"
        for change, paths in runs.items()
        if len(finished := [path for path in paths.values() if path is not None]) < len(paths)
    ]
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
