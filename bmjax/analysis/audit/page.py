"""What an audit found: audit.html with the pictures, audit.json, and near_duplicates.csv for `data.duplicates`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.audit.checks import Audit
from bmjax.analysis.report import figures
from bmjax.analysis.report import html as page
from bmjax.data.splits import NAMES, dataset_summary
from bmjax.files import printable, write_text

_SHOWN = 24  # pictures to a section
_COLOURS = {"error": figures.WRONG, "warning": "#aa6600", "note": figures.RATE}


def write_audit(audit: Audit, out: str | Path) -> Path:
    """Writes audit.json, audit.html and, where there are near duplicates, near_duplicates.csv into a folder.

    Raises:
      OSError: it can't be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "audit.json", json.dumps(_record(audit), indent=2), errors="replace")
    csv_path = out / "near_duplicates.csv"
    csv_path.unlink(missing_ok=True)  # an earlier audit's
    sizes = np.bincount(audit.groups)
    rows = np.flatnonzero(sizes[audit.groups] > 1)
    if len(rows):
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(("path", "group"))
        order = rows[np.argsort(audit.groups[rows], kind="stable")]
        writer.writerows((audit.dataset.ids[i], audit.groups[i]) for i in order)
        write_text(csv_path, text.getvalue(), errors="surrogateescape")
    page.write(out / "audit.html", f"Audit of {audit.dataset.name}", _parts(audit))
    return out / "audit.html"


def _sides(audit: Audit) -> list[str]:
    """The split of each row; "" where there is none."""
    side = [""] * len(audit.dataset)
    if audit.splits is not None:
        for name in NAMES:
            for i in getattr(audit.splits, name):
                side[i] = name
    return side


def _record(audit: Audit) -> dict[str, Any]:
    ids, sides = audit.dataset.ids, _sides(audit)
    labels = [audit.dataset.classes[label] for label in audit.dataset.labels]

    def image(i: int) -> dict[str, str]:
        return {"path": ids[i], "label": labels[i], "split": sides[i]}

    errors = []
    if audit.label_errors is not None:
        for i in audit.label_errors.rows:
            top = int(audit.label_errors.probs[i].argmax())
            confidence = float(audit.label_errors.probs[i, top])
            errors.append(image(i) | {"predicted": audit.dataset.classes[top], "confidence": round(confidence, 4)})
    record: dict[str, Any] = {
        "config": dataclasses.asdict(audit.config),
        "findings": [dataclasses.asdict(finding) for finding in audit.findings],
        "files": {name: dict(counts) for name, counts in _file_counts(audit).items()},
        "statistics": audit.medians,
        "laboratories": {
            name: {"images": counts, "statistics": audit.medians_there.get(name)}
            for name, counts in _by_laboratory(audit).items()
        },
        "shortcuts": [dataclasses.asdict(s) for s in audit.shortcuts],
        "near_duplicates": [
            {"first": image(i), "second": image(j), "correlation": round(float(c), 4), "certain": bool(c_)}
            for i, j, c, c_ in zip(*audit.pairs.arrays, audit.pairs.certain, strict=True)
        ],
        "label_errors": None if audit.label_errors is None else errors,
    }
    if audit.splits is not None:
        record["data"] = dataset_summary(audit.dataset, audit.splits)
    return record


def _file_counts(audit: Audit) -> dict[str, Counter]:
    return {
        "format": Counter(f.format for f in audit.facts),
        "colour mode": Counter(f.mode for f in audit.facts),
        "size in pixels": Counter(f"{f.width}x{f.height}" for f in audit.facts),
    }


def _by_laboratory(audit: Audit) -> dict[str, dict[str, int]]:
    """Each laboratory's images of each class; none where the source names no laboratories."""
    if not audit.laboratories:
        return {}
    names, classes = np.array(audit.laboratories), audit.dataset.classes
    counts = {
        name: np.bincount(audit.dataset.labels[names == name], minlength=len(classes)) for name in np.unique(names)
    }
    return {str(name): dict(zip(classes, found.tolist(), strict=True)) for name, found in counts.items()}


