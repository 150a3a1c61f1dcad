"""Parts of a page of HTML: one file without links, its pictures within it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bmjax.analysis.report.figures import save
from bmjax.files import printable, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.55 system-ui,sans-serif;max-width:66rem;margin:0 auto;padding:2rem 1.25rem 4rem;color:#1d2530}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.6rem 0 .6rem;border-bottom:1px solid #d5dae1}
p{max-width:48rem}.note{color:#56606e;margin-top:.2rem}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.card{border:1px solid #d5dae1;border-radius:6px;padding:.6rem .9rem;min-width:8.5rem}
.card b{display:block;font-size:1.45rem;line-height:1.3}.card span{color:#56606e;font-size:.85rem}
table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #e6e9ee}th{color:#56606e;font-weight:600}
td:first-child,th:first-child{text-align:left;padding-left:0}
img{max-width:100%;height:auto;display:block}.side{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}
pre{background:#f5f7f9;padding:1rem;overflow:auto;font-size:.82rem}summary{cursor:pointer}
"""


def text(value: object) -> str:
    """A value as text, escaped; bytes that are not UTF-8 as \\xNN."""
    return html.escape(printable(value, lines=True))


def image(figure: Figure, alt: str, width: int | None = None) -> str:
    """A figure as a PNG within the page; `width` in pixels."""
    data = io.BytesIO()
    save(figure, data, dpi=130)
    size = f' style="width:{width}px"' if width else ""
    return f'<img alt="{text(alt)}"{size} src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells are escaped."""
    lines = ["<tr>" + "".join(f"<th>{text(c)}</th>" for c in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def card(value: str, name: str, below: str = "") -> str:
    """One figure in large type."""
    return f'<div class="card"><span>{text(name)}</span><b>{text(value)}</b><span>{text(below)}&nbsp;</span></div>'


def write(path: Path, title: str, parts: Sequence[str]) -> None:
    """Writes the page of these parts, HTML, whole or not at all."""
    source = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    write_text(path, source, errors="replace")
