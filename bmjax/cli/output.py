"""What several verbs print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.environment import check_utf8
from bmjax.files import printable

_UTF8 = (".parquet", ".onnx")
"""Kinds of files whose libraries take no name but UTF-8."""


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the option that lets a run from elsewhere run its own code."""
    parser.add_argument("--trust", action="store_true", help="run the code that a run from elsewhere names")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the options on how a run is read: which of its checkpoints, and whether its own code may run."""
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    add_trust(parser)


def check_out(out: Path) -> None:
    """Refuses a file to write that can't be one, before any work.

    Raises:
      FileNotFoundError: its folder is not there.
      IsADirectoryError: it is a folder itself.
      ValueError: its name is not UTF-8, and its kind of file needs that.
    """
    if out.suffix.lower() in _UTF8:
        check_utf8("--out", out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out is {str(out)!r}, but there is no folder {out.parent}")
    if out.is_dir():
        raise IsADirectoryError(f"--out is {str(out)!r}, which is a folder; expected a file's name")


def metrics_line(split: str, m: dict[str, Any]) -> str:
    """n, accuracy and macro F1 of a split, with their intervals."""
    from bmjax.runs.records import interval_text

    return f"{split}: n {m['n']}, accuracy {interval_text(m, 'accuracy')}, macro F1 {interval_text(m, 'macro_f1')}"


def print_confusion(confusion: list[list[int]], classes: Sequence[str]) -> None:
    """The confusion matrix as text, rows the true class."""
    classes = [printable(c) for c in classes]
    width = max(5, *(len(c) + 1 for c in classes))
    print("".rjust(width) + "".join(c.rjust(width) for c in classes) + "   (rows: true, columns: predicted)")
    for name, row in zip(classes, confusion, strict=True):
        print(name.rjust(width) + "".join(str(v).rjust(width) for v in row))
