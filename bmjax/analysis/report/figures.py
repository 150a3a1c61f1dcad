"""Pictures of a run. Each function returns a matplotlib figure made without pyplot, so no state and no display."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from bmjax.data.batches import evenly
from bmjax.files import printable
from bmjax.runs.records import Predictions, interval_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's bright scheme: told apart by the colour-blind, and in print.
TRAIN, TRAIN_EVAL, VAL, RATE, RIGHT, WRONG = "#4477aa", "#66ccee", "#ee6677", "#777777", "#228833", "#cc3311"


def new_figure(width: float, height: float) -> Figure:
    """Without pyplot, its layout kept free of overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def literal(text: str, *, lines: bool = False) -> str:
    """Text that matplotlib draws as it is: `$` begins no formula. `lines` as in `printable`."""
    return printable(text, lines=lines).replace("$", r"\$")


def save(figure: Figure, file: str | Path | IO[bytes], dpi: int) -> None:
    """Writes a PNG. A letter that the font lacks is drawn as a box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="png", dpi=dpi)


def plain(axis: Axes) -> None:
    """The look of every diagram: a faint grid, no frame above and on the right."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def curves(steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> Figure:
    """Loss, accuracy and learning rate, of the records of metrics.jsonl; epochs on the axis where there are any."""
    figure = new_figure(11, 3.4)
    loss, accuracy, rate = figure.subplots(1, 3)
    # Epoch e ends at step ends[e - 1]; every epoch has as many steps.
    per_epoch = epochs[0]["step"] / epochs[0]["epoch"] if epochs else 1.0
    x = np.array([r["step"] for r in steps]) / per_epoch
    if steps:
        loss.plot(x, [r["loss"] for r in steps], color=TRAIN, lw=0.7, alpha=0.5, label="train, each step")
        rate.plot(x, [r["lr"] for r in steps], color=RATE)

    def by_epoch(axis: Axes, name: str, color: str, label: str) -> None:
        points = [(r["epoch"], r[name]) for r in epochs if name in r]
        if points:
            marker = {"marker": "o", "ms": 3} if len(points) < 60 else {}
            axis.plot(*zip(*points, strict=True), color=color, label=label, **marker)

    by_epoch(loss, "train/loss", TRAIN, "train, epoch's mean")
    by_epoch(loss, "val/loss", VAL, "validation")
    by_epoch(accuracy, "train/accuracy_running", TRAIN, "train, running")
    by_epoch(accuracy, "train/accuracy_eval_mode", TRAIN_EVAL, "train, evaluation mode")
    by_epoch(accuracy, "val/accuracy", VAL, "validation")
    loss.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axis, title in ((loss, "loss"), (accuracy, "accuracy"), (rate, "learning rate")):
        axis.set_title(title, loc="left")
        axis.set_xlabel("epoch" if epochs else "step")
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        plain(axis)
    for axis in (loss, accuracy):
        if axis.has_data():
            axis.legend(frameon=False, fontsize=8)
    return figure


def draw_confusion(axis: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Counts int [k, k], rows true, columns predicted; below each count its share of the true class."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    edges = np.arange(-0.5, len(classes))
    axis.hlines(edges, -0.5, len(classes) - 0.5, color="#d5dae1", lw=0.6)
    axis.vlines(edges, -0.5, len(classes) - 0.5, color="#d5dae1", lw=0.6)
    size = max(4.0, min(9.0, 72 / len(classes)))
    for i, j in np.ndindex(*counts.shape):
        if counts[i, j]:
            color = "white" if share[i, j] > 0.5 else "black"
            text = f"{counts[i, j]}\n{100 * share[i, j]:.0f} %" if len(classes) <= 12 else f"{counts[i, j]}"
            axis.text(j, i, text, ha="center", va="center", color=color, fontsize=size)
    shown = [literal(name) for name in classes]
    names = [f"{name} ({n})" for name, n in zip(shown, counts.sum(1), strict=True)]
    axis.set_xticks(range(len(classes)), shown, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), names)
    axis.set(xlabel="predicted", ylabel="true (n)")
    axis.spines[:].set_visible(False)


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """The confusion matrix, counts int [k, k], rows true."""
    side = max(4.2, 0.62 * len(classes) + 1.8)
    figure = new_figure(side + 0.6, side)
    draw_confusion(figure.subplots(), counts, classes)
    return figure


def draw_cell(axis: Axes, image: np.ndarray, title: str, color: str) -> None:
    """One cell, uint8 [h, w, 3], with a line above it and a frame of the same colour."""
    axis.imshow(image)
    axis.set_title(literal(title, lines=True), fontsize=7.5, color=color, pad=3)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=1.5)


