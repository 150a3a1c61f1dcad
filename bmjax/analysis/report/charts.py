"""The numbers of a page's diagrams, as plain lists for its plotting library: x, and a line or a band each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bmjax.analysis.evaluate.refusal import risk_coverage
from bmjax.analysis.report.facts import Facts
from bmjax.data.batches import evenly
from bmjax.files import printable
from bmjax.runs.curves import GRID, precision_recall, roc
from bmjax.runs.records import Predictions, reliability

_MOST = 400
"""Points of a line; more can't be told apart on a screen."""
_EPOCHS = {
    "loss": (("train/loss", "train, epoch's mean"), ("val/loss", "validation")),
    "accuracy": (
        ("train/accuracy_running", "train, running"),
        ("val/accuracy", "validation"),
        ("train/accuracy_eval_mode", "train, evaluation mode"),
    ),
}


def _numbers(values: Any) -> list[float | None]:
    """Rounded, so that a page stays small; what is no number is a gap."""
    return [None if v is None or not math.isfinite(v) else round(float(v), 5) for v in values]


def chart(title: str, x: Any, lines: Sequence[tuple[str, Any]], axes: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A diagram: `lines` are (name, values)."""
    found = [{"name": printable(name), "y": _numbers(values)} for name, values in lines]
    return {"title": title, "x": _numbers(x), "lines": found, "axes": list(axes), **more}


def curves(facts: Facts) -> list[dict[str, Any]]:
    """Loss and accuracy by epoch, and the learning rate by step."""
    found = []
    for title, names in _EPOCHS.items():
        lines = [(label, [r.get(name) for r in facts.epochs]) for name, label in names]
        lines = [(label, values) for label, values in lines if any(v is not None for v in values)]
        if lines:
            bounds: dict[str, Any] = {"y": [0, None]} if title == "loss" else {}
            found.append(
                chart(title, [r["epoch"] for r in facts.epochs], lines, ("epoch", title), whole=True, **bounds)
            )
    if facts.steps:
        rows = [facts.steps[i] for i in evenly(len(facts.steps), _MOST)]
        x = [r["step"] for r in rows]
        if not facts.epochs:
            found.append(chart("loss", x, [("train, each step", [r["loss"] for r in rows])], ("step", "loss")))
        found.append(chart("learning rate", x, [("learning rate", [r["lr"] for r in rows])], ("step", "rate")))
    return found


def ranking(predictions: Predictions) -> list[dict[str, Any]]:
    """ROC and PR of each class against the rest."""
    each = [(name, predictions.labels == c, predictions.probs[:, c]) for c, name in enumerate(predictions.classes)]
    square = {"xs": [0, 1], "y": [0, 1]}
    return [
        chart(
            "ROC, each class against the rest",
            GRID,
            [(name, roc(positive, score)) for name, positive, score in each],
            ("false positive rate", "sensitivity"),
            **square,
        ),
        chart(
            "PR, each class against the rest",
            GRID,
            [(name, precision_recall(positive, score)) for name, positive, score in each],
            ("sensitivity", "precision"),
            **square,
        ),
    ]


def trust(predictions: Predictions) -> list[dict[str, Any]]:
    """Reliability with its band, and risk against coverage."""
    bins = reliability(predictions)
    x = [b.confidence for b in bins]
    lines = [
        ("accuracy", [b.accuracy for b in bins]),
        ("95 %, low", [b.low for b in bins]),
        ("95 %, high", [b.high for b in bins]),
        ("as sure as right", x),
    ]
    covered, risk, _ = risk_coverage(predictions.confidence, predictions.predicted == predictions.labels)
    kept = evenly(len(covered), _MOST)
    return [
        chart(
            "Reliability",
            x,
            lines,
            ("confidence", "accuracy"),
            xs=[0, 1],
            y=[0, 1],
            band=[1, 2],
            faint=[3],
            points=True,
        ),
        chart(
            "Risk and coverage",
            covered[kept],
            [("share of these wrong", risk[kept])],
            ("share answered, the surest first", "share of these wrong"),
            xs=[0, 1],
            y=[0, None],
        ),
    ]
