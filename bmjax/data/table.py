"""Tables of text, CSV or parquet: lists of images, splits and duplicates."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def read_columns(path: str | Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """The columns named, as text; optional ones that aren't there are full of "".

    A first line names the columns; others than those asked for are passed over.

    Raises:
      FileNotFoundError: no such file.
      ValueError: neither CSV nor parquet, a needed column is not there, or a line is short.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .csv or .parquet with columns {', '.join(needed)}")
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pa.ArrowInvalid as e:
            raise ValueError(f"{path}: {e}") from e
        found = {n: ["" if v is None else str(v) for v in table[n].to_pylist()] for n in table.column_names}
    elif path.suffix.lower() == ".csv":
        # File names need not be valid text; spreadsheets begin a file with a byte-order mark.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
            try:
                header, *rows = list(csv.reader(f)) or [[]]
            except csv.Error as e:
                raise ValueError(f"{path}: {e}") from e
        rows = [row for row in rows if row]
        short = next((i for i, row in enumerate(rows, 1) if len(row) != len(header)), None)
        if short is not None:
            raise ValueError(f"{path}: row {short} has {len(rows[short - 1])} values; expected {len(header)}")
        found = {name.strip(): [row[i] for row in rows] for i, name in enumerate(header)}
    else:
        raise ValueError(f"{path}: expected a name ending in .csv or .parquet")
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{path}: no column {', '.join(missing)} among {', '.join(found) or 'none'}")
    n = len(found[needed[0]])
    return {name: found.get(name, [""] * n) for name in (*needed, *optional)}
