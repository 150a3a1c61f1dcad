"""report.html of a run's folder: one file without links, made from whatever the folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.report import figures
from bmjax.analysis.report import html as page
from bmjax.files import read_json
from bmjax.runs.records import Predictions, class_rows, interval_text, read_predictions, read_records, reported_split

__all__ = ["figure_result", "interval_text", "write_report"]

_NAMES = {"train": "Training split", "val": "Validation", "test": "Test"}


def _head(config: dict[str, Any], data: dict[str, Any]) -> str:
    model = config.get("model", {})
    weights = model.get("weights")
    parts = [f"{model.get('backbone', '?')}, {f'weights {Path(weights).name}' if weights else 'random weights'}"]
    parts.append(f"attention {model.get('attention', '?')}")
    if data:
        parts.append(
            f"{data['n']} images of {data['name']} at {data['image_size']} pixels, {len(data['classes'])} classes"
        )
    return f'<h1>{page.text(config.get("name", "run"))}</h1><p class="note">{page.text("; ".join(parts))}</p>'


def _numbers(run_dir: Path, results: dict[str, Any], split: str | None) -> str:
    counts = read_json(run_dir / "dataset.json").get("counts", {})
    if split is None and "val" in counts and not sum(counts["val"].values()):
        return "<p>Trained without a validation split: nothing is reported on the images that were trained on.</p>"
    if split is None:
        return "<p>This run has no results yet: it did not finish, or is still running.</p>"
    m = results[split]

    def between(name: str) -> str:
        return f"{m[f'{name}_low']:.3f} to {m[f'{name}_high']:.3f}" if f"{name}_low" in m else ""

    cards = [
        page.card(f"{m['accuracy']:.3f}", f"accuracy, {split}", between("accuracy")),
        page.card(f"{m['macro_f1']:.3f}", f"macro F1, {split}", between("macro_f1")),
        page.card(f"{m['balanced_accuracy']:.3f}", "balanced accuracy", between("balanced_accuracy")),
        page.card(f"{m['n']}", "images"),
    ]
    columns = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")
    rows = [[_NAMES[s], r["n"], *(interval_text(r, c) for c in columns)] for s, r in results.items() if s in _NAMES]
    openings = run_dir / "openings.jsonl"
    times = len(openings.read_text().splitlines()) if openings.is_file() else 0
    note = "In brackets 95 % intervals: Wilson's for accuracy, a Bayesian bootstrap's for the means over classes. "
    note += f"The {m.get('checkpoint', 'best')} checkpoint" + (f", of step {m['step']}. " if "step" in m else ". ")
    if times:
        note += f"The test split was opened {'once' if times == 1 else f'{times} times'}."
    if m.get("intervals_note"):
        note += f" {m['intervals_note'].capitalize()}."
    header = ("split", "n", "accuracy", "macro F1", "balanced accuracy", "loss", "ECE")
    return f'<div class="cards">{"".join(cards)}</div>{page.table(header, rows)}<p class="note">{page.text(note)}</p>'


def _training(steps: list[dict[str, Any]], epochs: list[dict[str, Any]], config: dict[str, Any]) -> str:
    if not steps and not epochs:
        return ""
    records = sorted(steps + epochs, key=lambda r: r["time"])
    # A run that was stopped and resumed has a gap of any length, which is no work: pauses over an hour are left out.
    seconds = sum(d for d in np.diff([r["time"] for r in records]) if d < 3600)
    note = (
        f"{steps[-1]['step'] if steps else epochs[-1]['step']} steps, {len(epochs)} epochs, {seconds / 60:.1f} minutes"
    )
    if steps:
        note += f", {np.median([r['images_per_second'] for r in steps]):.1f} images/s (median)"
    waits = [r["input_wait"] for r in epochs if "input_wait" in r]
    if waits:
        note += f", {100 * np.median(waits):.1f} % of an epoch's time spent waiting for images (median)"
    note += "."
    if config.get("train", {}).get("label_smoothing"):
        note += " The training loss is that of smoothed labels, the validation loss is not."
    picture = page.image(figures.curves(steps, epochs), "Loss, accuracy and learning rate over the epochs")
    return f'<h2>Training</h2>{picture}<p class="note">{page.text(note)}</p>'


def _classes(metrics: dict[str, Any], predictions: Predictions) -> str:
    rows = [
        [
            r["name"],
            r["n"],
            f"{r['precision']:.3f}",
            f"{r['recall']:.3f} ({r['recall_low']:.3f} to {r['recall_high']:.3f})",
            f"{r['f1']:.3f}",
            f"{r['confused'][0]} ({r['confused'][1]})" if r["confused"] else "",
        ]
        for r in class_rows(metrics, predictions.classes)
    ]
    split = _NAMES[predictions.split].lower()
    header = ("class", "n", "precision", "recall", "F1", "most often taken for")
    matrix = page.image(figures.confusion(np.array(metrics["confusion"]), predictions.classes), "Confusion matrix", 620)
    reliable = page.image(figures.calibration(predictions), "Accuracy against confidence", 440)
    refusing = page.image(figures.selective(predictions), "Share of wrong answers against share answered", 440)
    return (
        f"<h2>Confusion, {split}</h2>{matrix}<h2>Classes, {split}</h2>{page.table(header, rows)}"
        f'<h2>Calibration, {split}</h2><div class="side">{reliable}{refusing}</div>'
        f'<p class="note">Expected calibration error {metrics["ece"]:.3f}. On the dashed line, of a hundred '
        "predictions made with confidence 0.8 eighty are right. On the right: "
        "of the surest answers so large a share is wrong.</p>"
    )


def _mistakes(predictions: Predictions, images: np.ndarray | None) -> str:
    wrong = int((predictions.predicted != predictions.labels).sum())
    title = f"<h2>Mistakes, {_NAMES[predictions.split].lower()}</h2>"
    if not wrong:
        return f"{title}<p>None in {len(predictions.labels)} images.</p>"
    text = f"<p>{wrong} of {len(predictions.labels)} images; the most confident first.</p>"
    if images is not None and predictions.index.max() < len(images):
        figure = figures.mistakes(predictions, images)
        assert figure is not None
        return title + text + page.image(figure, "Cells that were taken for another class")
    rows = [
        (predictions.ids[i], predictions.classes[predictions.labels[i]], predictions.classes[predictions.predicted[i]])
        for i in figures.most_wrong(predictions, 24)
    ]
    return title + text + page.table(("image", "true", "predicted"), rows)


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    counts = data.get("counts", {})
    rows: list[list[object]] = [[c, *(counts[s].get(c, 0) for s in counts)] for c in data["classes"]]
    rows.append(["all", *(sum(counts[s].values()) for s in counts)])
    note = f"Fingerprint {data['fingerprint'][:16]}; {data.get('copies', 0)} byte-identical copies, always on one side."
    parts = [f'<h2>Data</h2>{page.table(["class", *counts], rows)}<p class="note">{page.text(note)}</p>']
    if data.get("skipped"):
        summary = f"<summary>{len(data['skipped'])} files could not be read</summary>"
        parts.append(f"<details>{summary}{page.table(('file', 'reason'), data['skipped'])}</details>")
    return "".join(parts)


def write_report(run_dir: str | Path, images: np.ndarray | None = None) -> Path:
    """Writes report.html from what the run's folder holds; `images` uint8 [n, h, w, 3], the dataset's, adds pictures.

    Raises:
      FileNotFoundError: the folder holds no config.json, so it is no run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir / 'config.json'} is not there; expected the folder of a run")
    config, data, results = (read_json(run_dir / f"{name}.json") for name in ("config", "dataset", "results"))
    split = reported_split(results)
    parts = [_head(config, data), _numbers(run_dir, results, split)]
    parts.append(_training(read_records(run_dir, "train"), read_records(run_dir, "epoch"), config))
    predictions = read_predictions(run_dir, split) if split else None
    if split and predictions is not None:
        parts += [_classes(results[split], predictions), _mistakes(predictions, images)]
    parts.append(_data(data))
    text = (run_dir / "config.json").read_text()
    parts.append(f"<h2>Configuration</h2><details><summary>config.json</summary><pre>{page.text(text)}</pre></details>")
    path = run_dir / "report.html"
    page.write(path, config.get("name", "run"), parts)
    return path


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
        raise FileNotFoundError(f"{run_dir} holds no predictions; expected a run that `bmjax train` finished")
    figures.save(figures.result(predictions, results[split], images), path, dpi=120)
