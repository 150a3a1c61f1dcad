"""A sweep whose cells Optuna draws."""

from __future__ import annotations

import dataclasses
import importlib.util

from bmjax.analysis.sweep.cells import Space, cells_of, draws
from bmjax.analysis.sweep.checks import checked
from bmjax.analysis.sweep.plan import Plan, Tune
from bmjax.analysis.sweep.run import Sweep, execute
from bmjax.analysis.sweep.search import opened_study
from bmjax.config.base import Config
from bmjax.runs.folder import run_folder

_BY_WEIGHTS = ("model.backbone", "model.weights", "model.preprocess")


def tune(
    config: Config,
    space: Space,
    trials: int,
    *,
    storage: str = "",
    at_once: int | None = None,
    workers: int = 1,
    experiment: str = "",
) -> Sweep:
    """Trains so many trials that Optuna draws from a space; called again, it goes on with the study.

    `storage`: a URL as Optuna takes it; empty: a SQLite file in the sweep's folder. Others as in `run_sweep`.

    Raises:
      Interrupted: a signal stopped it; called again, it goes on.
      ValueError: Optuna is not installed, there is no trial, or as `run_sweep`.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ValueError('Optuna is not installed; expected: pip install "bmjax[tune]"')
    if trials < 1:
        raise ValueError(f"--random is {trials}; expected at least 1 trial")
    (first,) = checked(cells_of(config, draws(space, 1, config.seed)))
    if not any(field.startswith(_BY_WEIGHTS) for field in space):  # then their file need not be read for each trial
        decided = {name: getattr(first.config.model, name) for name in ("backbone_options", "preprocess")}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **decided))
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    tune = Tune(storage or f"sqlite:///{(folder / 'optuna.db').resolve()}", trials, dict(space))
    plan = Plan(config, (), at_once, experiment=experiment, tune=tune)
    with opened_study(plan):
        pass  # a wrong URL is refused before anything is trained
    return execute(plan, workers)
