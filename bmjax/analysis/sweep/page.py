"""sweep.html: one page without links: heatmaps of two fields, parallel coordinates, both as SVG, and the cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bmjax.analysis.report import html
from bmjax.analysis.sweep.rows import FAILED, FINISHED, Row
from bmjax.analysis.sweep.table import columns, figure_text, value_text

if TYPE_CHECKING:
    from bmjax.analysis.sweep.run import Sweep

_MOST_VALUES, _MOST_MAPS = 12, 6
_LOW, _HIGH = (68, 84, 138), (252, 190, 60)  # blue to amber, told apart by any eye
_NOTE = """Cells are chosen between on validation; no cell has read the test split. The best of many cells looks better
on validation than it is, the more so the more cells there are and the fewer images. Its figure on test is opened once:
bmjax eval {0} --split test. Intervals are 95 %, over images."""


def write_page(sweep: Sweep) -> None:
    """Writes sweep.html into the sweep's folder."""
    figure, rows, best = sweep.monitor.removeprefix("-"), sweep.rows, sweep.best
    failed = sum(row["status"] == FAILED for row in rows)
    parts = [f"<h1>Sweep {html.text(sweep.folder.name)}</h1>", '<div class="cards">']
    parts += [html.card(str(len(rows)), "cells", f"{failed} failed" if failed else "")]
    if best is not None:
        parts.append(html.card(f"{best[f'val/{figure}']:.3f}", f"best {figure} on validation", f"n {best['val/n']}"))
    note = _NOTE.format(best["run_dir"] if best is not None else "FOLDER")
    parts += ["</div>", f'<p class="note">{html.text(" ".join(note.split()))}</p>']
    header = [*sweep.fields, f"val {figure} (95 %)", "best epoch", "s", "status"]
    lines = [
        [
            *(value_text(row.get(field, "")) for field in sweep.fields),
            figure_text(row, figure),
            row.get("best_epoch", ""),
            f"{row['seconds']:.1f}",
            row["status"] if not row["error"] else f"{row['status']}: {row['error']}",
        ]
        for row in sweep.ranked
    ]
    maps = [heatmap(rows, a, b, f"val/{figure}", sweep.falls) for a, b in pairs(rows, sweep.fields)]
    if maps:
        parts.append(f"<h2>Mean {html.text(figure)} on validation, by two fields</h2>")
        parts.append(f'<div class="side">{"".join(maps)}</div>')
    if drawn := parallel(rows, sweep.fields, f"val/{figure}", sweep.falls):
        parts += ["<h2>Each cell as a line</h2>", drawn]
    parts += ["<h2>Cells, the best first</h2>", html.table(header, lines)]
    names = columns(rows)
    whole = html.table(names, [[row.get(name, "") for name in names] for row in rows])
    parts += [f"<h2>All figures</h2><details><summary>{len(names)} columns</summary>{whole}</details>"]
    html.write(sweep.folder / "sweep.html", f"Sweep {sweep.folder.name}", parts)


