"""A sweep: trains the cells that are not trained yet and sets them side by side, on validation.

runs/<name>/<cell> is the run of each; runs/<name>/results.csv and .parquet hold a row for each, sweep.html the page.
Called again it goes on where it was, and any number of processes may work on one folder (docs/sweeps.md).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from bmjax.analysis.sweep import plan as plans
from bmjax.analysis.sweep.cells import Cell
from bmjax.analysis.sweep.checks import checked
from bmjax.analysis.sweep.here import train_here
from bmjax.analysis.sweep.page import write_page
from bmjax.analysis.sweep.plan import Plan
from bmjax.analysis.sweep.rows import FAILED, FINISHED, Row, read_row, score
from bmjax.analysis.sweep.table import ranked
from bmjax.analysis.sweep.workers import run_workers
from bmjax.config.base import Config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep leaves: a row for each cell, in their order. `monitor` is the validation figure that picks."""

    folder: Path
    fields: tuple[str, ...]
    monitor: str
    falls: bool
    rows: list[Row]

    @property
    def best(self) -> Row | None:
        """The finished cell with the best validation figure; None where none is finished."""
        finished = [row for row in self.rows if row["status"] == FINISHED]
        return max(finished, key=lambda row: score(row, self.falls), default=None)

    @property
    def ranked(self) -> list[Row]:
        """The rows, the best first."""
        return ranked(self.rows, self.falls)


def run_sweep(
    config: Config,
    cells: Sequence[Cell],
    *,
    at_once: int | None = None,
    workers: int = 1,
    retry: bool = False,
    halving: int | None = None,
    experiment: str = "",
) -> Sweep:
    """Trains what is not trained yet; a cell that fails is a row with its error, and not trained again but by `retry`.

    `at_once`: cells at a time in one process, on cached features. `workers`: processes, each with its share of cores
    or its own GPU. `halving`: successive halving by that factor (`halving.halve`). `experiment`: the file whose
    `on_event` every cell calls.

    Raises:
      Interrupted: a signal stopped it; called again, it goes on.
      ValueError: a cell would open the test split or can't be made, cells are picked by different figures, or a
        folder holds a run of another configuration; nothing is trained then.
    """
    cells = checked(cells)
    for cell in cells:
        row = read_row(cell)
        if retry and row is not None and row["status"] == FAILED:
            (Path(cell.config.run_dir) / "row.json").unlink()
    return execute(Plan(config, tuple(cells), at_once, halving, experiment), workers)


def execute(plan: Plan, workers: int = 1) -> Sweep:
    """Does what a plan says, in this process or by workers; writes the tables and the page."""
    began = time.perf_counter()
    plans.save(plan)
    if workers == 1:
        rows = train_here(plan)
    else:
        run_workers(plan, workers)
        rows = train_here(plan)  # reads the rows; trains what a worker that died has left
    train = plan.config.train
    sweep = Sweep(plan.folder, tuple(plan.fields), train.monitor, train.monitor_falls, rows)
    write_page(sweep)
    log.info(
        "%d cells in %.1f min; page: %s", len(rows), (time.perf_counter() - began) / 60, plan.folder / "sweep.html"
    )
    return sweep
