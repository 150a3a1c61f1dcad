"""The table of a comparison: what it holds, and as Markdown."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

from bmjax.analysis.compare import planning, statistics
from bmjax.analysis.compare.cost import Cost
from bmjax.analysis.compare.design import Design
from bmjax.config.base import Config
from bmjax.files import read_json

_ACCURACY = "Accuracy is the mean over seeds, of each run's best epoch on validation."
_ONE_SPLIT = """Images and runs are both taken as samples: another test set and another training would have given other
figures."""
_FOLDS = """Each image was tested once a seed, in its fold. Verdicts rest on the spread of differences between folds, by
the corrected resampled t: folds share training images, so a mean over them is less certain than they look. The
intervals of accuracies take the images as independent."""
_TOGETHER = """Intervals of differences hold together for all variants at 95 %, and a difference counts as shown exactly
where its interval leaves out zero: of tables of equal variants at most one in twenty claims any difference. The
corrected p says the same. The smallest difference is the true one that so many seeds and images show four times in
five. The intervals of accuracies are each one's own."""
_DEPENDENT = "Images are taken as independent: where several come from one slide, the intervals are too narrow."
_COSTS = """Parameters are those of the attention, FLOPs those of the forward pass beyond the backbone, images/s those
of one run in training, others beside it where several train at once."""
_METHOD = """A variant chosen by this table needs other data for its final figure. The method: docs/statistics.md."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The table: a row of statistics and the cost of each variant, accuracies [variant][seed], and what it is about."""

    name: str
    baseline: str
    seeds: tuple[int, ...]
    n: int
    about: str
    rows: tuple[statistics.Row, ...]
    costs: dict[str, Cost]
    accuracies: dict[str, tuple[float, ...]]
    classes: int = 0
    folds: int = 0
    openings: int = 1
    """How often the test split was opened for it, for all runs at once."""
    wanted: float | None = None
    decided: dict[str, int] = dataclasses.field(default_factory=dict)
    """Where seeds were added: the number of seeds after which a variant's difference was shown, or excluded."""
    rates: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    """Learning rates chosen on validation, by row; one a fold."""
    apart: tuple[tuple[str, str], ...] | None = None
    """Pairs of rows that can be told apart, all pairs held to 5 % together; None where seeds were added, or too few."""


def about(config: Config, design: Design) -> str:
    """What was compared, by one of the runs."""
    data = read_json(Path(config.run_dir) / "dataset.json")
    weights = f"weights {Path(config.model.weights).name}" if config.model.weights else "random weights"
    text = (
        f"{data['name']}, {data['n']} images at {config.data.image_size} pixels; {config.model.backbone}, {weights}, "
    )
    if config.features.cached:
        views = config.features.views
        seen = f"{views} augmented views of each training image" if views else "the images as they are"
        text += f"frozen, on cached features of {seen}; "
    else:
        text += "end to end; "
    epochs = " + ".join(str(stage.epochs) for stage in config.stages)
    text += f"{epochs} epochs of {config.optim.name}, batch {config.train.batch_size}"
    each = " in each fold" if design.folds else ""
    return text + (f"; each variant's own rate, the best of {design.tune} on validation{each}" if design.tune else "")


def _against(row: statistics.Row, seeds: int, n: int) -> list[str]:
    """The cells of a row that set it against the baseline."""
    if row.difference is None:
        return [""] * 4
    text = f"{100 * row.difference:+.1f}"
    if row.difference_low is None or row.difference_high is None or row.spread is None:
        return [text, "", "", ""]
    bounds = f"{100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f}"
    smallest = f"{100 * planning.detectable(row.spread, seeds, n):.1f}"
    return [f"{text} ({bounds})", f"{row.p:.3g}", f"{row.p_corrected:.3g}", smallest]


def header(c: Comparison) -> list[str]:
    """The names of the table's columns."""
    return [
        "variant",
        "accuracy, % (95 % interval)",
        f"difference to {c.baseline}, points (95 % interval for all at once)",
        "p, alone",
        "p, corrected",
        "smallest difference shown, points",
        *(["learning rate"] if c.rates else []),
        "parameters",
        "MFLOP an image",
        "images/s",
    ]


def cells(c: Comparison) -> list[list[str]]:
    """The rows of the table, as text."""
    found = []
    for row in c.rows:
        cost, seeds = c.costs[row.variant], c.decided.get(row.variant, len(c.seeds))
        rates = [", ".join(f"{rate:g}" for rate in sorted(set(c.rates[row.variant])))] if c.rates else []
        found.append([
            row.variant,
            f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})",
            *_against(row, seeds, c.n),
            *rates,
            f"{cost.parameters:,}",
            f"{cost.flops / 1e6:.2f}",
            f"{cost.images_per_second:.0f}",
        ])  # fmt: skip
    return found


def tested(c: Comparison) -> str:
    """On what it was tested, in words."""
    many = len(c.seeds)
    seeds = f"{many} seed{'s' * (many > 1)} ({', '.join(map(str, c.seeds))})"
    return f"Test: {c.n} images, {seeds}" + (f" in each of {c.folds} folds." if c.folds else ".")


def verdicts(c: Comparison) -> list[str]:
    """What can be said of each row, and what a wanted difference would still need."""
    found = []
    for row in c.rows:
        if row.variant == c.baseline:
            continue
        seeds = c.decided.get(row.variant, len(c.seeds))
        text = statistics.verdict(row, c.baseline, c.n, seeds, c.folds)
        if c.wanted is not None and row.spread is not None:
            if not row.shown and row.variant in c.decided:
                text = f"{row.variant}: differs from {c.baseline} by less than {100 * c.wanted:g} points"
            if row.variant in c.decided:
                text += f", known after {seeds} seeds"
            else:
                text += "; " + planning.need(row, seeds, c.n, c.wanted).split(": ", 1)[1]
        found.append(text)
    return found


def note(c: Comparison) -> str:
    """How the table is to be read."""
    times = "once, when all was trained" if c.openings == 1 else f"{c.openings} times"
    opened = f"The test split was opened {times}, for all runs together."
    parts = [_ACCURACY, _FOLDS if c.folds else _ONE_SPLIT, _TOGETHER, *([] if c.folds else [_DEPENDENT]), _COSTS]
    if c.wanted is not None:
        parts.append("Seeds were added by a plan whose looks together err in at most 5 % of tables.")
    return " ".join(" ".join([*parts, opened, _METHOD]).split())


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: the table, what it is about, and a verdict on each variant."""
    c = comparison
    lines = [f"## {c.name}: attention variants on equal terms", "", f"{c.about}. {tested(c)}", ""]
    lines += [f"| {' | '.join(header(c))} |", "|" + "---|" * len(header(c))]
    lines += [f"| {' | '.join(row)} |" for row in cells(c)]
    return "\n".join([*lines, "", *(f"- {text}" for text in verdicts(c)), "", textwrap.fill(note(c), 118), ""])
