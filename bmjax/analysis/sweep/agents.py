"""A sweep as a configuration for W&B, whose agents then call `bmjax train`.

The form: https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.analysis.sweep.cells import Cell, Range, Space
from bmjax.config.base import Config
from bmjax.files import write_text
from bmjax.runs.folder import run_folder
from bmjax.runs.tracking import project_of, register_sweep, shown_as

log = logging.getLogger(__name__)
_ETA = 3


def space_of(cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """The space whose every combination these cells are.

    Raises:
      ValueError: they are no grid, which is all that W&B can be told.
    """
    fields = list(dict.fromkeys(field for cell in cells for field in cell.changes))
    space = {f: list({repr(c.changes.get(f)): c.changes.get(f) for c in cells}.values()) for f in fields}
    whole = all(set(cell.changes) == set(fields) for cell in cells)
    if not whole or math.prod(map(len, space.values())) != len(cells):
        raise ValueError("the experiment's sweep() is no grid of values; expected one, or --grid, for a sweep of W&B")
    return space


def _parameter(values: Sequence[Any] | Range) -> dict[str, Any]:
    if not isinstance(values, Range):
        return {"value": values[0]} if len(values) == 1 else {"values": list(values)}
    kinds = {
        (False, False): {"distribution": "uniform"},
        (False, True): {"distribution": "log_uniform_values"},
        (True, False): {"distribution": "int_uniform"},
        (True, True): {"distribution": "q_log_uniform_values", "q": 1},
    }
    return kinds[values.whole, values.log] | {"min": values.low, "max": values.high}


def configuration(
    config: Config, space: Space, arguments: Sequence[str], *, runs: int | None = None, halving: int | None = None
) -> dict[str, Any]:
    """What W&B is told: the command of a run, `bmjax train` with these arguments and the agent's, the values or
    distributions of each field, and the figure that every run logs. `runs` caps the draws.

    A grid is searched whole; draws are random, or Bayesian where there is no cap. Those end early by Hyperband, a grid
    only where `halving` asks for it.

    Raises:
      ValueError: the runs would open the test split.
    """
    if config.train.final_test or "train.final_test" in space:
        raise ValueError("train.final_test is true; a sweep chooses on validation and refuses to read the test split")
    monitor, falls = config.train.monitor.removeprefix("-"), config.train.monitor_falls
    ranges = any(isinstance(values, Range) for values in space.values())
    method = "random" if runs is not None else "bayes" if ranges else "grid"
    tracking = [] if any(a.startswith("--tracking.wandb") for a in arguments) else ["--tracking.wandb=auto"]
    tree: dict[str, Any] = {
        "name": config.name,
        "program": "bmjax",
        "command": ["${env}", "${program}", "train", *arguments, *tracking, "${args}"],
        "method": method,
        "metric": {"name": shown_as("epoch", f"val/best_{monitor}"), "goal": "minimize" if falls else "maximize"},
        "parameters": {field: _parameter(values) for field, values in space.items()},
    }
    if runs is not None:
        tree["run_cap"] = runs
    epochs, eta = sum(stage.epochs for stage in config.stages), halving or _ETA
    if (method != "grid" or halving is not None) and epochs >= eta:
        tree["early_terminate"] = {"type": "hyperband", "min_iter": max(1, epochs // eta**2), "eta": eta}
    return tree


def write_and_register(config: Config, tree: dict[str, Any]) -> tuple[Path, str | None]:
    """Writes wandb-sweep.yaml into the sweep's folder and registers it where there is a server: (the file, the id)."""
    import yaml

    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wandb-sweep.yaml"
    write_text(path, yaml.safe_dump(tree, sort_keys=False))
    return path, register_sweep(tree, project_of(config.tracking), config.tracking.entity)
