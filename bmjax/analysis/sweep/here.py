"""What one process does for a sweep."""

from __future__ import annotations

import logging

from bmjax.analysis.several import width
from bmjax.analysis.sweep.halving import halve
from bmjax.analysis.sweep.plan import Plan
from bmjax.analysis.sweep.rows import Row
from bmjax.analysis.sweep.search import search
from bmjax.analysis.sweep.work import Round, Trainer

log = logging.getLogger(__name__)


def train_here(plan: Plan) -> list[Row]:
    """Trains the cells in this process, beside others on the same folder; every cell's row.

    Raises:
      Interrupted: a signal came.
    """
    trainer = Trainer(plan)
    if plan.tune is not None:
        cells = search(trainer, plan)
    else:
        cells = list(plan.cells)
        at_once = width(plan.at_once, all(cell.config.features.cached for cell in cells))
        if plan.halving is not None:
            halve(trainer, plan, at_once)
        else:
            Round(trainer, plan, cells).run(at_once)
    trainer.write(cells)
    if trainer.beside:
        most = max(trainer.beside)
        mean = sum(trainer.beside) / len(trainer.beside)
        log.info("beside training, the sweep took %.2f s a cell (at most %.2f)", mean, most)
    return [trainer.rows[cell.name] for cell in cells]
