"""study.html and study.md: the study's tables and pictures on one page without links, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bmjax.analysis.report import figures as pictures
from bmjax.analysis.report import html as page
from bmjax.analysis.study import figures
from bmjax.analysis.study.records import PARTS, PUBLISHED, Part, read_study, results_of
from bmjax.analysis.study.tables import Mean, Table, choices_table, grids, markdown, protocol_rows, tables
from bmjax.files import write_text
from bmjax.runs.records import read_predictions, read_records

_LEGEND = "Whole lines: validation. Dashed: the training images as a progress bar shows them, with dropout and changes."


def write_study(folder: str | Path) -> tuple[Path, Path]:
    """Writes study.html and study.md into a study's folder, from the parts that have run; returns both paths.

    Raises:
      FileNotFoundError: it holds no part of a study, or a run is missing.
      ValueError: a file is damaged; names it.
    """
    study = Path(folder)
    parts = read_study(study)
    found = {name: tables(study, part) for name, part in parts.items()}
    choices = choices_table(parts.values())
    body = [f"<h1>{page.text('The published study, run again')}</h1>", _note(_state(parts)), _cards(study, parts)]
    for name, part in parts.items():
        body.append(_table(found[name][0]) if found[name] else "")
        body.append(_PICTURES.get(name, _nothing)(study, part))
        body += [_table(table) for table in found[name][1:]]
        body.append(f"{_note(_about(part))}<p class='note'><code>{page.text(part.command)}</code></p>")
    body.append(_table(choices))
    html, text = study / "study.html", study / "study.md"
    page.write(html, "The published study", body)
    blocks = ["# The published study, run again\n", _state(parts) + "\n"]
    for name, part in parts.items():
        blocks += [markdown(found[name]), f"{_about(part)} `{part.command}`\n"]
    write_text(text, "\n".join([*blocks, markdown([choices])]), errors="replace")
    return html, text


def _note(text: str) -> str:
    return f'<p class="note">{page.text(text)}</p>'


def _table(table: Table) -> str:
    notes = f'<p class="note">{"<br>".join(map(page.text, table.notes))}</p>' if table.notes else ""
    return f"<h2>{page.text(table.title)}</h2>{page.table(table.header, table.rows)}{notes}"


def _state(parts: dict[str, Part]) -> str:
    text = "Accuracies are fractions of images, with 95 % intervals. All is chosen on validation. The test split is "
    text += "opened for the selected model, once, and in the protocols, whose subject it is."
    if any(part.command.endswith("--smoke") for part in parts.values()):
        text += " Tiny networks on rendered cells: that it works is all that these figures say."
    missing = [name for name in PARTS if name not in parts]
    return text + (f" Not run yet: {', '.join(missing)}." if missing else "")


def _about(part: Part) -> str:
    return f"{part.name}: {part.about}. {part.seconds / 60:.1f} min on {part.device}."


def _cards(study: Path, parts: dict[str, Part]) -> str:
    """The published figures, and ours beside them."""
    found = [page.card(f"{100 * PUBLISHED['test']:.2f} %", "published, test", "n is not known")]
    found.append(page.card(f"{100 * PUBLISHED['train']:.2f} %", "published, train"))
    for entry in parts["best"].of("best") if "best" in parts else []:
        results = results_of(study / entry.run)
        for split, name in (("test", "selected model, test"), ("train", "selected model, train")):
            if split in results:
                m = results[split]
                bounds = f"{100 * m['accuracy_low']:.1f} to {100 * m['accuracy_high']:.1f}, n {m['n']}"
                found.append(page.card(f"{100 * m['accuracy']:.2f} %", name, bounds))
    rows = protocol_rows(study, parts["protocol"]) if "protocol" in parts else []
    for row in rows:
        if row.protocol == "augmented first":
            found.append(page.card(_percent(row.test), f"copies on both sides, labels {row.labels}", _bounds(row.test)))
    return f'<div class="cards">{"".join(found)}</div>'


def _percent(mean: Mean) -> str:
    return f"{100 * mean.accuracy:.1f} %"


def _bounds(mean: Mean) -> str:
    return f"{100 * mean.low:.1f} to {100 * mean.high:.1f}, n {mean.n}"


def _nothing(study: Path, part: Part) -> str:
    return ""


def _backbones(study: Path, part: Part) -> str:
    runs = [(str(e.fields["model.backbone"]), read_records(study / e.run, "epoch")) for e in part.of("backbone")]
    return (
        (page.image(figures.accuracies(runs), "Accuracy by epoch of each network", 760) + _note(_LEGEND))
        if runs
        else ""
    )


def _optimizers(study: Path, part: Part) -> str:
    found = grids(study, part)
    return page.image(figures.heatmaps(found), "Validation accuracy by optimizer and batch size") if found else ""


def _best(study: Path, part: Part) -> str:
    blocks = []
    for entry in part.of("best"):
        run = study / entry.run
        steps, epochs = read_records(run, "train"), read_records(run, "epoch")
        blocks.append(page.image(pictures.curves(steps, epochs), "Loss, accuracy and rate over the epochs"))
        results = results_of(run)
        split = "test" if "test" in results else "val"
        predictions = read_predictions(run, split)
        if predictions is not None:
            counts = np.array(results[split]["confusion"])
            blocks.append(page.image(pictures.confusion(counts, predictions.classes), "Confusion matrix", 620))
    return "".join(blocks)


def _protocol(study: Path, part: Part) -> str:
    found = protocol_rows(study, part)
    return page.image(figures.protocols(found), "Accuracy under each protocol") if found else ""


_PICTURES: dict[str, Callable[[Path, Part], str]] = {
    "backbones": _backbones,
    "optimizers": _optimizers,
    "best": _best,
    "protocol": _protocol,
}