def _parts(audit: Audit) -> list[str]:
    dataset = audit.dataset
    levels = Counter(finding.level for finding in audit.findings)
    cards = [
        page.card(f"{len(dataset):,}", "images", f"{len(dataset.classes)} classes"),
        page.card(str(levels["error"]), "errors", "break a claim"),
        page.card(str(levels["warning"]), "warnings", "want a look"),
        page.card(str(int(audit.pairs.certain.sum())), "pairs of copies", "certain"),
    ]
    note = f"{dataset.name}, read as {audit.config.source} at {dataset.images.shape[1]} pixels."
    parts = [f'<h1>Audit of {page.text(dataset.name)}</h1><p class="note">{page.text(note)}</p>']
    parts.append(f'<div class="cards">{"".join(cards)}</div>')
    return [
        *parts,
        _findings(audit),
        _classes(audit),
        _laboratories(audit),
        _duplicates(audit),
        _shortcuts(audit),
        _labels(audit),
        _files(audit),
    ]


def _findings(audit: Audit) -> str:
    if not audit.findings:
        return "<h2>Findings</h2><p>None.</p>"
    items = []
    for f in audit.findings:
        level = f'<b style="color:{_COLOURS[f.level]}">{f.level}</b>'
        items.append(f"<li>{level}, {page.text(f.subject)}: {page.text(f.text)}{_all_names(f.images)}</li>")
    pictures = [i for f in audit.findings if f.subject == "images" for i in f.images]
    rows = {name: i for i, name in enumerate(audit.dataset.ids)}
    shown = [rows[name] for name in dict.fromkeys(pictures)][:_SHOWN]
    html = f"<h2>Findings</h2><ul>{''.join(items)}</ul>"
    if shown:
        cells = [(audit.dataset.images[i], _title(audit, i), figures.RATE) for i in shown]
        html += page.image(figures.cells(cells), "Images unlike the others")
    return html


def _all_names(names: tuple[str, ...]) -> str:
    if len(names) <= 3:
        return ""
    listed = "\n".join(names[:1000]) + (f"\n... {len(names) - 1000} more in audit.json" if len(names) > 1000 else "")
    return f"<details><summary>all {len(names)}</summary><pre>{page.text(listed)}</pre></details>"


def _title(audit: Audit, i: int, *more: str) -> str:
    path = audit.dataset.ids[i].rsplit("/", 1)[-1]
    path = printable(path)
    return "\n".join([path if len(path) <= 22 else f"{path[:10]}...{path[-9:]}", *more])


def _classes(audit: Audit) -> str:
    dataset, sides = audit.dataset, np.array(_sides(audit))
    rows = []
    for label, name in enumerate(dataset.classes):
        mine = dataset.labels == label
        split = [int((mine & (sides == s)).sum()) for s in NAMES] if audit.splits is not None else ["", "", ""]
        rows.append([name, int(mine.sum()), *split])
    return f"<h2>Classes</h2>{page.table(('class', 'images', *NAMES), rows)}"


def _laboratories(audit: Audit) -> str:
    counts = _by_laboratory(audit)
    if not counts:
        return ""
    rows = [[name or "unknown", sum(found.values()), *found.values()] for name, found in counts.items()]
    text = "Classes that come from one laboratory more than from another can be told by its stain. "
    text += "Below, medians of a sample" + (", in matched colours." if audit.config.match_colours else ".")
    header = ("laboratory", "images", *audit.dataset.classes)
    medians = _medians("laboratory", {name or "unknown": values for name, values in audit.medians_there.items()})
    return f"<h2>Laboratories</h2>{page.table(header, rows)}<p class='note'>{page.text(text)}</p>{medians}"


def _medians(of: str, each: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(each.values())))
    return page.table((of, *names), [[name, *(f"{values[n]:.3g}" for n in names)] for name, values in each.items()])


