"""A run's model card: what it is for, what it is not for, what it was trained on, how good it is, and its limits.

The sections follow Mitchell et al. 2019, "Model cards for model reporting", https://arxiv.org/abs/1810.03993.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from bmjax.analysis.report import facts as told
from bmjax.analysis.report.facts import Facts, between, percent
from bmjax.files import printable, write_text

FEW = 30
"""Images of a class below which its figures are named as uncertain: Wilson's interval may then exceed 34 points."""
_LICENCES = {"synthetic": "Rendered by bmjax; no licence is needed.", "arrays": "Given from Python; not recorded."}
_UNKNOWN = "Not recorded in the run; it is that of the data's source."


@dataclasses.dataclass(frozen=True)
class Section:
    """Paragraphs, and a table where there is one."""

    title: str
    text: tuple[str, ...]
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def sections(facts: Facts) -> list[Section]:
    """The card's sections, from a run's records."""
    return [
        Section(
            "Intended use",
            (
                "Research on the classification of single-cell images: to compare methods, and to sort images for a "
                "person who looks at every answer. The classes are " + ", ".join(_names(facts)) + ".",
            ),
        ),
        Section("Not for", (told.NOT_FOR,)),
        Section("Model", (told.trained(facts), told.duration(facts))),
        _data(facts),
        *_metrics(facts),
        Section("Limits", tuple(_limits(facts))),
        Section("Environment", (), ("", ""), tuple(told.environment_rows(facts))),
    ]


def _names(facts: Facts) -> list[str]:
    return list(facts.data.get("classes") or (facts.predictions.classes if facts.predictions else ["not recorded"]))


def _data(facts: Facts) -> Section:
    source = str(facts.config.get("data", {}).get("source", ""))
    text = [told.trained_on(facts)]
    if facts.data:
        text.append(
            f"Fingerprint {facts.data['fingerprint'][:16]}. {facts.data.get('copies', 0)} byte-identical copies, "
            f"always on one side of the split; {len(facts.data.get('skipped', []))} files could not be read."
        )
    text.append(f"Licence of the data: {_LICENCES.get(source, _UNKNOWN)}")
    return Section("Training data", tuple(text), *data_table(facts))


def data_table(facts: Facts) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """(header, rows): the images of each class on each side of the split."""
    counts = facts.data.get("counts", {})
    if not counts:
        return (), ()
    rows = [(name, *(str(of_split.get(name, 0)) for of_split in counts.values())) for name in facts.data["classes"]]
    rows.append(("all", *(str(sum(of_split.values())) for of_split in counts.values())))
    return ("class", *counts), tuple(rows)


def _metrics(facts: Facts) -> list[Section]:
    if facts.split is None:
        return [Section("Metrics", (told.no_result(facts),))]
    m, where = facts.metrics, told.SPLITS[facts.split]
    opened = f" The test split was opened {told.times(facts.openings)}." if facts.openings else ""
    text = [
        f"On {where}, n = {m['n']}: accuracy {percent(m['accuracy'])} ({between(m['accuracy_low'], m['accuracy_high'])}"
        f", 95 % interval by {facts.by}).{opened}",
        told.calibration_words(facts),
    ]
    rows = []
    for name, word in (("macro_f1", "macro F1"), ("balanced_accuracy", "balanced accuracy"), ("ece", "ECE")):
        bounds = f"{m[f'{name}_low']:.3f} to {m[f'{name}_high']:.3f}" if f"{name}_low" in m else ""
        rows.append((word, f"{m[name]:.3f}", bounds, str(m["n"])))
    if facts.predictions is None:
        return [Section("Metrics", tuple(text), ("figure", "value", "95 % interval", "n"), tuple(rows))]
    of_class = [
        (f"sensitivity of {r['name']}", f"{r['recall']:.3f}", f"{r['recall_low']:.3f} to {r['recall_high']:.3f}",
         str(r["n"]))
        for r in facts.classes
    ]  # fmt: skip
    return [Section("Metrics", tuple(text), ("figure", "value", "95 % interval", "n"), (*rows, *of_class))]


def _limits(facts: Facts) -> list[str]:
    found = []
    small = [f"{r['name']} ({r['n']})" for r in facts.classes if r["n"] < FEW]
    if small:
        found.append(
            f"Classes with fewer than {FEW} images in {told.SPLITS[facts.split or 'val']}, whose own figures are "
            f"uncertain: {', '.join(small)}."
        )
    if facts.metrics.get("intervals_note"):
        found.append(facts.metrics["intervals_note"].capitalize() + ".")
    if not facts.data.get("groups"):
        found.append(
            "No patient or slide is recorded for the images: cells of one slide may stand on both sides of the split, "
            "and the figures are then too high for new patients."
        )
    found.append(
        "Images of another laboratory, stain, microscope or scale were not tested unless this is said above; expect "
        "lower figures, and less honest probabilities. bmjax predict warns of images that look otherwise."
    )
    found.append("A cell of a kind that is not among the classes is given one of them all the same.")
    return found


_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\1", printable(text))


def markdown(facts: Facts) -> str:
    """The card as Markdown."""
    lines = [f"# {_plain(facts.name)}: model card", ""]
    for section in sections(facts):
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [_plain(paragraph), ""] if paragraph else []
        if section.rows:
            lines += [_row(section.header), _row(["---"] * len(section.header), plain=False)]
            lines += [*map(_row, section.rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str], *, plain: bool = True) -> str:
    return "| " + " | ".join(map(_plain, cells) if plain else cells) + " |"


def write_card(facts: Facts) -> None:
    """Writes model_card.md into the run's folder."""
    write_text(facts.run_dir / "model_card.md", markdown(facts), errors="replace")
