"""The page of a run, or of several side by side: one file without links, made from what their folders hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bmjax.analysis.report import figures, pictures
from bmjax.analysis.report.card import write_card
from bmjax.analysis.report.facts import Facts, read_facts
from bmjax.analysis.report.page import render
from bmjax.analysis.report.view import View
from bmjax.files import read_json, write_text
from bmjax.runs.records import interval_text, read_predictions, reported_split

if TYPE_CHECKING:
    from bmjax.runs.folder import Run

__all__ = ["figure_result", "interval_text", "write_report", "write_reports"]


def write_report(run_dir: str | Path, images: np.ndarray | None = None, run: Run | None = None) -> Path:
    """Writes report.html and model_card.md from what the run's folder holds.

    `images` uint8 [n, h, w, 3], the dataset's, adds the cells; `run`, as `load_run` gives it, the maps beside the most
    confident mistakes.

    Raises:
      FileNotFoundError: the folder holds no config.json, so it is no run.
      ValueError: a file of the folder is damaged; names it.
    """
    path = Path(run_dir) / "report.html"
    write_reports([run_dir], path, [images], [run])
    return path


def write_reports(
    run_dirs: Sequence[str | Path],
    path: Path,
    images: Sequence[np.ndarray | None] = (),
    runs: Sequence[Run | None] = (),
) -> None:
    """As `write_report`, of several runs in one page at `path`; `images` and `runs` are those of each, or none."""
    read = [read_facts(run_dir) for run_dir in run_dirs]
    missing = [None] * len(read)
    given = zip(read, images or missing, runs or missing, strict=True)
    views = [_view(i, facts, shown, run, len(read)) for i, (facts, shown, run) in enumerate(given)]
    for facts in read:
        write_card(facts)
    title = read[0].name if len(read) == 1 else f"{len(read)} runs"
    subtitle = _of_day(read[0]) if len(read) == 1 else "Runs of bmjax side by side, then each by itself."
    write_text(path, render(title, subtitle, views), errors="replace")


def _of_day(facts: Facts) -> str:
    sessions = facts.environment.get("sessions") or [{}]
    day = str(sessions[-1].get("time", ""))[:10]
    return f"A run of bmjax, trained on {day}." if day else "A run of bmjax."


def _view(i: int, facts: Facts, images: np.ndarray | None, run: Run | None, of: int) -> View:
    predictions = facts.predictions
    if predictions is None:
        return View(i, facts, pictures.Thumbnails())
    shown = images if pictures.usable(predictions, images) else None
    if run is not None and run.step != facts.metrics.get("step"):
        run = None  # maps of another checkpoint would not explain these mistakes
    found = pictures.Thumbnails() if shown is None else pictures.thumbnails(predictions, shown, pictures.MOST // of)
    return View(i, facts, found, *pictures.mistakes(predictions, shown, run))


def figure_result(run_dir: str | Path, images: np.ndarray, path: str | Path) -> None:
    """One picture of a run as PNG: cells of each class with what they were taken for, and the confusion matrix.

    `images` uint8 [n, h, w, 3] are the dataset's.

    Raises:
      FileNotFoundError: no split has been evaluated yet.
    """
    results = read_json(Path(run_dir) / "results.json")
    split = reported_split(results)
    predictions = read_predictions(run_dir, split) if split else None
    if split is None or predictions is None:
        raise FileNotFoundError(
            f"{run_dir} holds no predictions of a split that it was not trained on; expected a run with a validation "
            "split that `bmjax train` finished"
        )
    figures.save(figures.result(predictions, results[split], images), path, dpi=120)
