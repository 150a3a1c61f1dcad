"""A row for each cell of a sweep: kept in the cell's folder as row.json, so that a finished cell is known by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.sweep.cells import Cell
from bmjax.files import read_json, write_text
from bmjax.runs.folder import saved_results
from bmjax.runs.intervals import wilson_interval
from bmjax.runs.records import read_records

FINISHED, PAUSED, PRUNED, FAILED = "finished", "paused", "pruned", "failed"
Row = dict[str, Any]
TIMES = ("seconds", "images_per_second")
"""Columns that differ between two runs of the same cell."""


def read_row(cell: Cell) -> Row | None:
    """The row of a cell that was finished, paused, pruned or failed; None of one that was not."""
    row = read_json(Path(cell.config.run_dir) / "row.json")
    return row or None


def write_row(cell: Cell, row: Row) -> None:
    """Keeps a cell's row."""
    folder = Path(cell.config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "row.json", json.dumps(row, indent=2))


def row_of(cell: Cell, status: str, seconds: float, error: str = "") -> Row:
    """The row of a cell by what stands in its folder.

    Of a finished run: every number of its results on train and val, with n and intervals, by the best epoch. Of one
    that was paused or pruned: the validation figures of its best epoch so far.
    """
    row: Row = {"cell": cell.name, **cell.changes, "status": status, "error": error, "run_dir": cell.config.run_dir}
    folder = Path(cell.config.run_dir)
    epochs = read_records(folder, "epoch")
    monitored = f"val/best_{cell.config.train.monitor.removeprefix('-')}"
    row["epochs"] = epochs[-1]["epoch"] if epochs else 0
    if epochs and status != FAILED:
        results = {split: m for split, m in saved_results(folder).items() if split in ("train", "val")}
        best = _best_epoch(epochs, monitored, results if status == FINISHED else {})
        row |= {"score": epochs[-1][monitored], "best_epoch": best["epoch"]}
        row |= _whole(results) if status == FINISHED else _so_far(best)
    speeds = [record["images_per_second"] for record in read_records(folder, "train")]
    return row | {"seconds": round(seconds, 3), "images_per_second": float(np.median(speeds)) if speeds else None}


def _best_epoch(epochs: list[Row], monitored: str, results: dict[str, Any]) -> Row:
    if results:
        return next(record for record in epochs if record["step"] == results["val"]["step"])
    best = epochs[-1][monitored]
    return next((record for record in epochs if record[monitored] == best), epochs[-1])  # none equals NaN


def _whole(results: dict[str, dict[str, Any]]) -> Row:
    numbers = {f"{s}/{name}": v for s, m in results.items() for name, v in m.items() if isinstance(v, (int, float))}
    return {name: value for name, value in numbers.items() if not name.endswith("/step")}


def _so_far(record: Row) -> Row:
    found = {name: value for name, value in record.items() if name.startswith("val/") and "/best_" not in name}
    low, high = wilson_interval(round(found["val/accuracy"] * found["val/n"]), found["val/n"])
    return found | {"val/accuracy_low": low, "val/accuracy_high": high}


def score(row: Row, falls: bool) -> float:
    """What cells are sorted by, the largest first: the monitored figure of the best epoch; of a failed cell -inf."""
    value = row.get("score")
    if value is None or value != value:
        return float("-inf")
    return -value if falls else value
