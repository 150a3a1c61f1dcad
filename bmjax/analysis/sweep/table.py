"""A sweep's rows as files and in a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bmjax.analysis.sweep.rows import FINISHED, TIMES, Row, score
from bmjax.files import printable, write_bytes


def columns(rows: Sequence[Row]) -> list[str]:
    """Every column of any row, in the order in which they come up; those of time last."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [*(name for name in names if name not in TIMES), *(name for name in names if name in TIMES)]


def write_tables(folder: Path, rows: Sequence[Row]) -> None:
    """results.csv and results.parquet, each whole or not at all. Values that are lists or dicts are text."""
    import pyarrow
    import pyarrow.parquet

    names = columns(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(folder / "results.csv", text.getvalue().encode("utf-8", "backslashreplace"))
    table = pyarrow.table({name: _column([row.get(name) for row in rows]) for name in names})
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    write_bytes(folder / "results.parquet", out.getvalue())


def _column(values: Sequence[object]) -> list[object]:
    """Values of one type, for Parquet: numbers, yes and no, or text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} or kinds <= {int}:
        return list(values)
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values]  # type: ignore[arg-type]
    return [None if value is None else printable(value) for value in values]


def ranked(rows: Sequence[Row], falls: bool) -> list[Row]:
    """The rows, the best first; failed ones last."""
    return sorted(rows, key=lambda row: -score(row, falls))


def text_table(rows: Sequence[Row], fields: Sequence[str], monitor: str, *, falls: bool, limit: int = 40) -> str:
    """The table for a terminal: the best first, the swept fields and the monitored figure on validation."""
    figure = monitor.removeprefix("-")
    header = [*fields, f"val {figure}, best epoch (95 %)", "n", "best epoch", "s", "images/s", "status"]
    lines = [header]
    for row in ranked(rows, falls)[:limit]:
        own = [value_text(row.get(field, "")) for field in fields]
        n = str(row.get("val/n", ""))
        where = str(row.get("best_epoch", ""))
        speed = "" if row.get("images_per_second") is None else f"{row['images_per_second']:.0f}"
        status = row["status"] if row["status"] == FINISHED else f"{row['status']} after {row['epochs']} epochs"
        status += f": {printable(row['error'])[:80]}" if row["error"] else ""
        lines.append([*own, figure_text(row, figure), n, where, f"{row['seconds']:.1f}", speed, status])
    widths = np.array([[len(cell) for cell in line] for line in lines]).max(0)
    shown = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    left = f"\n... {len(rows) - limit} more in results.csv" if len(rows) > limit else ""
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]]) + left


def value_text(value: object) -> str:
    """A field's value in few letters."""
    return f"{value:.4g}" if isinstance(value, float) else printable(value)


def figure_text(row: Row, figure: str) -> str:
    """`0.812 (0.771 to 0.848)`: a validation figure of a row, with its interval where it has one."""
    value = row.get(f"val/{figure}")
    if value is None:
        return ""
    low, high = row.get(f"val/{figure}_low"), row.get(f"val/{figure}_high")
    return f"{value:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")
