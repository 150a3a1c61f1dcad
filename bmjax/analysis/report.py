"""report.html of a run's folder: curves, confusion, calibration, classes, most wrong cells. One file, no links."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f5f5f5;padding:1rem;overflow:auto}
h1,h2{line-height:1.2}"""


def _figures():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind in metrics.jsonl; a torn last line is passed over."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [r for r in (json.loads(line) for line in lines if line.endswith("\n")) if r["kind"] == kind]


def read_predictions(run_dir: Path, split: str) -> dict[str, np.ndarray] | None:
    """predictions_<split>.npz as arrays, or None."""
    path = run_dir / f"predictions_{split}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def figure_curves(run_dir: Path):
    """Loss and accuracy over the steps."""
    plt = _figures()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps, epochs = read_metrics(run_dir, "train"), read_metrics(run_dir, "epoch")
    axes[0].plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.5, alpha=0.5, label="train, a step")
    axes[0].plot([r["step"] for r in epochs], [r["val/loss"] for r in epochs], marker="o", ms=3, label="validation")
    axes[0].set(xlabel="step", ylabel="cross-entropy")
    for name, label in (("train/accuracy_running", "train, running"), ("val/accuracy", "validation")):
        axes[1].plot([r["step"] for r in epochs], [r[name] for r in epochs], marker="o", ms=3, label=label)
    axes[1].set(xlabel="step", ylabel="accuracy")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    return figure


def figure_confusion(confusion: np.ndarray, classes: list[str], axis=None):
    """Counts, coloured by the share of the true class."""
    plt = _figures()
    if axis is None:
        _, axis = plt.subplots(figsize=(5.5, 5), layout="constrained")
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*confusion.shape):
        colour = "white" if share[i, j] > 0.5 else "black"
        axis.text(j, i, str(confusion[i, j]), ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted", ylabel="true")
    return axis.figure


def figure_calibration(labels: np.ndarray, probs: np.ndarray, bins: int = 10):
    """Accuracy against confidence, with the number of cells in each bin."""
    plt = _figures()
    figure, axis = plt.subplots(figsize=(4.5, 4), layout="constrained")
    confidence, hit = probs.max(-1), probs.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    axis.plot([0, 1], [0, 1], color="grey", lw=1)
    present = np.unique(which)
    axis.plot([confidence[which == i].mean() for i in present], [hit[which == i].mean() for i in present], marker="o")
    for i in present:
        at = (confidence[which == i].mean(), hit[which == i].mean())
        axis.annotate(f"{(which == i).sum()}", at, textcoords="offset points", xytext=(4, -12), fontsize=8)
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    return figure


def figure_cells(images: np.ndarray, titles: list[str], columns: int = 8):
    """A grid of cells, uint8 [n, h, w, 3], each with a title."""
    plt = _figures()
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.35 * columns, 1.7 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=7)
    return figure


