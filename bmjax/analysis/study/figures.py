"""Pictures of a study; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bmjax.analysis.report.figures import RATE, TRAIN, VAL, literal, new_figure, plain
from bmjax.analysis.study.records import PUBLISHED
from bmjax.analysis.study.tables import RATES, Grid, ProtocolRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's bright and muted schemes: told apart by the colour-blind.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#332288", "#44aa99")


def heatmaps(grids: Sequence[Grid]) -> Figure:
    """Validation accuracy by optimizer and batch size, one panel a kind of rate, on one scale; intervals in small."""
    means = [mean.accuracy for grid in grids for mean in grid.means.values()]
    columns = max(len(grid.batches) for grid in grids)
    figure = new_figure(len(grids) * (1.5 + 1.15 * columns), 1.2 + 0.75 * max(len(grid.optimizers) for grid in grids))
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    low, high = min(means), max(max(means), min(means) + 1e-6)
    for axis, grid in zip(axes, grids, strict=True):
        cells = [[grid.means.get((name, batch)) for batch in grid.batches] for name in grid.optimizers]
        shown = np.array([[np.nan if cell is None else cell.accuracy for cell in row] for row in cells])
        axis.imshow(shown, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        for (i, j), value in np.ndenumerate(shown):
            cell = cells[i][j]
            if cell is not None:
                colour = "black" if (value - low) / (high - low) > 0.6 else "white"
                rate = grid.rates[grid.optimizers[i], grid.batches[j]]
                axis.text(j, i - 0.18, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=10)
                small = f"{cell.low:.3f} to {cell.high:.3f}\nrate {rate:g}"
                axis.text(j, i + 0.2, small, ha="center", va="center", color=colour, fontsize=6.5)
        axis.set_xticks(range(len(grid.batches)), [str(batch) for batch in grid.batches])
        axis.set_yticks(range(len(grid.optimizers)), [literal(name) for name in grid.optimizers])
        axis.set_xlabel("batch size")
        axis.set_title(RATES[grid.role], loc="left", fontsize=10)
        axis.spines[:].set_visible(False)
    return figure


def accuracies(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> Figure:
    """Accuracy by epoch of (name, epoch records): validation whole lines, training, running, dashed."""
    figure = new_figure(7.5, 3.8)
    axis = figure.subplots()
    for (name, epochs), colour in zip(runs, _COLOURS * len(runs), strict=False):
        for field, style, label in (("val/accuracy", "-", literal(name)), ("train/accuracy_running", "--", None)):
            points = [(r["epoch"], r[field]) for r in epochs if field in r]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker="o", ms=3)
    axis.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    axis.set_xticks(sorted({r["epoch"] for _, epochs in runs for r in epochs}))
    plain(axis)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def protocols(rows: Sequence[ProtocolRow]) -> Figure:
    """Accuracy of each protocol on the training images and on the test split with its interval, by kind of labels;
    beside them what the abstract says, and chance."""
    kinds = list(dict.fromkeys(row.labels for row in rows))
    figure = new_figure(4.6 * len(kinds), 3.6)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds, strict=True):
        mine = [row for row in rows if row.labels == kind]
        x, test = np.arange(len(mine)), [row.test for row in mine]
        error = [[m.accuracy - m.low for m in test], [m.high - m.accuracy for m in test]]
        axis.bar(x - 0.2, [row.evaluated for row in mine], 0.36, color=TRAIN, label="train, evaluation mode")
        axis.bar(x + 0.2, [m.accuracy for m in test], 0.36, color=VAL, label="test")
        axis.errorbar(x + 0.2, [m.accuracy for m in test], np.maximum(error, 0), fmt="none", color="black", capsize=3)
        if kind == "shuffled":
            axis.axhline(mine[0].chance, color=RATE, lw=1, ls="--", label=f"chance, {mine[0].chance:.3f}")
        else:
            axis.axhline(PUBLISHED["test"], color=RATE, lw=1, ls=":", label=f"published test, {PUBLISHED['test']:.4f}")
        axis.set_xticks(x, [literal(row.protocol.replace(" ", "\n"), lines=True) for row in mine], fontsize=8)
        axis.set(ylim=(0, 1.3), title=f"labels {kind}", ylabel="accuracy")
        axis.set_yticks(np.linspace(0, 1, 6))
        plain(axis)
        axis.legend(frameon=False, fontsize=7.5, loc="upper left", ncols=2)
    return figure