def _duplicates(audit: Audit) -> str:
    title = "<h2>Copies and near duplicates</h2>"
    if not len(audit.pairs):
        return f"{title}<p>None found, under mirroring, quarter turns, re-encoding, resizing and brightness.</p>"
    dataset, sides = audit.dataset, _sides(audit)
    first, second, correlation = audit.pairs.arrays
    # What harms most comes first: other sides, other labels, then the closest.
    torn = np.array([sides[i] != sides[j] for i, j in zip(first, second, strict=True)])
    conflict = dataset.labels[first] != dataset.labels[second]
    order = np.lexsort((-correlation, ~conflict, ~torn))
    # Of many copies of one image one pair is enough to see; a suspected pair is a group of its own.
    group = np.where(audit.pairs.certain, audit.groups[first], -1 - np.arange(len(first)))
    order = order[np.sort(np.unique(group[order], return_index=True)[1])][: _SHOWN // 2]
    cells = []
    for p in order:
        colour = figures.WRONG if audit.pairs.certain[p] else figures.RATE
        for i, more in ((int(first[p]), f"{correlation[p]:.3f}"), (int(second[p]), "")):
            words = f"{dataset.classes[dataset.labels[i]]}, {sides[i] or 'no split'}"
            cells.append((dataset.images[i], _title(audit, i, words, more), colour))
    certain = int(audit.pairs.certain.sum())
    text = f"{certain} certain pairs (red) and {len(audit.pairs) - certain} suspected ones, by the correlation of fine "
    text += f"detail, the figure above each pair. Shown: {len(order)}, one of a group, first those on different sides, "
    text += "then those of different classes. All are in audit.json."
    return f"{title}<p>{page.text(text)}</p>{page.image(figures.cells(cells), 'Pairs of near duplicates')}"


def _shortcuts(audit: Audit) -> str:
    rows = [
        [s.sees, s.n, f"{s.balanced_accuracy:.3f} ({s.low:.3f} to {s.high:.3f})", f"{s.chance:.3f}"]
        for s in audit.shortcuts
    ]
    header = ("what is seen", "n", "balanced accuracy", "guessing")
    text = "Random forests that never see the cell, cross-validated so that what belongs together is not divided; 95 % "
    text += (
        "intervals by the bootstrap over images. What is well above guessing, a network may learn in place of cells."
    )
    below = "Medians by class; channels and contrast in grey levels, focus the standard deviation of the Laplacian."
    return (
        f"<h2>Shortcuts</h2>{page.table(header, rows)}<p class='note'>{page.text(text)}</p>"
        f"<h2>Colour and focus</h2>{_medians('class', audit.medians)}<p class='note'>{page.text(below)}</p>"
    )


def _labels(audit: Audit) -> str:
    found = audit.label_errors
    if found is None:
        return "<h2>Labels</h2><p>Not examined: <code>--features</code> does, with a pretrained network.</p>"
    text = (
        "A classifier of a pretrained network's features, asked only of images it did not see, has balanced accuracy "
    )
    text += (
        f"{found.balanced_accuracy:.3f}. {len(found.rows)} of its contradictions are of a kind that confident learning "
    )
    text += (
        "takes for wrong labels; an expert must decide. The worse the classifier, the more of them are its own errors."
    )
    html = f"<h2>Labels</h2><p>{page.text(text)}</p>"
    dataset, cells = audit.dataset, []
    for i in found.rows[:_SHOWN]:
        top = int(found.probs[i].argmax())
        words = f"{dataset.classes[dataset.labels[i]]}, or {dataset.classes[top]} {found.probs[i, top]:.2f}"
        cells.append((dataset.images[i], _title(audit, i, words), figures.RATE))
    return html + (page.image(figures.cells(cells), "Cells whose label is likely wrong") if cells else "")


def _files(audit: Audit) -> str:
    html = "<h2>Files</h2>"
    for name, counts in _file_counts(audit).items():
        rows = [[value, n] for value, n in counts.most_common(10)]
        if len(counts) > 10:
            rows.append([f"{len(counts) - 10} others", sum(counts.values()) - sum(n for _, n in rows)])
        html += page.table((name, "files"), rows)
    if audit.dataset.skipped:
        html += "<h3>Can't be read</h3>" + page.table(("file", "reason"), audit.dataset.skipped[:1000])
    return html
