"""A run as its page shows it: rows of tables, captions and the numbers for the script, without any markup."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bmjax.analysis.report import card, charts, facts, paired
from bmjax.analysis.report.facts import Facts
from bmjax.analysis.report.pictures import COLUMNS, ROWS, SIDE, Mistake, Thumbnails
from bmjax.data.batches import evenly
from bmjax.files import printable
from bmjax.runs.records import Predictions, interval_text, reliability

_STRIP = 10
_CONTENTS = (
    ("summary", "In a minute"),
    ("training", "Training"),
    ("confusion", "Confusion"),
    ("classes", "Classes"),
    ("scores", "Scores"),
    ("calibration", "Probabilities"),
    ("mistakes", "Mistakes"),
    ("data", "Data"),
    ("card", "Model card"),
    ("configuration", "Configuration"),
)


class Entry(NamedTuple):
    """An entry of the confusion matrix: its count, and its share of the row."""

    n: int
    share: float


class Row(NamedTuple):
    n: int
    entries: list[Entry]


class Spot(NamedTuple):
    """Where a small cell stands: its sheet, and pixels from the left and the top."""

    sheet: int
    x: int
    y: int


class View:
    """One run of a page, the i-th. Attributes are what the template names."""

    percent, between = staticmethod(facts.percent), staticmethod(facts.between)

    def __init__(
        self, i: int, found: Facts, thumbnails: Thumbnails, mistakes: Sequence[Mistake] = (), maps: Sequence[str] = ()
    ):
        self.i, self.facts, self.thumbnails, self.mistakes, self.maps = i, found, thumbnails, mistakes, list(maps)
        self.where = facts.SPLITS[found.split] if found.split else ""
        self.duration = facts.duration(found)
        self.environment = facts.environment_rows(found)
        self.config = json.dumps(found.config, indent=2)
        self.skipped = [tuple(entry) for entry in found.data.get("skipped", [])]
        sections = card.sections(found)
        self.data = next(section for section in sections if section.title == "Training data")
        self.card = [section for section in sections if section.title in ("Intended use", "Not for", "Limits")]
        self.charts = {"curves": charts.curves(found), "ranking": [], "trust": []}
        self.matrix: list[Row] = []
        predictions = found.predictions
        if predictions is not None:
            self.names = list(predictions.classes)
            self.matrix = [Row(sum(row), [Entry(n, n / max(sum(row), 1)) for n in row])
                           for row in found.metrics["confusion"]]  # fmt: skip
            self.charts |= {"ranking": charts.ranking(predictions), "trust": charts.trust(predictions)}
            self.calibration = facts.calibration_words(found)
            self.n = len(predictions.labels)
            self.wrong = int((predictions.predicted != predictions.labels).sum())
            self.pictured = any(one.picture for one in mistakes)

    @property
    def contents(self) -> list[tuple[str, str]]:
        """(id, name) of the sections that there are."""
        absent = set() if self.matrix else {"confusion", "classes", "scores", "calibration", "mistakes"}
        absent |= set() if self.charts["curves"] else {"training"}
        return [(key, name) for key, name in _CONTENTS if key not in absent]

    @property
    def tiles(self) -> list[tuple[str, str, str]]:
        """(name, figure, what stands below it)."""
        m = self.facts.metrics
        if not m:
            return []
        names = (("accuracy", "accuracy"), ("macro_f1", "macro F1"), ("balanced_accuracy", "balanced accuracy"))
        found = [
            (name, f"{m[key]:.3f}", f"{m[f'{key}_low']:.3f} to {m[f'{key}_high']:.3f}" if f"{key}_low" in m else "")
            for key, name in names
        ]
        return [*found, ("images", str(m["n"]), self.where)]

    @property
    def summary(self) -> list[tuple[str, str]]:
        """(question, answer), to be read in a minute."""
        found, m = self.facts, self.facts.metrics
        rows = [("What", facts.trained(found)), ("Trained on", facts.trained_on(found))]
        if not m:
            return [*rows, ("Result", facts.no_result(found)), ("Not for", facts.NOT_FOR)]
        bounds = facts.between(m["accuracy_low"], m["accuracy_high"])
        rows.append(("Accuracy", f"{facts.percent(m['accuracy'])} of {m['n']} images ({self.where}) are right; 95 % "
                                 f"interval {bounds}."))  # fmt: skip
        if found.predictions is not None:
            rows += [("Weakest class", facts.worst_class(found)), ("Probabilities", self.calibration)]
        return [*rows, ("Not for", facts.NOT_FOR)]

    @property
    def splits(self) -> list[list[str]]:
        """A row for each split evaluated; of training's only beside another, which says what it is worth."""
        columns = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")
        results = self.facts.results
        return [
            [facts.SPLITS[s], str(results[s]["n"]), *(interval_text(results[s], c) for c in columns)]
            for s in facts.SPLITS
            if s in results and self.facts.split
        ]

    @property
    def note(self) -> str:
        m, opened = self.facts.metrics, self.facts.openings
        text = "In brackets 95 % intervals: Wilson's for accuracy, a Bayesian bootstrap's for the means over classes. "
        if m.get("intervals_groups"):
            text = f"In brackets 95 % intervals, by {self.facts.by}. "
        text += f"The {m.get('checkpoint', 'best')} checkpoint" + (f", of step {m['step']}. " if "step" in m else ". ")
        text += f"The test split was opened {facts.times(opened)}. " if opened else ""
        return text + (f"{m['intervals_note'].capitalize()}." if m.get("intervals_note") else "")

    @property
    def scores(self) -> list[tuple[str, str, str, str]]:
        """Every score with its interval."""
        return [
            (_spelt(name), _number(s["value"]), _bounds(s), s["by"] if s["value"] is not None else "")
            for name, s in self.facts.scores["scores"].items()
        ]

    def class_scores(self, row: dict[str, Any]) -> list[tuple[str, str, str]]:
        """A class's scores with their intervals."""
        names = ("precision", "specificity", "f1", "roc_auc", "pr_auc")
        return [(_spelt(name), _number(row["scores"][name]["value"]), _bounds(row["scores"][name])) for name in names]

    @property
    def bins(self) -> list[tuple[str, str, str, str]]:
        return [
            (f"{b.confidence:.3f}", str(b.n), f"{b.accuracy:.3f}", f"{b.low:.3f} to {b.high:.3f}")
            for b in reliability(self._predictions)
        ]

    @property
    def _predictions(self) -> Predictions:
        assert self.facts.predictions is not None, "the template asks where there is a matrix"
        return self.facts.predictions

    def training_count(self, name: str) -> int:
        return self.facts.data.get("counts", {}).get("train", {}).get(name, 0)

    def named(self, c: int) -> int:
        """How many images were taken for a class."""
        return sum(row.entries[c].n for row in self.matrix)

    @functools.cached_property
    def _of_class(self) -> list[list[int]]:
        """The shown cells of each class, by falling confidence in it."""
        found: list[list[int]] = [[] for _ in self.names]
        for row in sorted(self.thumbnails.places, key=lambda row: -self._own(row)):
            found[int(self._predictions.labels[row])].append(row)
        return found

    def _own(self, row: int) -> float:
        return float(self._predictions.probs[row, self._predictions.labels[row]])

    def strip(self, c: int) -> list[int]:
        """Rows of some recognised cells of a class, from the surest to the least sure."""
        rows = [row for row in self._of_class[c] if self._predictions.predicted[row] == c]
        return [rows[i] for i in evenly(len(rows), _STRIP)]

    def spot(self, row: int) -> Spot:
        sheet, at = divmod(self.thumbnails.places[row], COLUMNS * ROWS)
        return Spot(sheet, at % COLUMNS * SIDE, at // COLUMNS * SIDE)

    def id(self, row: int) -> str:
        return str(self._predictions.ids[row])

    def true(self, row: int) -> str:
        return self.names[self._predictions.labels[row]]

    def taken(self, row: int) -> str:
        return self.names[self._predictions.predicted[row]]

    def sure(self, row: int) -> str:
        return f"{self._predictions.confidence[row]:.3f}"

    def caption(self, row: int) -> str:
        """What a cell is, and what it was taken for."""
        right = self._predictions.labels[row] == self._predictions.predicted[row]
        taken = f"{self.true(row)}, recognised" if right else f"{self.true(row)}, taken for {self.taken(row)}"
        return f"{self.id(row)}: {taken} ({self.sure(row)})"

    @property
    def mistake_rows(self) -> list[tuple[str, str, str, str]]:
        return [(self.id(m.row), self.true(m.row), self.taken(m.row), self.sure(m.row)) for m in self.mistakes]

    @property
    def numbers(self) -> dict[str, Any]:
        """What the page's script reads."""
        if self.facts.predictions is None:
            return {"charts": self.charts, "classes": [], "labels": []}
        p = self._predictions
        places = [self.thumbnails.places.get(row, -1) for row in range(self.n)]
        return {
            "charts": self.charts,
            "classes": [printable(name) for name in p.classes],
            "ids": [printable(name) for name in p.ids.tolist()],
            "labels": p.labels.tolist(),
            "predicted": p.predicted.tolist(),
            "probs": np.rint(1000 * p.probs.astype(np.float64)).astype(int).ravel().tolist(),
            "places": places,
            "sheet": COLUMNS * ROWS,
            "columns": COLUMNS,
            "side": SIDE,
        }


_SPELT = {"top2_accuracy": "top-2 accuracy", "kappa": "Cohen's kappa", "mcc": "Matthews's correlation"}
_SPELT |= {"roc_auc": "ROC-AUC", "pr_auc": "PR-AUC", "nll": "NLL", "brier": "Brier score"}


def _spelt(name: str) -> str:
    """A score's name for people."""
    return _SPELT.get(name, name.replace("_", " ").replace("f1", "F1"))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _bounds(s: dict[str, Any]) -> str:
    if s["value"] is None:
        return ""
    return "not known" if s["low"] is None else f"{s['low']:.3f} to {s['high']:.3f}"


class Together:
    """Several runs beside each other."""

    def __init__(self, runs: Sequence[Facts]):
        found = paired.paired(runs)
        self.names = ("field", *(f.name for f in runs))
        self.fields = [(name, *values) for name, values in paired.fields_that_differ(runs)]
        self.header = ("run", "split", "n", "accuracy", "macro F1", "balanced accuracy", "loss", "ECE")
        self.rows = [_beside(facts) for facts in runs]
        self.pair_header = ["", "accuracy", "difference to the first", "95 % interval"]
        self.pairs = [_pair(one) for one in found.pairs]
        if any(one.alone for one in found.pairs):
            self.pair_header += ["right alone", "the first alone"]
            self.pairs = [
                [*cells, *map(str, one.alone or ("", ""))] for cells, one in zip(self.pairs, found.pairs, strict=True)
            ]
        self.notes = [found.why_not] if found.why_not else _pair_notes(found)


def _beside(run: Facts) -> list[str]:
    m = run.metrics
    if not m:
        return [run.name, "no results yet", *[""] * 6]
    columns = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")
    return [run.name, facts.SPLITS[run.split or "val"], str(m["n"]), *(interval_text(m, c) for c in columns)]


def _pair(one: paired.Pair) -> list[str]:
    bounds = "" if one.low is None or one.high is None else f"{100 * one.low:+.1f} to {100 * one.high:+.1f} points"
    difference = "" if one.difference is None else f"{100 * one.difference:+.1f} points"
    return [one.name, facts.percent(one.accuracy), difference, bounds]


def _pair_notes(found: paired.Paired) -> list[str]:
    notes = [f"On the same {found.n} images ({facts.SPLITS[found.split]})."]
    if found.seeds > 1:
        notes.append(
            f"{found.seeds} seeds each, named by the first run; intervals over images and runs, all together 95 %."
        )
        return [*notes, *(f"{pair.verdict}." for pair in found.pairs if pair.verdict)]
    notes.append(
        "The intervals speak of these trained networks on such images (Agresti and Min 2005), not of how they were "
        "trained: another seed would have given other networks. No verdict with one run each; at least three seeds of "
        "each are needed to know the luck of a run (bmjax compare)."
    )
    return notes
