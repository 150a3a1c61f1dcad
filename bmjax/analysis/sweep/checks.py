"""What is checked of a sweep's cells before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bmjax.analysis.sweep.cells import Cell
from bmjax.config.data import DataConfig
from bmjax.config.model import ModelConfig
from bmjax.data.load import check_sides
from bmjax.model.create import resolve
from bmjax.runs.folder import check_folder
from bmjax.training.run import complete


def checked(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with their configurations complete, after every check that can be made before anything is trained.

    Raises:
      ValueError, FileNotFoundError: a cell would open the test split, has no validation or can't be made, cells are
        picked by different figures, or a folder holds a run of another configuration.
    """
    monitors = {cell.config.train.monitor for cell in cells}
    if len(monitors) != 1:
        raise ValueError(f"train.monitor is {', '.join(sorted(monitors))}; expected one figure that picks among cells")
    found = []
    models: dict[str, ModelConfig] = {}
    data: list[DataConfig] = []
    for cell in cells:
        if cell.config.train.final_test:
            raise ValueError(
                f"cell {cell.name}: train.final_test is true; a sweep chooses between its cells on validation and "
                "refuses to read the test split, for a choice among tested models is no longer tested. Expected false; "
                "open it once, for the cell that you choose: bmjax eval FOLDER --split test"
            )
        if cell.config.data not in data:
            check_sides(cell.config.data, ("val",), "a sweep")
            data.append(cell.config.data)
        full = complete(dataclasses.replace(cell.config, model=_resolved(cell.config.model, models)))
        check_folder(Path(full.run_dir), full, resume=True)
        found.append(dataclasses.replace(cell, config=full))
    return found


def _resolved(model: ModelConfig, known: dict[str, ModelConfig]) -> ModelConfig:
    """The model with what its weights decide, whose file is read once for all cells that have it."""
    key = repr((model.backbone, model.backbone_options, model.weights, model.preprocess))
    if key not in known:
        known[key] = resolve(model)
    decided = known[key]
    return dataclasses.replace(model, backbone_options=decided.backbone_options, preprocess=decided.preprocess)
