"""A comparison as one page of HTML, its pictures within it; and in W&B, as a table of the runs' group."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from bmjax.analysis.compare.picture import against_cost, critical_differences, differences
from bmjax.analysis.compare.table import Comparison, cells, header, note, tested, verdicts
from bmjax.analysis.report import html
from bmjax.analysis.report.figures import save
from bmjax.config.training import TrackingConfig
from bmjax.files import printable
from bmjax.runs.tracking import WandbTracker

PICTURES = {"cost": against_cost, "differences": differences, "apart": critical_differences}
_TITLES = {
    "cost": ("Accuracy against cost", "The line joins the variants that no other beats in both."),
    "differences": ("Against the baseline", "A difference is shown exactly where its interval leaves out zero."),
    "apart": (
        "What can't be told apart",
        "A bar joins variants of which no two can be told apart. All pairs are held to 5 % together, which asks for "
        "more than the comparisons with the baseline alone.",
    ),
}


def write_page(folder: Path, c: Comparison) -> Path:
    """Writes comparison.html and its pictures as PNG; returns the page's path."""
    best = max(c.rows, key=lambda row: row.accuracy)
    shown = [row for row in c.rows if row.shown]
    parts = [f"<h1>{html.text(c.name)}: attention variants on equal terms</h1>"]
    parts.append(f'<p class="note">{html.text(c.about)}. {html.text(tested(c))}</p>')
    parts.append('<div class="cards">')
    parts.append(html.card(f"{100 * best.accuracy:.1f} %", "highest accuracy", best.variant))
    parts.append(html.card(f"{len(shown)} of {len(c.rows) - 1}", "differences shown", f"to {c.baseline}"))
    parts.append(html.card(str(c.openings), "openings of the test split", f"{c.n} images"))
    parts.append("</div>")
    rows = [[cell.replace(" ", "\u00a0") for cell in row] for row in cells(c)]
    parts += [html.table(header(c), rows), "<ul>"]
    parts += [*(f"<li>{html.text(text)}</li>" for text in verdicts(c)), "</ul>"]
    for name, draw in PICTURES.items():
        if name == "apart" and c.apart is None:
            continue
        title, below = _TITLES[name]
        figure = draw(c)
        save(figure, folder / f"comparison_{name}.png", dpi=130)
        parts += [f"<h2>{title}</h2>", html.image(figure, title), f'<p class="note">{below}</p>']
    parts += ["<h2>How to read it</h2>", f"<p>{html.text(note(c))}</p>"]
    html.write(folder / "comparison.html", c.name, parts)
    return folder / "comparison.html"


def track(folder: Path, c: Comparison, tracking: TrackingConfig) -> None:
    """Logs table and pictures to W&B, in the group of the comparison's runs."""
    pictures = {name: path for name in PICTURES if (path := folder / f"comparison_{name}.png").is_file()}
    rows = [[printable(cell) for cell in row] for row in cells(c)]
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]  # called again it goes on with the same
    tracking = dataclasses.replace(tracking, group=tracking.group or c.name)
    tracker = WandbTracker(tracking, folder, run_id, {"name": f"{c.name}-comparison"})
    tracker.log_media(
        lambda wandb: (
            {"comparison": wandb.Table(columns=header(c), data=rows)}
            | {name: wandb.Image(str(path)) for name, path in pictures.items()}
        )
    )
    tracker.close()
