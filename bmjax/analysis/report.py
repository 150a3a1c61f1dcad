"""report.html of a run's folder: one file without links, made from whatever the folder holds."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bmjax.analysis import figures
from bmjax.analysis.evaluation import (
    Predictions,
    class_rows,
    interval_text,
    read_json,
    read_predictions,
    read_records,
    reported_split,
)
from bmjax.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_result", "interval_text", "write_report"]

_NAMES = {"train": "Training split", "val": "Validation", "test": "Test"}
_STYLE = """
:root{color-scheme:light}
body{font:15px/1.55 system-ui,sans-serif;max-width:66rem;margin:0 auto;padding:2rem 1.25rem 4rem;color:#1d2530}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.6rem 0 .6rem;border-bottom:1px solid #d5dae1}
p{max-width:48rem}.note{color:#56606e;margin-top:.2rem}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.card{border:1px solid #d5dae1;border-radius:6px;padding:.6rem .9rem;min-width:8.5rem}
.card b{display:block;font-size:1.45rem;line-height:1.3}.card span{color:#56606e;font-size:.85rem}
table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #e6e9ee}th{color:#56606e;font-weight:600}
td:first-child,th:first-child{text-align:left;padding-left:0}
img{max-width:100%;height:auto;display:block}.side{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}
pre{background:#f5f7f9;padding:1rem;overflow:auto;font-size:.82rem}summary{cursor:pointer}
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _image(figure: Figure, alt: str, width: int | None = None) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    size = f' style="width:{width}px"' if width else ""
    return f'<img alt="{_text(alt)}"{size} src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{_text(c)}</th>" for c in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _card(value: str, name: str, below: str = "") -> str:
    return f'<div class="card"><span>{_text(name)}</span><b>{_text(value)}</b><span>{_text(below)}&nbsp;</span></div>'


def _head(config: dict[str, Any], data: dict[str, Any]) -> str:
    model = config.get("model", {})
    weights = model.get("weights")
    parts = [f"{model.get('backbone', '?')}, {f'weights {Path(weights).name}' if weights else 'random weights'}"]
    parts.append(f"attention {model.get('attention', '?')}")
    if data:
        parts.append(
            f"{data['n']} images of {data['name']} at {data['image_size']} pixels, {len(data['classes'])} classes"
        )
    return f'<h1>{_text(config.get("name", "run"))}</h1><p class="note">{_text("; ".join(parts))}</p>'


def _numbers(run_dir: Path, results: dict[str, Any], split: str | None) -> str:
    if split is None:
        return "<p>This run has no results yet: it did not finish, or is still running.</p>"
    m = results[split]

    def between(name: str) -> str:
        return f"{m[f'{name}_low']:.3f} to {m[f'{name}_high']:.3f}" if f"{name}_low" in m else ""

    cards = [
        _card(f"{m['accuracy']:.3f}", f"accuracy, {split}", between("accuracy")),
        _card(f"{m['macro_f1']:.3f}", f"macro F1, {split}", between("macro_f1")),
        _card(f"{m['balanced_accuracy']:.3f}", "balanced accuracy"),
        _card(f"{m['n']}", "images"),
    ]
    columns = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")
    rows = [[_NAMES[s], r["n"], *(interval_text(r, c) for c in columns)] for s, r in results.items() if s in _NAMES]
    openings = run_dir / "openings.jsonl"
    times = len(openings.read_text().splitlines()) if openings.is_file() else 0
    note = "In brackets 95 % intervals: Wilson's for accuracy, the bootstrap's over images for macro F1. "
    note += f"The {m.get('checkpoint', 'best')} checkpoint" + (f", of step {m['step']}. " if "step" in m else ". ")
    if times:
        note += f"The test split was opened {'once' if times == 1 else f'{times} times'}."
    header = ("split", "n", "accuracy", "macro F1", "balanced accuracy", "loss", "ECE")
    return f'<div class="cards">{"".join(cards)}</div>{_table(header, rows)}<p class="note">{_text(note)}</p>'


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
    note += "."
    if config.get("train", {}).get("label_smoothing"):
        note += " The training loss is that of smoothed labels, the validation loss is not."
    picture = _image(figures.curves(steps, epochs), "Loss, accuracy and learning rate over the epochs")
    return f'<h2>Training</h2>{picture}<p class="note">{_text(note)}</p>'


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
    matrix = _image(figures.confusion(np.array(metrics["confusion"]), predictions.classes), "Confusion matrix", 620)
    reliable = _image(figures.calibration(predictions), "Accuracy against confidence", 440)
    return (
        f"<h2>Confusion, {split}</h2>{matrix}<h2>Classes, {split}</h2>{_table(header, rows)}"
        f"<h2>Calibration, {split}</h2>{reliable}"
        f'<p class="note">Expected calibration error {metrics["ece"]:.3f}. On the dashed line, of a hundred '
        "predictions made with confidence 0.8 eighty are right.</p>"
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
        return title + text + _image(figure, "Cells that were taken for another class")
    rows = [
        (predictions.ids[i], predictions.classes[predictions.labels[i]], predictions.classes[predictions.predicted[i]])
        for i in figures.most_wrong(predictions, 24)
    ]
    return title + text + _table(("image", "true", "predicted"), rows)


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    counts = data.get("counts", {})
    rows: list[list[object]] = [[c, *(counts[s].get(c, 0) for s in counts)] for c in data["classes"]]
    rows.append(["all", *(sum(counts[s].values()) for s in counts)])
    note = f"Fingerprint {data['fingerprint'][:16]}; {data.get('copies', 0)} byte-identical copies, always on one side."
    parts = [f'<h2>Data</h2>{_table(["class", *counts], rows)}<p class="note">{_text(note)}</p>']
    if data.get("skipped"):
        summary = f"<summary>{len(data['skipped'])} files could not be read</summary>"
        parts.append(f"<details>{summary}{_table(('file', 'reason'), data['skipped'])}</details>")
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
    parts.append(f"<h2>Configuration</h2><details><summary>config.json</summary><pre>{_text(text)}</pre></details>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(config.get('name', 'run'))}</title><style>{_STYLE}</style></head><body>{''.join(parts)}"
        "</body></html>"
    )
    path = run_dir / "report.html"
    write_text(path, page, errors="replace")
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
    figures.result(predictions, results[split], images).savefig(path, dpi=120)