def cells(shown: Sequence[tuple[np.ndarray, str, str]], columns: int = 8) -> Figure:
    """A grid of cells, each (image uint8 [h, w, 3], title, colour)."""
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    lines = max(title.count("\n") for _, title, _ in shown) + 1
    figure = new_figure(1.4 * columns, (1.4 + 0.2 * lines) * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, cell in zip(axes.flat, shown, strict=False):
        draw_cell(axis, *cell)
    return figure


def result(predictions: Predictions, metrics: dict[str, Any], images: np.ndarray, columns: int = 6) -> Figure:
    """Cells of every class with what they were taken for, beside the confusion matrix.

    A class's cells are spread evenly over its confidences, so that they show it as it is, mistakes too.
    """
    classes = predictions.classes
    figure = new_figure(6.2 + 0.95 * columns, 0.95 * len(classes) + 0.9)
    halves: Any = figure.subfigures(1, 2, width_ratios=(0.95 * columns, 6.2))
    left, right = halves
    axes = left.subplots(len(classes), columns, squeeze=False)
    for label, row in enumerate(axes):
        of_class = np.flatnonzero(predictions.labels == label)
        ordered = of_class[np.argsort(-predictions.probs[of_class, label], kind="stable")]
        chosen = ordered[evenly(len(ordered), columns)]
        for axis in row[len(chosen) :]:
            axis.axis("off")
        for axis, i in zip(row, chosen, strict=False):
            top = predictions.predicted[i]
            title = f"{printable(classes[top])} {predictions.confidence[i]:.2f}"
            draw_cell(axis, images[predictions.index[i]], title, RIGHT if top == label else WRONG)
        row[0].set_ylabel(literal(classes[label]), rotation=0, ha="right", va="center", fontsize=10)
    left.suptitle("true class, cells, and what they were taken for", fontsize=10)
    axis = right.subplots()
    draw_confusion(axis, np.array(metrics["confusion"]), classes)
    axis.set_title(
        f"{predictions.split}: n = {metrics['n']}, accuracy {interval_text(metrics, 'accuracy')}", fontsize=10
    )
    return figure


def explanations(
    images: np.ndarray, labels: Sequence[tuple[str, str]], maps: dict[str, np.ndarray], titles: Sequence[str]
) -> Figure:
    """A row a cell: images uint8 [n, h, w, 3] and over each its maps, [n, h, w] by name; beyond six cells,
    two rows side by side.

    `labels` are each cell's (text, colour), `titles` those of the maps. A map's colours go from its least to its
    largest value, which are written below it: a map that hardly varies looks as vivid as any.
    """
    blocks = 1 if len(images) <= 6 else 2
    rows, columns = math.ceil(len(images) / blocks), 1 + len(maps)
    figure = new_figure(1.55 * columns * blocks + 0.3 * blocks, 1.78 * rows + 0.75)
    subfigures: Any = figure.subfigures(1, blocks, squeeze=False)[0]
    for block, part in enumerate(subfigures):
        axes = part.subplots(rows, columns, squeeze=False)
        for row, line in enumerate(axes):
            i = block * rows + row
            if i >= len(images):
                for axis in line:
                    axis.axis("off")
                continue
            draw_cell(line[0], images[i], *labels[i])
            grey = np.asarray(images[i], np.float32).mean(-1)
            for axis, title, values in zip(line[1:], titles, maps.values(), strict=True):
                axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
                axis.imshow(values[i], cmap="magma", alpha=0.55)
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(f"{values[i].min():.2g} to {values[i].max():.2g}", fontsize=7, labelpad=2)
                if row == 0:
                    axis.set_title(literal(title, lines=True), fontsize=7.5, pad=3)
    return figure


def beside_maps(image: np.ndarray, maps: Sequence[np.ndarray], least: int = 224) -> np.ndarray:
    """An image uint8 [h, w, 3] and to its right, over it in grey, each of its maps [h, w]: uint8 [h', w', 3].

    Colours as in `explanations`. A small image is enlarged by a whole factor, to `least` pixels or more.
    """
    from matplotlib import colormaps

    picture = np.asarray(image, np.float32)
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, axis=-1)
    panels: list[np.ndarray] = [picture]
    for values in maps:
        span = float(values.max() - values.min())
        colours = colormaps["magma"]((values - values.min()) / (span or 1.0))[..., :3]
        panels.append(0.45 * grey + 0.55 * 255 * np.asarray(colours, np.float32))
    row = np.concatenate(panels, axis=1).round().astype(np.uint8)
    factor = math.ceil(least / image.shape[0])
    return row.repeat(factor, axis=0).repeat(factor, axis=1)