def _embed(figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    _figures().close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def most_wrong(predictions: dict[str, np.ndarray], limit: int) -> tuple[np.ndarray, list[str]]:
    """(places in the predictions, titles) of the wrong cells, the most confident first."""
    probs, labels, classes = predictions["probs"], predictions["labels"], predictions["classes"]
    top = probs.argmax(-1)
    wrong = np.flatnonzero(top != labels)
    wrong = wrong[np.argsort(-probs[wrong, top[wrong]], kind="stable")][:limit]
    return wrong, [f"{classes[labels[i]]}\ntaken for {classes[top[i]]} {probs[i, top[i]]:.2f}" for i in wrong]


def interval_text(metrics: dict[str, Any], name: str) -> str:
    """`0.812 (0.771 to 0.848)`, the 95 % interval where there is one."""
    text = f"{metrics[name]:.3f}"
    if f"{name}_low" in metrics:
        text += f" ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"
    return text


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def write_report(run_dir: str | Path, images: np.ndarray | None = None) -> Path:
    """Writes report.html from what the run's folder holds; `images` uint8 [n, h, w, 3], the dataset's, adds pictures.

    Raises:
      FileNotFoundError: the folder holds no results.json.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "results.json").is_file():
        raise FileNotFoundError(f"{run_dir / 'results.json'} is not there; expected a run that `bmjax train` finished")
    results = json.loads((run_dir / "results.json").read_text())
    data = json.loads((run_dir / "dataset.json").read_text())
    config = (run_dir / "config.json").read_text()
    split = "test" if "test" in results else "val"
    names = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")
    rows = [[s, str(m["n"]), *(interval_text(m, n) for n in names)] for s, m in results.items()]
    title = html.escape(json.loads(config)["name"])
    parts = [f"<h1>{title}</h1><p>{data['n']} images of {html.escape(data['name'])}, {data['image_size']} pixels.</p>"]
    parts.append("<h2>Results</h2><p>Best checkpoint on validation; 95 % intervals in brackets.</p>")
    parts.append(_table(["split", "n", "accuracy", "macro F1", "balanced accuracy", "loss", "ECE"], rows))
    if read_metrics(run_dir, "epoch"):
        parts.append("<h2>Training</h2>" + _embed(figure_curves(run_dir)))
    predictions = read_predictions(run_dir, split)
    if predictions is not None:
        classes = list(map(str, predictions["classes"]))
        parts.append(f"<h2>Confusion, {split}</h2>")
        parts.append(_embed(figure_confusion(np.array(results[split]["confusion"]), classes)))
        per_class = results[split]["per_class"]
        body = [
            [c, *(f"{m[k]:.3f}" for k in ("precision", "recall", "f1")), str(m["n"])]
            for c, m in zip(classes, per_class, strict=True)
        ]
        parts.append(_table(["class", "precision", "recall", "F1", "n"], body))
        parts.append(f"<h2>Calibration, {split}</h2>")
        parts.append(_embed(figure_calibration(predictions["labels"], predictions["probs"])))
        wrong, titles = most_wrong(predictions, 32)
        if images is not None and len(wrong):
            parts.append(f"<h2>Most confident mistakes, {split}</h2>")
            parts.append(_embed(figure_cells(images[predictions["index"][wrong]], titles)))
    counts = data["counts"]
    body = [[c, *(str(counts[s][c]) for s in ("train", "val", "test"))] for c in data["classes"]]
    parts.append("<h2>Data</h2>" + _table(["class", "train", "val", "test"], body))
    if data["skipped"]:
        parts.append("<h3>Skipped files</h3>" + _table(["file", "reason"], data["skipped"]))
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(config)}</pre>")
    path = run_dir / "report.html"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    path.write_text(page + "".join(parts) + "</html>")
    return path


def figure_result(run_dir: str | Path, images: np.ndarray, path: str | Path) -> None:
    """One picture of a run: a row of its cells a class, right and wrong, beside the confusion matrix."""
    plt = _figures()
    run_dir = Path(run_dir)
    results = json.loads((run_dir / "results.json").read_text())
    split = "test" if "test" in results else "val"
    predictions = read_predictions(run_dir, split)
    assert predictions is not None
    classes, labels, top = predictions["classes"], predictions["labels"], predictions["probs"].argmax(-1)
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes = left.subplots(len(classes), 8)
    for row, name in zip(axes, range(len(classes)), strict=True):
        for axis, i in zip(row, np.flatnonzero(labels == name), strict=False):
            axis.imshow(images[predictions["index"][i]])
            colour = "green" if top[i] == labels[i] else "red"
            axis.set_title(str(classes[top[i]]), fontsize=7, color=colour, pad=1)
        for axis in row:
            axis.axis("off")
    figure_confusion(np.array(results[split]["confusion"]), list(map(str, classes)), right.subplots())
    right.suptitle(f"{split}: accuracy {interval_text(results[split], 'accuracy')}, n = {results[split]['n']}")
    figure.savefig(path, dpi=100)
    plt.close(figure)
