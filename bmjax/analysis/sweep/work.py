"""Trains the cells of a sweep in this process, beside others that work on the same folder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bmjax.analysis.several import Crew, Shared
from bmjax.analysis.sweep.cells import Cell
from bmjax.analysis.sweep.plan import Plan
from bmjax.analysis.sweep.rows import FAILED, FINISHED, PAUSED, PRUNED, Row, read_row, row_of, write_row
from bmjax.analysis.sweep.table import write_tables
from bmjax.config.experiment import load_experiment
from bmjax.runs.lock import locked
from bmjax.training.progress import Callback, Event
from bmjax.training.run import train_run
from bmjax.training.signals import Interrupted, Pausing, Signals

log = logging.getLogger(__name__)
_AGAIN = 0.5  # seconds until a cell that another process holds is asked for again


class Trainer:
    """Trains single cells, and keeps and writes their rows."""

    def __init__(self, plan: Plan):
        module = load_experiment(plan.experiment)[1] if plan.experiment else None
        self._callbacks: list[Callback] = [module.on_event] if hasattr(module, "on_event") else []  # type: ignore[union-attr]
        self._files = [Path(plan.experiment)] if module is not None else []
        self._plan, self._shared, self._lock = plan, Shared(), threading.Lock()
        self.rows: dict[str, Row] = {}
        self.beside: list[float] = []
        """Seconds that each cell trained here took beside its training."""

    def train(self, cell: Cell, signals: Signals, callbacks: Sequence[Callback], watch: Pausing) -> Row:
        """Trains a cell, from its last checkpoint where there is one; the row that it leaves. `watch` pauses it.

        Raises:
          Interrupted: a signal came.
          OSError: another process has the folder, or the disk can't be written.
        """
        began = time.perf_counter()
        error, stopped = "", None
        try:
            prepared = self._shared.prepared(cell.config) if cell.config.features.cached else None
            callbacks = [*self._callbacks, *callbacks]
            shared = {"prepared": prepared, "signals": watch, "files": self._files}
            stopped = train_run(cell.config, resume=True, callbacks=callbacks, **shared).interrupted
        except (Interrupted, OSError):
            raise
        except Exception as e:  # a loss that is not finite, options that do not fit: of this cell alone
            error = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        signals.check()
        took = time.perf_counter() - began
        return row_of(cell, FAILED if error else PAUSED if stopped else FINISHED, took, error)

    def keep(self, cell: Cell, row: Row, cells: Sequence[Cell]) -> None:
        """Writes a cell's row, and the tables with all rows there are."""
        write_row(cell, row)
        with self._lock:
            self.rows[cell.name] = row
            self.write(cells)

    def write(self, cells: Sequence[Cell]) -> None:
        """Writes the tables of these cells, with the rows that other processes left meanwhile."""
        for cell in cells:
            if cell.name not in self.rows and (row := read_row(cell)) is not None:
                self.rows[cell.name] = row
        write_tables(self._plan.folder, [self.rows[cell.name] for cell in cells if cell.name in self.rows])


class Round:
    """Trains cells to their end, or until `until` epochs; each is trained by whichever process locks it first."""

    def __init__(self, trainer: Trainer, plan: Plan, cells: Sequence[Cell], until: int | None = None):
        self._trainer, self._plan, self._cells, self._until = trainer, plan, cells, until
        # On cached features runs of one seed first, so that two at a time don't wait for the same to be compiled.
        order = sorted(cells, key=lambda cell: cell.config.seed if cell.config.features.cached else 0)
        self._waiting = [(0.0, cell) for cell in order]
        self._lock, self._crew, self._said = threading.Lock(), Crew(), False
        self._done = 0

    def run(self, at_once: int) -> None:
        """Returns when every cell has its row.

        Raises:
          Interrupted: a signal came.
        """
        self._crew.work(self._turn, min(at_once, len(self._cells)))

    def _turn(self) -> bool:
        with self._lock:
            if not self._waiting:
                return False
            ready = [i for i, (at, _) in enumerate(self._waiting) if at <= time.monotonic()]
            cell = self._waiting.pop(ready[0])[1] if ready else None
        if cell is None:
            time.sleep(0.05)
            return True
        began = time.perf_counter()
        folder = Path(cell.config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder / "claim"):
                trained = self._settle(cell)
        except BlockingIOError as e:
            if not self._said:
                self._said = True
                log.info("%s is another's (%s); this process goes on with the others", cell.name, e)
            with self._lock:
                self._waiting.append((time.monotonic() + _AGAIN, cell))
            return True
        if trained is not None:
            self._trainer.beside.append(time.perf_counter() - began - trained)
        return True

    def _settle(self, cell: Cell) -> float | None:
        """Takes the row of a cell that needs no training, or trains it and says how many seconds that took."""
        row = read_row(cell)
        if row is not None and self._is_done(row):
            with self._lock:
                self._trainer.rows[cell.name] = row
                self._done += 1
            return None
        watch, until = Pausing(self._crew.signals), self._until

        def pause(event: Event) -> None:
            if until is not None and event.kind == "epoch" and event.figures["epoch"] >= until:
                watch.pause()

        row = self._trainer.train(cell, self._crew.signals, [pause], watch)
        self._trainer.keep(cell, row, self._plan.cells)
        with self._lock:
            self._done += 1
            say(f"{self._done} of {len(self._cells)}", row)
        return row["seconds"]

    def _is_done(self, row: Row) -> bool:
        if row["status"] in (PAUSED, PRUNED):
            return self._until is not None and row["epochs"] >= self._until
        return True


def say(which: str, row: Row) -> None:
    """A line of a cell that was trained."""
    if row["status"] == FAILED:
        log.warning("%s: %s failed after %d epochs: %s", which, row["cell"], row["epochs"], row["error"])
        return
    more = "" if row["status"] == FINISHED else f", {row['status']} after {row['epochs']} epochs"
    accuracy, took = row["val/accuracy"], row["seconds"]
    log.info("%s: %s: accuracy %.3f on validation%s, %.1f s", which, row["cell"], accuracy, more, took)
