"""What W&B is shown of a finished run: tables and diagrams. The module wandb is handed in by the tracker."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.files import printable
from bmjax.runs.curves import GRID, precision_recall, roc
from bmjax.runs.records import Predictions, class_rows, most_wrong

MISTAKES, MOST_ROWS = 100, 10_000
"""Mispredicted cells shown, and rows of a table that W&B takes."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a finished run hands its trackers: the metrics of each split, the predictions of the last one evaluated,
    pictures uint8 [n, h, w, 3] of its most confident mistakes (see `most_wrong`), and the pages of HTML to show."""

    run_dir: Path
    results: dict[str, dict[str, Any]]
    predictions: Predictions
    images: np.ndarray
    pages: tuple[Path, ...] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """Each split's figures by the best checkpoint, and which that is."""
        found = {f"{s}/{k}": v for s, m in self.results.items() for k, v in m.items() if isinstance(v, (int, float))}
        return found | {"best/step": self.results[self.predictions.split]["step"]}


def media_of(wandb: Any, finished: Finished) -> dict[str, Any]:
    """Tables, diagrams and pages by the names that W&B shows them under."""
    p, names = finished.predictions, [printable(name) for name in finished.predictions.classes]
    metrics = finished.results[p.split]
    matrix = wandb.plot.confusion_matrix(y_true=p.labels.tolist(), preds=p.predicted.tolist(), class_names=names)
    found = {
        "confusion": matrix,
        "classes": _classes(wandb, metrics, p),
        "roc": _curve(wandb, p, names, roc, ("false positive rate", "sensitivity")),
        "pr": _curve(wandb, p, names, precision_recall, ("sensitivity", "precision")),
        "predictions": _predictions(wandb, p, names),
        "mispredicted": _mistakes(wandb, finished, names),
    }
    return found | {page.stem: wandb.Html(page.read_text(encoding="utf-8"), inject=False) for page in finished.pages}


def _classes(wandb: Any, metrics: dict[str, Any], p: Predictions) -> Any:
    figures = ("n", "recall", "recall_low", "recall_high", "precision", "f1")
    table = wandb.Table(columns=["class", *figures, "most often taken for"])
    for row in class_rows(metrics, p.classes):
        taken = printable(row["confused"][0]) if row["confused"] else ""
        table.add_data(printable(row["name"]), *(row[name] for name in figures), taken)
    return table


def _curve(wandb: Any, p: Predictions, names: list[str], curve: Any, axes: tuple[str, str]) -> Any:
    table = wandb.Table(columns=["class", "x", "y"])
    for c, name in enumerate(names):
        for x, y in zip(GRID, curve(p.labels == c, p.probs[:, c]), strict=True):
            if np.isfinite(y):
                table.add_data(name, round(float(x), 4), round(float(y), 4))
    titles = {"title": f"{axes[1]} by {axes[0]}, {p.split}", "x-axis-title": axes[0], "y-axis-title": axes[1]}
    return wandb.plot_table("wandb/area-under-curve/v0", table, {"x": "x", "y": "y", "class": "class"}, titles)


def _predictions(wandb: Any, p: Predictions, names: list[str]) -> Any:
    """A row an image, as many as W&B takes; all are in predictions_<split>.npz of the artifact."""
    table = wandb.Table(columns=["id", "true", "predicted", "right", "confidence", *(f"p {name}" for name in names)])
    for i in range(min(len(p.labels), MOST_ROWS)):
        true, top = int(p.labels[i]), int(p.predicted[i])
        probs = [round(float(v), 5) for v in p.probs[i]]
        table.add_data(printable(p.ids[i]), names[true], names[top], true == top, probs[top], *probs)
    return table


def _mistakes(wandb: Any, finished: Finished, names: list[str]) -> Any:
    p = finished.predictions
    table = wandb.Table(columns=["id", "cell", "true", "predicted", "probability"])
    for row, image in zip(most_wrong(p, len(finished.images)), finished.images, strict=True):
        true, top = names[p.labels[row]], names[p.predicted[row]]
        table.add_data(printable(p.ids[row]), wandb.Image(image), true, top, float(p.confidence[row]))
    return table


# What a run needs to be loaded, evaluated and read elsewhere; not the state to resume from, traces and W&B's own files.
_KEPT = ("config.json", "environment.json", "dataset.json", "split.csv", "results.json", "metrics.jsonl")
_KEPT += ("openings.jsonl", "calibration*.json", "reference.npz", "evaluation_*.json", "predictions_*.npz")
_KEPT += ("report.html", "model_card.md", "code/**/*")


def run_files(run_dir: Path) -> list[Path]:
    """The files of a run's folder that make it whole elsewhere, with the newest of its best checkpoints."""
    best = run_dir / "checkpoints" / "best"
    steps = sorted((p for p in best.glob("*") if p.name.isdecimal()), key=lambda p: int(p.name))
    found = [path for pattern in _KEPT for path in run_dir.glob(pattern)]
    # The item `train` is the optimizer's, to go on from; whoever reads a run needs the model alone.
    found += [path for step in steps[-1:] for item in step.glob("*") if item.name != "train"
              for path in (item, *item.rglob("*"))]  # fmt: skip
    # A checkpoint may hold empty folders, which no store keeps and none needs.
    return sorted({path for path in found if path.is_file() and not path.is_symlink()})
