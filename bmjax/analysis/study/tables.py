"""The tables of a study's parts, from its runs' folders: the same for the terminal, Markdown and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.compare import statistics
from bmjax.analysis.study.records import (
    PUBLISHED,
    Entry,
    Part,
    hits_of,
    results_of,
    running_accuracy,
    seconds_of,
    speed_of,
)
from bmjax.runs.records import interval_text, read_predictions


@dataclasses.dataclass(frozen=True)
class Table:
    """A table and what it says; cells are text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean accuracy over seeds with its 95 % interval, of s runs on n images."""

    accuracy: float
    low: float
    high: float
    s: int
    n: int

    @classmethod
    def of(cls, hits: np.ndarray) -> Mean:
        """Of hits bool [s, n]; images and runs are both taken as samples (docs/statistics.md)."""
        row = statistics.compare({"": hits}, "")[0]
        return cls(row.accuracy, row.low, row.high, *hits.shape)

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ({self.low:.3f} to {self.high:.3f})"


def grouped(entries: Iterable[Entry], fields: Sequence[str]) -> dict[tuple, list[Entry]]:
    """The entries by the values of some of their fields, in order of their first."""
    found: dict[tuple, list[Entry]] = {}
    for entry in entries:
        found.setdefault(tuple(entry.fields.get(field) for field in fields), []).append(entry)
    return found


def mean_of(study: Path, entries: Sequence[Entry], split: str = "val") -> Mean:
    """Of runs over seeds, on one split."""
    return Mean.of(hits_of([study / entry.run for entry in entries], split))


def tables(study: Path, part: Part) -> list[Table]:
    """The tables of a part.

    Raises:
      FileNotFoundError, ValueError: a run's folder is not there or damaged; names it.
    """
    found = _TABLES[part.name](study, part)
    failed = [(entry.run, entry.error) for entry in part.entries if entry.error]
    if failed:
        found.append(Table("Runs that failed", ("run", "error"), tuple(failed)))
    return found


def _backbones(study: Path, part: Part) -> list[Table]:
    header = ("network", "weights", "validation accuracy", "n", "macro F1", "train, running", "train, evaluation mode")
    rows, costs = [], []
    for entry in part.of("backbone"):
        run, name = study / entry.run, str(entry.fields["model.backbone"])
        weights, found = entry.fields["model.weights"], results_of(run)
        figures = (
            interval_text(found["val"], "accuracy"),
            str(found["val"]["n"]),
            interval_text(found["val"], "macro_f1"),
        )
        trained = (f"{running_accuracy(run):.3f}", f"{found['train']['accuracy']:.3f}")
        rows.append((name, Path(weights).name.split("_weights")[0] if weights else "random", *figures, *trained))
        costs.append((name, *_cost(run, entry), str(entry.facts["best_epoch"])))
    cost = Table("What the networks cost", ("network", *_COST, "best epoch"), tuple(costs))
    return [Table("Backbones on one protocol", header, tuple(rows), part.notes), cost]


_COST = ("parameters", "minutes", "images/s in training", "memory of a step, MB")


def _cost(run: Path, entry: Entry) -> tuple[str, ...]:
    memory = entry.facts.get("step_bytes")
    found = (f"{entry.facts['parameters']:,}", f"{seconds_of(run) / 60:.1f}", f"{speed_of(run):.1f}")
    return (*found, "" if memory is None else f"{memory / 1e6:.0f}")


def _paired(title: str, field: str, role: str) -> Callable[[Path, Part], list[Table]]:
    """A table of variants against the first one, several seeds each, paired over images, on validation."""

    def build(study: Path, part: Part) -> list[Table]:
        groups = {str(key[0]): entries for key, entries in grouped(part.of(role), [field]).items()}
        if not groups:
            return []
        baseline = next(iter(groups))
        whole = {name: entries for name, entries in groups.items() if len(entries) == len(groups[baseline])}
        hits = {name: hits_of([study / e.run for e in entries], "val") for name, entries in whole.items()}
        found = statistics.compare(hits, baseline)
        seeds, n = hits[baseline].shape
        header = (field.rsplit(".", 1)[-1], "validation accuracy", f"difference to {baseline}, points")
        header += ("p, corrected", "train, running", "train, evaluation mode")
        rows = []
        for row in found:
            folders = [study / entry.run for entry in whole[row.variant]]
            running = np.mean([running_accuracy(run) for run in folders])
            evaluated = np.mean([results_of(run)["train"]["accuracy"] for run in folders])
            accuracy = Mean(row.accuracy, row.low, row.high, seeds, n)
            rows.append((row.variant, str(accuracy), *against(row), f"{running:.3f}", f"{evaluated:.3f}"))
        verdicts = [statistics.verdict(row, baseline, n, seeds) for row in found if row.variant != baseline]
        notes = (f"{n} validation images, {seeds} seeds.", *(f"{text}." for text in verdicts), *part.notes)
        return [Table(title, header, tuple(rows), notes)]

    return build


def against(row: statistics.Row) -> tuple[str, str]:
    """The difference to the baseline in points, with its interval where there is one, and its p, corrected."""
    if row.difference is None:
        return "", ""
    text = f"{100 * row.difference:+.1f}"
    if row.difference_low is None or row.difference_high is None:
        return text, ""
    return f"{text} ({100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f})", f"{row.p_corrected:.3g}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Optimizers by batch sizes at one kind of rate: means by (optimizer, batch), and each one's rate."""

    role: str
    optimizers: tuple[str, ...]
    batches: tuple[int, ...]
    means: dict[tuple[str, int], Mean]
    rates: dict[tuple[str, int], float]


