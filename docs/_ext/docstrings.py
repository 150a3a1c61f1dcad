"""Turns the docstrings of bmjax, which are plain text with `code` and a section "Raises:", into reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_MARKUP = re.compile(r"([*|]|_(?=\W|$)|\\)")


def prose(line: str) -> str:
    """A line with its single or double backticks as literals, and nothing else taken for markup."""
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", line)
    return "".join(f"``{p.strip('`')}``" if p.startswith("`") else _MARKUP.sub(r"\\\1", p) for p in pieces)


def joined(lines: list[str]) -> list[str]:
    """The lines with code that runs over a line's end put on one."""
    found: list[str] = []
    for line in lines:
        if found and found[-1].count("`") % 2 and line.strip():
            found[-1] += " " + line.strip()
        else:
            found.append(line)
    return found


def restructured(lines: list[str]) -> list[str]:
    """The docstring's lines as reStructuredText."""
    found, code, raises = list[str](), False, False
    for line in joined(lines):
        if line.strip() == "Raises:":
            raises = True
            found.append("")
        elif raises and (entry := re.match(r"  ([\w., ]+): (.*)", line)):
            found.append(f":raises {entry[1]}: {prose(entry[2])}")
        elif raises:
            found.append(f"    {prose(line.strip())}" if line.strip() else "")
        elif re.match(r" {4}\S", line) and (code or not found or not found[-1].strip()):
            if not code:
                found += [".. code-block:: python", ""]
            code = True
            found.append("    " + line.strip())
        else:
            code = False
            found.append(prose(line))
    return found


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def short(app: Sphinx, what: str, name: str, obj: Any, options: Any, *signature: str | None) -> tuple[str, ...] | None:
    """The signature with names that Sphinx left long cut to their last part, as in `tuple[~bmjax.x.Y, ...]`."""
    found = [re.sub(r"~[\w.]+\.(?=\w)", "", part or "") for part in signature]
    return None if found == [part or "" for part in signature] else tuple(found)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", short)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
