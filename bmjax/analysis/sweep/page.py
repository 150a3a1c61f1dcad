"""sweep.html."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmjax.analysis.report import html
from bmjax.analysis.sweep.table import columns

if TYPE_CHECKING:
    from bmjax.analysis.sweep.run import Sweep


def write_page(sweep: Sweep) -> None:
    """Writes sweep.html into the sweep's folder."""
    names = columns(sweep.rows)
    rows = [[row.get(name, "") for name in names] for row in sweep.ranked]
    html.write(sweep.folder / "sweep.html", f"Sweep {sweep.folder.name}", [html.table(names, rows)])
