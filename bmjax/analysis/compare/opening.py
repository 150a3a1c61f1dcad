"""The test split of a comparison: opened once, at the end, for all runs, and counted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import jax

from bmjax.config.base import Config
from bmjax.data.dataset import Dataset
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.folder import Run, load_data, load_run, record_opening, saved_results
from bmjax.training import hosts
from bmjax.training.cached import MapPredictor
from bmjax.training.predict import Predictor, evaluate_run
from bmjax.training.run import Prepared
from bmjax.training.signals import Signals

log = logging.getLogger(__name__)


def open_test(
    folder: Path, configs: dict[str, list[Config]], prepare: Callable[[Config], Prepared], signals: Signals
) -> int:
    """Evaluates on the test split whatever run of these was not yet, each by its best checkpoint.

    `prepare` gives what runs on cached features share. The opening is recorded in the comparison's folder, and in
    each run's; returns how often the test split has been opened for this comparison.

    Raises:
      Interrupted: a signal came between two runs.
    """
    waiting = [(row, run) for row, runs in configs.items() for run in runs if not is_opened(run)]
    if waiting:
        log.info("the test split is opened for %d runs", len(waiting))
        if hosts.leads():
            record_opening(folder, len(waiting))
    dataset: Dataset | None = None
    predictors: dict[str, Predictor] = {}
    for row, run in sorted(waiting, key=lambda pair: pair[1].data.fold):
        signals.check()
        if run.features.cached:
            shared = prepare(run)
            predictor = MapPredictor(run, shared.programs, shared.features)
            evaluate_run(_trained(run, shared), "test", "best", predictor, shared.dataset, shared.splits)
        else:
            found = load_run(run.run_dir)
            predictors[row] = predictors.get(row) or Predictor(run, found.model, signals)
            dataset, splits = load_data(found.run_dir, run, dataset)
            evaluate_run(found, "test", "best", predictors[row], dataset, splits)
    path = folder / "openings.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 1  # runs of earlier versions opened it themselves


def is_opened(run: Config) -> bool:
    """Whether the run's test predictions are there, by its best checkpoint."""
    results = saved_results(Path(run.run_dir))
    return "test" in results and results["test"]["step"] == results.get("val", {}).get("step")


def _trained(run: Config, shared: Prepared) -> Run:
    """As `load_run`, without building the network again for each of hundreds of runs."""
    template = jax.eval_shape(shared.programs.init, 0)
    template = {name: tree | shared.features.backbone.get(name, {}) for name, tree in template.items()}
    with contextlib.closing(Checkpoints(Path(run.run_dir) / "checkpoints" / "best")) as kept:
        step = kept.latest()
        if step is None:
            raise FileNotFoundError(f"{kept.folder} holds no finished checkpoint; expected one of a finished run")
        variables = kept.restore_variables(step, template, run.train.ema_decay is not None)
    return Run(Path(run.run_dir), run, shared.programs.model, variables, shared.dataset.classes, step)
