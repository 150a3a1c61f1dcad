"""Reads a run's folder, finished or not: records, results, predictions, and what follows from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.files import read_npz
from bmjax.runs.intervals import wilson_interval

SPLITS = ("test", "val", "train")
REPORTED = SPLITS[:2]
"""Splits that a report dwells on, never train: what a network remembers would pass for what it can do."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """predictions_<split>.npz: probs float32 [n, k], labels int [n], index int [n] (rows of the dataset), ids [n]."""

    split: str
    probs: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    ids: np.ndarray
    classes: tuple[str, ...]

    @property
    def predicted(self) -> np.ndarray:
        """The class with the highest probability, int [n]."""
        return self.probs.argmax(-1)

    @property
    def confidence(self) -> np.ndarray:
        """The highest probability, [n]."""
        return self.probs.max(-1)


def read_records(run_dir: str | Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind ("train", "epoch") in metrics.jsonl; a torn last line is passed over.

    Raises:
      ValueError: another line is damaged; names the file and the line.
    """
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
            if record["kind"] == kind:
                records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise ValueError(
                f"{path} is damaged in line {number}: {line[:40]!r}; expected a JSON object with a 'kind'. "
                "Remove the line"
            ) from e
    return records


def read_predictions(run_dir: str | Path, split: str) -> Predictions | None:
    """The predictions of a split, or None where it was not evaluated.

    Raises:
      ValueError: the file is damaged; names it and the remedy.
    """
    path = Path(run_dir) / f"predictions_{split}.npz"
    if not path.is_file():
        return None
    remedy = f"`bmjax eval RUN --split {split}` writes it again"
    try:
        arrays = read_npz(path, ("probs", "labels", "index", "ids", "classes"))
    except ValueError as e:
        raise ValueError(f"{e}; {remedy}") from e
    n, k = len(arrays["ids"]), arrays["classes"].size
    expected = {"probs": ("f", (n, k)), "labels": ("iu", (n,)), "index": ("iu", (n,)), "ids": ("U", (n,))}
    for name, (kinds, shape) in (expected | {"classes": ("U", (k,))}).items():
        if arrays[name].shape != shape or arrays[name].dtype.kind not in kinds:
            found = f"{arrays[name].dtype} {arrays[name].shape}"
            raise ValueError(f"{path}: array {name!r} is {found}; expected shape {shape}; {remedy}")
    classes = tuple(map(str, arrays.pop("classes")))
    return Predictions(split, **arrays, classes=classes)


def reported_split(results: dict[str, Any]) -> str | None:
    """The split that a report dwells on: test where it was opened, else validation; None of a run without."""
    return next((split for split in REPORTED if split in results), None)


def interval_text(metrics: dict[str, Any], name: str) -> str:
    """`0.812 (0.771 to 0.848)`: a figure with its 95 % interval, where it has one."""
    text = f"{metrics[name]:.3f}"
    if f"{name}_low" in metrics:
        text += f" ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"
    return text


def most_wrong(predictions: Predictions, limit: int) -> np.ndarray:
    """Places in the predictions of the wrong ones, the most confident first, int [<= limit]."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:limit]


def most_confident(predictions: Predictions, limit: int) -> np.ndarray:
    """Places in the predictions of the right ones, the most confident first, int [<= limit]."""
    right = np.flatnonzero(predictions.predicted == predictions.labels)
    return right[np.argsort(-predictions.confidence[right], kind="stable")][:limit]


@dataclasses.dataclass(frozen=True)
class Bin:
    """Predictions of about one confidence; low and high bound the accuracy, 95 %."""

    n: int
    confidence: float
    accuracy: float
    low: float
    high: float


def reliability(predictions: Predictions, bins: int = 10) -> list[Bin]:
    """Accuracy by confidence, in bins of equal width that hold anything (Guo et al. 2017)."""
    confidence, hit = predictions.confidence, predictions.predicted == predictions.labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    found = []
    for i in np.unique(which):
        rows = which == i
        low, high = wilson_interval(int(hit[rows].sum()), int(rows.sum()))
        found.append(Bin(int(rows.sum()), float(confidence[rows].mean()), float(hit[rows].mean()), low, high))
    return found


def class_rows(metrics: dict[str, Any], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row per class: name, n, precision, recall with recall_low and recall_high (95 %; Wilson's where the figures
    have none), f1, and `confused`: the class it is most often taken for with the count, or None."""
    rows = []
    for i, (name, figures) in enumerate(zip(classes, metrics["per_class"], strict=True)):
        others = np.array(metrics["confusion"][i])
        hits, others[i] = int(others[i]), 0
        low, high = wilson_interval(hits, figures["n"]) if figures["n"] else (0.0, 1.0)
        confused = (classes[int(others.argmax())], int(others.max())) if others.any() else None
        rows.append({"name": name, "recall_low": low, "recall_high": high, **figures, "confused": confused})
    return rows
