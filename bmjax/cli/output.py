"""What several verbs print."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bmjax.environment import check_utf8
from bmjax.files import printable

_UTF8 = (".parquet", ".onnx")
"""Kinds of files whose libraries take no name but UTF-8."""
_RECORDS = ("config.json", "dataset.json", "environment.json", "results.json", "split.csv", "metrics.jsonl")
_RECORDS += ("openings.jsonl", "calibration*.json", "reference.npz", "predictions_*.npz")
_RECORDS += tuple(f"evaluation_{split}.json" for split in ("train", "val", "test"))
"""Names of the files of a run's folder that bmjax reads again."""


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the option that lets a run from elsewhere run its own code."""
    parser.add_argument("--trust", action="store_true", help="run the code that a run from elsewhere names")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the options on how a run is read: which of its checkpoints, and whether its own code may run."""
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    add_trust(parser)


def run_at(given: str | Path) -> Path:
    """The folder of a run that a verb was given, fetched where it is in W&B.

    Raises:
      FileNotFoundError: there is no such folder, or it holds no run.
    """
    from bmjax.runs.tracking import local_run

    folder = local_run(given)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}; expected that of a run")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no run: {folder / 'config.json'} is not there; expected the folder of a run"
        )
    return folder


def check_out(out: Path, inputs: Iterable[str | Path] = (), what: str = "--out") -> None:
    """Refuses a file to write that can't be one, or that would be missed, before any work. `inputs`: what is read;
    `what`: how the file is called.

    Raises:
      FileNotFoundError: its folder is not there.
      FileExistsError: it is a record of a run, or one of the inputs.
      IsADirectoryError: it is a folder itself.
      PermissionError: nothing can be written into its folder.
      ValueError: its name is not UTF-8, and its kind of file needs that.
    """
    if out.suffix.lower() in _UTF8:
        check_utf8(what, out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{what} is {str(out)!r}, but there is no folder {out.parent}")
    if out.is_dir():
        raise IsADirectoryError(f"{what} is {str(out)!r}, which is a folder; expected a file's name")
    for path in (out, out.resolve()):
        if (path.parent / "config.json").is_file() and any(map(path.match, _RECORDS)):
            raise FileExistsError(f"{what} is {str(out)!r}, a record of the run there; expected another name")
    if out.exists() and any(os.path.exists(path) and out.samefile(path) for path in inputs):
        raise FileExistsError(f"{what} is {str(out)!r}, which is read itself; expected another name")
    check_writable(out.parent, out, what)


def check_writable(folder: Path, given: Path, what: str = "--out") -> None:
    """Refuses a folder that takes no file, for one that was given.

    Raises:
      PermissionError: it takes none.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise PermissionError(
            f"{what} is {str(given)!r}, but nothing can be written into the folder {folder} ({e.strerror})"
        ) from e


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
