"""The page as one file: a Jinja template, its style and script, and uPlot (MIT) for the diagrams, all within it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from bmjax import environment
from bmjax.analysis.report.view import Together, View
from bmjax.files import printable

_HERE = resources.files("bmjax.analysis.report")


def _read(folder: str, name: str) -> str:
    return (_HERE / folder / name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that may stand within a script element: no text in it can end the element or begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _shown(value: Any) -> Any:
    """Text of the user as letters that any page takes; Jinja escapes it afterwards."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, lines=True)
    return value


@functools.cache
def _template() -> jinja2.Template:
    made = jinja2.Environment(
        autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return made.from_string(_read("page", "report.html.j2"))


def _sheets(runs: Sequence[View]) -> str:
    """The style of the small cells: one decoded picture for each sheet, however many cells show a part of it."""
    return "".join(
        f".s{run.i}-{j}{{background-image:url({sheet})}}\n"
        for run in runs
        for j, sheet in enumerate(run.thumbnails.sheets)
    )


def render(title: str, subtitle: str, runs: Sequence[View]) -> str:
    """The page of these runs, HTML."""
    script = _read("vendor", "uPlot.iife.min.js") + _read("page", "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = _read("vendor", "uPlot.min.css") + _read("page", "report.css") + _sheets(runs)
    return _template().render(
        title=title,
        subtitle=subtitle,
        runs=runs,
        together=Together([run.facts for run in runs]) if len(runs) > 1 else None,
        # Nothing is fetched, and no script but this one runs.
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=Markup(style),
        script=Markup(script),
        data=Markup(as_json([run.numbers for run in runs])),
        footer=f"bmjax {environment.version()}. Diagrams: uPlot 1.6.32, MIT, (c) 2022 Leon Sorokin.",
    )
