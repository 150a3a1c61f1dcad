"""Pictures of a comparison: accuracy against cost, differences to the baseline, and what can't be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bmjax.analysis.compare.table import Comparison
from bmjax.analysis.report.figures import RATE, RIGHT, TRAIN, WRONG, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pareto(accuracies: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Places of those that none beats: no other is at least as right and at least as cheap, and better in one; in order
    of cost."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -accuracies[i]))
    front: list[int] = []
    for i in order:
        if not front or accuracies[i] > accuracies[front[-1]]:
            front.append(i)
    return front


def against_cost(c: Comparison) -> Figure:
    """Accuracy with its interval against parameters, FLOPs and images/s; the line joins those that none beats."""
    figure = new_figure(13, 4.6)
    costs = [c.costs[row.variant] for row in c.rows]
    accuracy = [100 * row.accuracy for row in c.rows]
    errors = np.array([[100 * (row.accuracy - row.low), 100 * (row.high - row.accuracy)] for row in c.rows]).T
    columns = {
        "parameters of attention": [float(cost.parameters) for cost in costs],
        "MFLOP an image, beyond the backbone": [cost.flops / 1e6 for cost in costs],
        "images/s in training": [cost.images_per_second for cost in costs],
    }
    for place, (axis, (name, x)) in enumerate(zip(figure.subplots(1, 3, sharey=True), columns.items(), strict=True)):
        falls = place == 2  # of speed more is better
        front = pareto(accuracy, [-v for v in x] if falls else x)
        axis.errorbar(x, accuracy, errors, fmt="none", ecolor=RATE, elinewidth=0.8, alpha=0.6)
        axis.plot([x[i] for i in front], [accuracy[i] for i in front], color=RIGHT, lw=1.2)
        colors = [RIGHT if i in front else TRAIN for i in range(len(x))]
        axis.scatter(x, accuracy, c=colors, s=22, zorder=3)
        for i, row in enumerate(c.rows):
            axis.annotate(literal(row.variant), (x[i], accuracy[i]), (4, 3), textcoords="offset points", fontsize=7)
        if place == 0:
            axis.set_xscale("symlog", linthresh=10)
        else:
            axis.set_xscale("log")
        if falls:
            axis.invert_xaxis()
        axis.set_xlabel(name + (" (faster to the left)" if falls else ""))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if place == 0:
            axis.set_ylabel("accuracy, %, 95 % interval")
    return figure


def differences(c: Comparison) -> Figure:
    """Each difference to the baseline with its simultaneous interval, the largest first."""
    rows = sorted((row for row in c.rows if row.difference is not None), key=lambda row: row.difference or 0.0)
    figure = new_figure(8.5, 1.1 + 0.26 * len(rows))
    axis = figure.subplots()
    for y, row in enumerate(rows):
        middle = 100 * (row.difference or 0.0)
        color = (RIGHT if middle > 0 else WRONG) if row.shown else RATE
        if row.difference_low is not None and row.difference_high is not None:
            axis.plot([100 * row.difference_low, 100 * row.difference_high], [y, y], color=color, lw=2, alpha=0.7)
        axis.plot(middle, y, "o", color=color, ms=5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [literal(row.variant) for row in rows], fontsize=8)
    axis.set_xlabel(f"difference to {literal(c.baseline)}, points; intervals hold together at 95 %; grey: not shown")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    return figure


def cliques(order: Sequence[str], apart: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Longest stretches (first, last) of the ordered names of which no two are told apart, of two names or more."""
    pairs = {frozenset(pair) for pair in apart}
    found: list[tuple[int, int]] = []
    for first in range(len(order)):
        last = first
        while last + 1 < len(order) and all(
            frozenset((order[i], order[last + 1])) not in pairs for i in range(first, last + 1)
        ):
            last += 1
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def critical_differences(c: Comparison) -> Figure:
    """All variants by accuracy; a bar joins those of which no two can be told apart (after Demsar 2006, with the test
    of `bmjax compare` in the place of ranks)."""
    rows = sorted(c.rows, key=lambda row: -row.accuracy)
    bars = cliques([row.variant for row in rows], c.apart or ())
    half = -(-len(rows) // 2)
    height = 0.7 + 0.16 * len(bars) + 0.24 * half
    figure = new_figure(10, height)
    axis = figure.subplots()
    x = [100 * row.accuracy for row in rows]
    low, high = min(x), max(x)
    room = 0.45 * max(high - low, 0.5)
    top = 0.5 + 0.16 * len(bars)
    for number, (first, last) in enumerate(bars):
        y = -0.25 - 0.16 * number
        axis.plot([x[first] + 0.008 * room, x[last] - 0.008 * room], [y, y], color="black", lw=3, solid_capstyle="butt")
    for i, row in enumerate(rows):  # the better half on the left, the highest label nearest to the axis at each side
        left = i < half
        step = i if left else len(rows) - 1 - i
        y, end = -top - 0.24 * step, high + 0.25 * room if left else low - 0.25 * room
        axis.plot([x[i], x[i], end], [0, y, y], color=RATE, lw=0.8)
        text = f"{literal(row.variant)}  {x[i]:.1f}"
        axis.text(end, y, f" {text} ", ha="right" if left else "left", va="center", fontsize=8)
    axis.set_xlim(high + room, low - room)  # the best on the left, as such diagrams have it
    axis.set_ylim(-top - 0.24 * half, 0.05)
    axis.xaxis.set_ticks_position("top")
    axis.xaxis.set_label_position("top")
    axis.set_xlabel("accuracy, %")
    axis.spines[["left", "right", "bottom"]].set_visible(False)
    axis.set_yticks([])
    return figure
