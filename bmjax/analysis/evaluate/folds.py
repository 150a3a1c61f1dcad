"""Repeated k-fold cross-validation: a run for each fold, which share caches, and what their figures say together."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.compare.statistics import corrected_resampled_interval
from bmjax.analysis.several import Failure, Shared, attempt, refuse
from bmjax.config.base import Config
from bmjax.data.splits import cross_validation, groups_in
from bmjax.files import write_text
from bmjax.runs.folder import run_folder
from bmjax.runs.records import Predictions, read_predictions
from bmjax.training.progress import Callback
from bmjax.training.run import Result, complete, train_run

log = logging.getLogger(__name__)
_HELPS = (
    "other settings, under another --name or --run_dir, for a fold's folder keeps those it began with. Finished folds "
    "are kept: called again, they are not trained again."
)
FIGURES = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")


@dataclasses.dataclass(frozen=True)
class Folds:
    """`rows`: of each fold its repeat, fold, n, figures and run folder. `means`: (mean, low, high) by figure, 95 %."""

    folds: int
    repeats: int
    rows: list[dict[str, Any]]
    means: dict[str, tuple[float, float, float]]
    interrupted: str | None = None


def fold_configs(config: Config, k: int, repeats: int) -> list[Config]:
    """The configuration of each fold, in a folder of its own within the experiment's.

    Raises:
      ValueError: k or repeats is too small, or the experiment names folds of its own.
    """
    if k < 2:
        raise ValueError(f"--k is {k}; expected at least 2 folds")
    if repeats < 1:
        raise ValueError(f"--repeats is {repeats}; expected at least 1")
    if config.data.folds:
        raise ValueError(f"config field 'data.folds' is {config.data.folds}; expected 0, for the command sets it")
    base, configs = run_folder(config), []
    for change in cross_validation(k, repeats):
        repeat, fold = change["data.split_seed"], change["data.fold"]
        seed = config.data.split_seed + repeat
        name = f"repeat{repeat}-fold{fold}"
        configs.append(
            dataclasses.replace(
                config,
                name=f"{config.name}-{name}",
                run_dir=str(base / name),
                data=dataclasses.replace(config.data, folds=k, fold=fold, split_seed=seed),
                train=dataclasses.replace(config.train, final_test=True),
            )
        )
    return configs


def run_folds(config: Config, k: int = 5, repeats: int = 1) -> Folds:
    """Trains each fold that is not finished, and tests it on the images that it left out.

    Resumable: a finished fold is read, one under way goes on. The figures are honest if nothing in the configuration
    was chosen by these images.

    Raises:
      ValueError: as `fold_configs`, the configuration is wrong, or, once the others are trained, folds failed in
        training; names them.
    """
    configs, shared, rows = fold_configs(config, k, repeats), Shared(), []
    failures: list[Failure] = []
    for one in configs:

        def train(begun: Callback, one: Config = one) -> Result:
            prepared = shared.prepared(complete(one)) if one.features.cached else None
            return train_run(one, resume=True, callbacks=[begun], prepared=prepared)

        repeat = one.data.split_seed - config.data.split_seed
        result = attempt(f"repetition {repeat}, fold {one.data.fold}", one, train)
        if isinstance(result, Failure):
            failures.append(result)
            log.warning("%s", result)
            continue
        if result.interrupted:
            return Folds(k, repeats, rows, {}, result.interrupted)
        m = result.metrics["test"]
        figures = {name: m[name] for name in FIGURES}
        rows.append({"repeat": repeat, "fold": one.data.fold, "n": m["n"]})
        rows[-1] |= figures | {"run_dir": str(result.run_dir)}
        log.info("%s: accuracy %.3f on %d images left out", result.run_dir, m["accuracy"], m["n"])
    refuse(failures, len(configs), "fold", _HELPS)
    found = Folds(k, repeats, rows, _means(rows, k, config.data.split))
    write_text(run_folder(config) / "folds.json", json.dumps(dataclasses.asdict(found), indent=2))
    return found


def _means(
    rows: list[dict[str, Any]], k: int, split: tuple[float, float, float]
) -> dict[str, tuple[float, float, float]]:
    found = {}
    # Images tested by over images trained on: of those that a fold leaves, validation takes its share.
    ratio = 1 / (k - 1) * (split[0] + split[1]) / split[0]
    for name in FIGURES:
        low, high = corrected_resampled_interval([row[name] for row in rows], ratio)
        most = np.inf if name == "loss" else 1.0
        found[name] = (float(np.mean([row[name] for row in rows])), max(low, 0.0), min(high, most))
    return found


def left_out(found: Folds, repeat: int = 0) -> Predictions:
    """Every image of the data once, as the fold said that had left it out; `split` is "folds".

    Raises:
      ValueError: a fold has no predictions.
    """
    parts = []
    for row in found.rows:
        if row["repeat"] == repeat:
            part = read_predictions(Path(row["run_dir"]), "test")
            if part is None:
                raise ValueError(f"{row['run_dir']} has no predictions of the test split; expected a finished fold")
            parts.append(part)
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("probs", "labels", "index", "ids")}
    order = np.argsort(arrays["index"], kind="stable")
    return Predictions("folds", **{name: array[order] for name, array in arrays.items()}, classes=parts[0].classes)


def groups_of(found: Folds, predictions: Predictions) -> list[str]:
    """The group of each image that was left out, as the folds' split.csv has it; empty where the data name none."""
    return groups_in(Path(found.rows[0]["run_dir"]) / "split.csv", predictions.ids.tolist())


def text(found: Folds) -> str:
    """The folds as a table, and the means."""
    lines = ["repeat  fold     n" + "".join(name.rjust(19) for name in FIGURES)]
    for row in found.rows:
        figures = "".join(f"{row[name]:.3f}".rjust(19) for name in FIGURES)
        lines.append(f"{row['repeat']:6}{row['fold']:6}{row['n']:6}{figures}")
    lines.append(f"mean over {len(found.rows)} folds, 95 % interval by the corrected resampled t:")
    lines += [f"  {name:18} {m:.3f} ({low:.3f} to {high:.3f})" for name, (m, low, high) in found.means.items()]
    return "\n".join(lines)