RATES = {"default": "Keras's default rates", "tuned": "rates tuned on validation"}


def grids(study: Path, part: Part) -> list[Grid]:
    """The optimizers' grids at both kinds of rates."""
    found = []
    for role in RATES:
        groups = grouped(part.of(role), ["optim.name", "train.batch_size"])
        if groups:
            names, batches = (tuple(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
            means = {key: mean_of(study, entries) for key, entries in groups.items()}
            rates = {key: float(entries[0].fields["optim.lr"]) for key, entries in groups.items()}
            found.append(Grid(role, names, tuple(sorted(batches)), means, rates))
    return found


def _optimizers(study: Path, part: Part) -> list[Table]:
    found = []
    for grid in grids(study, part):
        header = ("optimizer", *(f"batch {b}" for b in grid.batches))
        rows = []
        for name in grid.optimizers:
            cells = [(grid.means.get((name, b)), grid.rates.get((name, b))) for b in grid.batches]
            rows.append((name, *("" if m is None else f"{m}; rate {rate:g}" for m, rate in cells)))
        one = next(iter(grid.means.values()))
        notes = (f"Validation accuracy, {one.n} images, mean of {one.s} runs (95 % interval).",)
        found.append(Table(f"Optimizers by batch size, {RATES[grid.role]}", header, tuple(rows), notes))
    if found:
        found[-1] = dataclasses.replace(found[-1], notes=(*found[-1].notes, *part.notes))
    return found


def _best(study: Path, part: Part) -> list[Table]:
    found = []
    for entry in part.of("best"):
        run = study / entry.run
        results = results_of(run)
        rows: list[tuple[str, ...]] = [("published (abstract)", "train", "", f"{PUBLISHED['train']:.4f}", "", "")]
        rows += [("published (abstract)", "test", "", f"{PUBLISHED['test']:.4f}", "", "")]
        rows += [("ours", "train, running", "", f"{running_accuracy(run):.4f}", "", "")]
        names = {"train": "train, evaluation mode", "val": "validation", "test": "test, opened once"}
        for split, name in names.items():
            if split in results:
                m = results[split]
                figures = [interval_text(m, f) for f in ("accuracy", "macro_f1", "balanced_accuracy")]
                rows.append(("ours", name, str(m["n"]), *figures))
        header = ("model", "split", "n", "accuracy", "macro F1", "balanced accuracy")
        found.append(Table("The selected model, beside the published figures", header, tuple(rows), part.notes))
        found.append(Table("What it cost", _COST, (_cost(run, entry),)))
        split = "test" if "test" in results else "val"
        predictions = read_predictions(run, split)
        if predictions is not None:
            found.append(_classes(results[split], predictions.classes, split))
    return found


def _classes(metrics: dict[str, Any], classes: Sequence[str], split: str) -> Table:
    rows = [
        (name, str(m["n"]), *(interval_text(m, figure) for figure in ("precision", "recall", "f1")))
        for name, m in zip(classes, metrics["per_class"], strict=True)
    ]
    title = f"Classes of the selected model, {'test' if split == 'test' else 'validation'}"
    return Table(title, ("class", "n", "precision", "recall", "F1"), tuple(rows))


@dataclasses.dataclass(frozen=True)
class ProtocolRow:
    """A protocol on one kind of labels: test accuracy with one image of each test cell, and on the training images."""

    protocol: str
    labels: str
    test: Mean
    running: float
    evaluated: float
    chance: float


def protocol_rows(study: Path, part: Part) -> list[ProtocolRow]:
    """The protocols' figures over seeds."""
    found = []
    for (protocol, labels), entries in grouped(part.of("protocol"), ["protocol", "labels"]).items():
        folders = [study / entry.run for entry in entries]
        predictions = read_predictions(folders[0], "test")
        assert predictions is not None  # hits_of says so
        # Copies of one cell are no further images: of each cell in the test split the first stands for all.
        cells = [name.split("#")[0] for name in predictions.ids]
        _, first = np.unique(cells, return_index=True)
        running = float(np.mean([running_accuracy(run) for run in folders]))
        evaluated = float(np.mean([results_of(run)["train"]["accuracy"] for run in folders]))
        mean = Mean.of(hits_of(folders, "test")[:, first])
        found.append(ProtocolRow(protocol, labels, mean, running, evaluated, 1 / len(predictions.classes)))
    return found


def _protocol(study: Path, part: Part) -> list[Table]:
    header = ("protocol", "labels", "train, running", "train, evaluation mode", "test accuracy", "test cells", "seeds")
    found = protocol_rows(study, part)
    rows = [
        (r.protocol, r.labels, f"{r.running:.3f}", f"{r.evaluated:.3f}", str(r.test), str(r.test.n), str(r.test.s))
        for r in found
    ]
    notes = ()
    if found:
        beyond = [r.protocol for r in found if r.labels == "shuffled" and r.test.low > r.chance]
        chance = f"Chance is {found[0].chance:.3f}. On shuffled labels, above it beyond its interval: "
        notes = (chance + f"{', '.join(beyond) or 'none'}.", "Of each cell in a test split one image is counted.")
    return [Table("What a protocol alone makes", header, tuple(rows), (*notes, *part.notes))]


_TABLES: dict[str, Callable[[Path, Part], list[Table]]] = {
    "backbones": _backbones,
    "head": _paired("The added head against a plain one", "head", "head"),
    "optimizers": _optimizers,
    "attention": _paired("None against attention", "model.attention", "attention"),
    "best": _best,
    "protocol": _protocol,
}


def choices_table(parts: Iterable[Part]) -> Table:
    """Every choice that the abstract leaves open, with the parts that made it so."""
    made: dict[tuple[str, str, str], list[str]] = {}
    for part in parts:
        for choice in part.open_choices:
            made.setdefault(choice, []).append(part.name)
    ordered = sorted(made.items(), key=lambda item: item[0][0])
    rows = tuple((field, value, why, ", ".join(names)) for (field, value, why), names in ordered)
    return Table("What the abstract leaves open, and what stands here", ("field", "here", "open", "parts"), rows)


def markdown(found: Iterable[Table], level: int = 2) -> str:
    """Tables as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells) + " |"
        )

    blocks = []
    for table in found:
        lines = [f"{'#' * level} {table.title}", "", line(table.header), "|" + "---|" * len(table.header)]
        lines += [line(row) for row in table.rows]
        if table.notes:
            lines += ["", *(f"- {note}" for note in table.notes)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
