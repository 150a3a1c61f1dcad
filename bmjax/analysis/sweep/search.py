"""Optuna draws the cells of a sweep, one after another by what the others have found, and prunes by validation.

Every process that works on the study asks for trials of its own (Akiba et al. 2019,
https://doi.org/10.1145/3292500.3330701): TPE draws them, the median pruner ends those that fall behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bmjax.analysis.several import Crew, width
from bmjax.analysis.sweep.cells import Cell, Range, cells_of
from bmjax.analysis.sweep.checks import checked
from bmjax.analysis.sweep.plan import Plan
from bmjax.analysis.sweep.rows import FAILED, FINISHED, PAUSED, PRUNED, Row, read_row
from bmjax.analysis.sweep.work import Trainer, say
from bmjax.runs.lock import locked, waiting_for
from bmjax.training.progress import Event
from bmjax.training.signals import Pausing

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)
_AGAIN = 0.1  # seconds


@contextlib.contextmanager
def opened_study(plan: Plan) -> Iterator[optuna.Study]:
    """The study of a plan, made where there is none yet; at the end its connections are closed.

    Raises:
      ValueError: the storage can't be opened; names its URL.
    """
    import optuna

    assert plan.tune is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.ExitStack() as stack:
        try:
            storage = optuna.storages.RDBStorage(plan.tune.storage)
            stack.callback(storage.engine.dispose)
            study = optuna.create_study(
                study_name=plan.config.name,
                storage=storage,
                direction="minimize" if plan.config.train.monitor_falls else "maximize",
                pruner=optuna.pruners.MedianPruner(),
                load_if_exists=True,
            )
        except Exception as e:  # SQLAlchemy's, Optuna's, those of a database's own module
            url = re.sub(r"(://[^/@]*:)[^/]*@", r"\1***@", plan.tune.storage)  # without its password
            why = " ".join(str(e).partition("(Background on")[0].split())
            raise ValueError(
                f"--optuna is {url!r}: {why}; expected a database as SQLAlchemy takes it, such as sqlite:///study.db"
            ) from e
        yield study


def search(trainer: Trainer, plan: Plan) -> list[Cell]:
    """Trains trials in this process until the study has as many as planned; the cells of all.

    Raises:
      Interrupted: a signal came.
    """
    with opened_study(plan) as study:
        searching = _Search(trainer, plan, study)
        searching.crew.work(searching.turn, width(plan.at_once, plan.config.features.cached))
        return [cell for cell in searching.cells() if read_row(cell) is not None]


class _Search:
    def __init__(self, trainer: Trainer, plan: Plan, study: optuna.Study):
        import optuna

        assert plan.tune is not None
        self._trainer, self._plan, self._tune = trainer, plan, plan.tune
        self._states, self._trial_of = optuna.trial.TrialState, optuna.trial.Trial
        self._sampler = optuna.samplers.TPESampler
        self._study = study
        self.crew = Crew()

    def turn(self) -> bool:
        """Trains one trial, a new one or one that a killed process has left; False when all are done."""
        with contextlib.ExitStack() as stack:
            with waiting_for(self._plan.folder / "optuna.lock", _AGAIN / 2):
                trial = self._adopted(stack) or self._asked(stack)
            if trial is not None:
                self._settle(trial)
                return True
        if not self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            return False
        time.sleep(_AGAIN)  # others are at the last ones
        return True

    def _adopted(self, stack: contextlib.ExitStack) -> optuna.Trial | None:
        for frozen in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            if self._claim(frozen.number, stack):
                return self._trial_of(self._study, frozen._trial_id)
        return None

    def _asked(self, stack: contextlib.ExitStack) -> optuna.Trial | None:
        drawn = len(self._study.get_trials(deepcopy=False))
        if drawn >= self._tune.trials:
            return None
        # Seeded by the trial: workers draw different ones, and a study by one process is the same each time.
        self._study.sampler = self._sampler(seed=self._plan.config.seed * 100_003 + drawn)
        trial = self._study.ask()
        self._claim(trial.number, stack)
        self._changes(trial)  # so that they are in the storage before anyone else draws
        return trial

    def _claim(self, number: int, stack: contextlib.ExitStack) -> bool:
        folder = self._plan.folder / f"trial{number}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(folder / "claim"))
        except BlockingIOError:
            return False
        return True

    def _changes(self, trial: Any) -> dict[str, Any]:
        """The fields of a trial, drawn where they are not yet."""
        found: dict[str, Any] = {}
        for field, values in self._tune.space.items():
            if not isinstance(values, Range):
                options = {v if isinstance(v, (str, int, float, type(None))) else json.dumps(v): v for v in values}
                found[field] = options[trial.suggest_categorical(field, list(options))]
            elif values.whole:
                found[field] = trial.suggest_int(field, int(values.low), int(values.high), log=values.log)
            else:
                found[field] = trial.suggest_float(field, values.low, values.high, log=values.log)
        return found

    def _cell(self, trial: Any) -> Cell:
        return cells_of(self._plan.config, [{**self._changes(trial), "name": f"trial{trial.number}"}])[0]

    def cells(self) -> list[Cell]:
        """The cells of all trials that have one."""
        found = []
        for frozen in self._study.get_trials():
            with contextlib.suppress(ValueError):
                found.append(self._cell(frozen))
        return found

    def _settle(self, trial: optuna.Trial) -> None:
        try:
            (cell,) = checked([self._cell(trial)])
        except ValueError as e:  # values that don't go together
            log.warning("trial %d can't be trained: %s", trial.number, " ".join(str(e).split())[:300])
            self._study.tell(trial.number, state=self._states.FAIL)
            return
        row = read_row(cell)
        if row is None:
            began = time.perf_counter()
            row = self._train(trial, cell)
            self._trainer.keep(cell, row, self.cells())
            self._trainer.beside.append(time.perf_counter() - began - row["seconds"])
            say(f"{trial.number + 1} of {self._tune.trials}", row)
        if row["status"] == FINISHED:
            self._study.tell(trial.number, row["score"])
        else:
            state = self._states.FAIL if row["status"] == FAILED else self._states.PRUNED
            self._study.tell(trial.number, state=state)

    def _train(self, trial: optuna.Trial, cell: Cell) -> Row:
        watch = Pausing(self.crew.signals)
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        monitored = f"val/best_{cell.config.train.monitor.removeprefix('-')}"

        def report(event: Event) -> None:
            if event.kind != "epoch":
                return
            epoch = event.figures["epoch"]
            if epoch not in known:  # else by a process that was killed before its next checkpoint
                trial.report(event.figures[monitored], epoch)
            if trial.should_prune():
                watch.pause()

        row = self._trainer.train(cell, self.crew.signals, [report], watch)
        return row | {"status": PRUNED} if row["status"] == PAUSED else row
