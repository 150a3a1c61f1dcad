"""Columns of a CSV or parquet file as text, with the habits of those who write them."""

from __future__ import annotations

import codecs
import collections
import csv
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_TEXT = (".csv", ".tsv", ".txt")
_SEPARATORS = ",;\t|"
# UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_columns(path: str | Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """The columns named, as text; optional ones that aren't there are full of "".

    The first line names the columns, after lines that begin with `#`; columns other than those asked for are passed
    over. Names are taken in any case and with spaces around them. Text files are UTF-8, or UTF-16 or UTF-32 with a
    byte-order mark; they are separated by comma, semicolon, tab or |, whichever gives the columns that are needed.
    In parquet a value that is missing or no number (null, NaN, infinity) is "", and a whole number is written without a
    point.

    Raises:
      FileNotFoundError: no such file.
      ValueError: neither such a text nor parquet, a needed column is not there or there twice, or a row is too short
        or too long; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .csv or .parquet with columns {', '.join(needed)}")
    if path.suffix.lower() == ".parquet":
        names, values = _read_parquet(path, needed)
    elif path.suffix.lower() in _TEXT:
        names, rows = _read_text(path, needed)
        values = [[row[i] for row in rows] for i in range(len(names))]
    else:
        raise ValueError(f"{path}: expected a name ending in .csv or .parquet")
    places = _places(path, names, (*needed, *optional))
    if missing := [name for name in needed if name not in places]:
        found = ", ".join(name.strip() for name in names if name.strip())
        first = "; the first line names the columns, separated by comma, semicolon, tab or |"
        hint = first if path.suffix.lower() != ".parquet" else ""
        raise ValueError(f"{path}: no column {', '.join(missing)} among {found or 'none'}{hint}")
    n = len(values[places[needed[0]]])
    return {name: values[places[name]] if name in places else [""] * n for name in (*needed, *optional)}


def _places(path: Path, names: Iterable[str], wanted: Sequence[str]) -> dict[str, int]:
    """Where each wanted column stands; a ValueError where two could be meant."""
    places: dict[str, list[int]] = collections.defaultdict(list)
    names = list(names)
    for i, name in enumerate(names):
        places[name.strip().lower()].append(i)
    for name in wanted:
        if len(at := places.get(name, [])) > 1:
            which = " and ".join(f"{i + 1} ({names[i]!r})" for i in at)
            raise ValueError(f"{path}: columns {which} are both called {name}; expected one column of that name")
    return {name: places[name][0] for name in wanted if name in places}


def _decode(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    # File names need not be valid text.
    try:
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: begins as {encoding.upper()} does, but isn't: {e}; expected such text") from e
    if "\0" in text:
        raise ValueError(f"{path}: holds bytes of value 0; expected text in UTF-8, or in UTF-16 with a byte-order mark")
    return text


def _read_text(path: Path, needed: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows of as many values)."""
    lines = io.StringIO(_decode(path), newline="").readlines()
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].startswith("#")):
        start += 1
    separators = _SEPARATORS
    if start < len(lines) and (own := re.fullmatch(r"sep=(.)\s*", lines[start])):  # Excel's own first line
        separators, start = own[1], start + 1
    header = lines[start] if start < len(lines) else ""

    def columns(separator: str) -> tuple[int, int]:
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
        return len(set(needed).intersection(names)), len(names)

    try:
        separator = max(separators, key=columns)
    except csv.Error as e:
        raise ValueError(f"{path}: line {start + 1}: {e}; expected CSV whose first line names the columns") from e
    reader = csv.reader(lines[start:], delimiter=separator, strict=True)
    rows: list[list[str]] = []
    try:
        names = next(reader, [])
        for row in reader:
            if not any(cell.strip() for cell in row):  # an empty line; Excel may leave its separators
                continue
            rows.append(row)
            if len(row) != len(names):
                raise ValueError(
                    f"{path}: row {len(rows)} has {len(row)} values; expected {len(names)}, one for each column; it is "
                    f"{separator.join(row)[:60]!r}" + ("" if len(names) > 1 else f", separated by {separator!r}")
                )
    except csv.Error as e:
        raise ValueError(f"{path}: line {start + reader.line_num}: {e}; expected CSV") from e
    return names, rows


def _read_parquet(path: Path, needed: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # takes two columns of one name, which are named later
            table = file.read()
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path}: {e}") from e
    for name, kind in zip(table.schema.names, table.schema.types, strict=True):
        if pa.types.is_nested(kind) and name.strip().lower() in needed:
            raise ValueError(f"{path}: column {name!r} holds {kind}; expected one text or number in each row")
    columns = [column.cast(pa.string()) if column.type == pa.float32() else column for column in table.columns]
    return table.column_names, [[as_text(value) for value in column.to_pylist()] for column in columns]


def as_text(value: Any) -> str:
    """A value of Arrow as text; "" where it is missing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value != value:
        return ""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