def _values(rows: Sequence[Row], field: str) -> list[Any]:
    """The different values of a field, numbers sorted."""
    found = list({repr(row.get(field)): row.get(field) for row in rows}.values())
    return sorted(found) if all(_is_number(value) for value in found) else found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def pairs(rows: Sequence[Row], fields: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of fields that have a heatmap: few values each; seeds only where there is no other pair."""
    fit = [field for field in fields if 2 <= len(_values(rows, field)) <= _MOST_VALUES]
    without = [field for field in fit if field != "seed"]
    return list(itertools.combinations(without if len(without) > 1 else fit, 2))[:_MOST_MAPS]


def _colour(share: float) -> str:
    """0 is the worst, 1 the best."""
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_LOW, _HIGH, strict=True))


def _share(value: float, values: Sequence[float], falls: bool) -> float:
    low, high = min(values), max(values)
    share = (value - low) / (high - low) if high > low else 1.0
    return 1 - share if falls else share


def _svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.text(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-size="12" font-family="inherit">{"".join(body)}</svg>'
    )


def _word(x: float, y: float, text: object, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.text(_cut(text))}</text>'


def _cut(text: object) -> str:
    shown = value_text(text)
    return shown if len(shown) <= 22 else f"{shown[:21]}…"


def heatmap(rows: Sequence[Row], across: str, down: str, figure: str, falls: bool) -> str:
    """The mean of a figure over the cells with each pair of values, and how many they are where there are several."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = row.get(figure)
        if value is not None and math.isfinite(value):
            found.setdefault((repr(row.get(across)), repr(row.get(down))), []).append(value)
    means = {place: sum(values) / len(values) for place, values in found.items()}
    xs, ys = _values(rows, across), _values(rows, down)
    left, top, wide, high = 150, 46, 84, 44
    body = [_word(left + wide * len(xs) / 2, 14, across, more='font-weight="600"')]
    body.append(_word(left - 8, top - 8, down, "end", 'font-weight="600"'))
    body += [_word(left + wide * (i + 0.5), top - 8, x) for i, x in enumerate(xs)]
    for j, y in enumerate(ys):
        body.append(_word(left - 8, top + high * (j + 0.5) + 4, y, "end"))
        for i, x in enumerate(xs):
            mean = means.get((repr(x), repr(y)))
            share = 0.0 if mean is None else _share(mean, list(means.values()), falls)
            fill = "#eceff3" if mean is None else _colour(share)
            place = f'x="{left + wide * i}" y="{top + high * j}" width="{wide - 2}" height="{high - 2}"'
            body.append(f'<rect {place} fill="{fill}"/>')
            if mean is not None:
                ink, n = "#111" if share > 0.55 else "#fff", len(found[repr(x), repr(y)])
                middle, centre = top + high * (j + 0.5), left + wide * (i + 0.5)
                above = middle + (0 if n > 1 else 4)
                body.append(_word(centre, above, f"{mean:.3f}", more=f'fill="{ink}"'))
                if n > 1:
                    body.append(_word(centre, middle + 13, f"mean of {n}", more=f'fill="{ink}" font-size="10"'))
    return _svg(left + wide * len(xs) + 8, top + high * len(ys) + 8, body, f"{figure} by {across} and {down}")


class _Axis:
    """Places of values between 0, the bottom, and 1: numbers by size, in the logarithm where they span 100 times."""

    def __init__(self, values: Sequence[Any]):
        self.values = values
        self.numbers = all(_is_number(value) for value in values)
        self.log = self.numbers and min(values) > 0 and max(values) / min(values) >= 100
        self._at = [math.log(value) if self.log else value for value in values] if self.numbers else []

    def place(self, value: Any) -> float:
        if not self.numbers:
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high = min(self._at), max(self._at)
        return ((math.log(value) if self.log else value) - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[Any]:
        """Values with a label."""
        if len(self.values) <= _MOST_VALUES:
            return list(self.values)
        if not self.numbers:
            return list(self.values[:: math.ceil(len(self.values) / _MOST_VALUES)])
        return [self.values[0], self.values[len(self.values) // 2], self.values[-1]]


def parallel(rows: Sequence[Row], fields: Sequence[str], figure: str, falls: bool) -> str:
    """Parallel coordinates: an axis a field and one for the figure, a line a cell that has it, amber the best."""
    known = [row for row in rows if row.get(figure) is not None and math.isfinite(row[figure])]
    shown = [field for field in fields if len(_values(known, field)) > 1]
    if len(known) < 2 or not shown:
        return ""
    axes = {field: _Axis(_values(known, field)) for field in (*shown, figure)}
    gap, top, high = max(150, min(260, 900 // len(axes))), 34, 300
    x = {name: 90 + gap * i for i, name in enumerate(axes)}
    scores = [row[figure] for row in known]
    body = []
    for row in sorted(known, key=lambda row: _share(row[figure], scores, falls)):
        points = " ".join(f"{x[f]},{top + high * (1 - axis.place(row.get(f))):.1f}" for f, axis in axes.items())
        share = _share(row[figure], scores, falls)
        style = f'stroke="{_colour(share)}" stroke-width="{1 + 1.5 * share:.1f}" stroke-opacity="0.8"'
        status = "" if row["status"] == FINISHED else f", {row['status']}"
        title = html.text(f"{row['cell']}: {row[figure]:.4g}{status}")
        body.append(f'<polyline points="{points}" fill="none" {style}><title>{title}</title></polyline>')
    for name, axis in axes.items():
        body.append(f'<line x1="{x[name]}" y1="{top}" x2="{x[name]}" y2="{top + high}" stroke="#56606e"/>')
        body.append(_word(x[name], 14, name, more='font-weight="600"'))
        halo = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
        body += [_word(x[name] + 6, top + high * (1 - axis.place(t)) + 4, t, "start", halo) for t in axis.ticks()]
    return _svg(x[figure] + 110, top + high + 16, body, f"{figure} of each cell by its fields")
