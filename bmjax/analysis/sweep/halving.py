"""Successive halving on validation: all cells train a little, the best of them longer, the best of those to the end.

Jamieson and Talwalkar 2016, https://proceedings.mlr.press/v51/jamieson16.html, with rungs of epochs. A cell goes on
from its checkpoint, with the schedule of the whole run, so that the survivors are the runs that a plain sweep gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bmjax.analysis.sweep.cells import Cell
from bmjax.analysis.sweep.plan import Plan
from bmjax.analysis.sweep.rows import FAILED, read_row, score
from bmjax.analysis.sweep.work import Round, Trainer
from bmjax.runs.records import read_records


def rungs(cells: int, epochs: int, eta: int) -> list[int]:
    """Epochs at which all but one in `eta` cells end, e.g. 27 cells of 27 epochs by 3: 1, 3, 9.

    Raises:
      ValueError: eta is less than 2.
    """
    if eta < 2:
        raise ValueError(
            f"--halving is {eta}; expected at least 2, the share of cells that goes on being one in so many"
        )
    wanted = math.ceil(math.log(cells, eta) - 1e-9)
    found = {epochs // eta**k for k in range(wanted, 0, -1)}
    return sorted(found - {0})


def score_at(cell: Cell, epochs: int) -> float:
    """The best monitored figure up to that epoch, the largest being the best, whatever the cell did afterwards."""
    monitored = f"val/best_{cell.config.train.monitor.removeprefix('-')}"
    seen = [record for record in read_records(cell.config.run_dir, "epoch") if record["epoch"] <= epochs]
    row = read_row(cell)
    # One that failed later, in another process that is ahead, was alive here.
    if not seen or (seen[-1]["epoch"] < epochs and (row is None or row["status"] == FAILED)):
        return float("-inf")
    return score({"score": seen[-1][monitored]}, cell.config.train.monitor_falls)


def promoted(cells: Sequence[Cell], epochs: int, eta: int) -> list[Cell]:
    """The best one in `eta`, at least one, in their order; of equal ones the earlier."""
    scores = {cell.name: score_at(cell, epochs) for cell in cells}
    best = sorted(cells, key=lambda cell: -scores[cell.name])[: max(1, math.ceil(len(cells) / eta))]
    return [cell for cell in cells if cell in best]


def halve(trainer: Trainer, plan: Plan, at_once: int) -> None:
    """Trains the cells rung by rung. Every process that works on the sweep comes to the same choice."""
    assert plan.halving is not None
    alive = list(plan.cells)
    total = min(sum(stage.epochs for stage in cell.config.stages) for cell in alive)
    for rung in rungs(len(alive), total, plan.halving):
        Round(trainer, plan, alive, rung).run(at_once)
        alive = promoted(alive, rung, plan.halving)
    Round(trainer, plan, alive).run(at_once)
