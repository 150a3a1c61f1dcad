"""A CSV or parquet file that names images, and other tables of text."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bmjax.data.sources.listing import SIDES, Listing, _listing_of_files


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


def list_table(path: str | Path) -> Listing:
    """A CSV or parquet file with the columns path, label and, where known, split (train, val, test or "") and group.

    Paths count from the table's folder unless they are absolute; the classes are the labels there are, sorted as text.

    Raises:
      FileNotFoundError: the table, or an image that it names, is not there.
      ValueError: a column, a path, a label or a split is missing or wrong, or a path stands twice; names it.
    """
    columns = read_columns(path, ("path", "label"), ("split", "group"))
    columns = {name: [value.strip() for value in values] for name, values in columns.items()}  # "a.png, BLA"
    ids, names = columns["path"], columns["label"]
    for row, (image, label, split) in enumerate(zip(ids, names, columns["split"], strict=True), 1):
        if not image or not label:
            raise ValueError(f"{path}: row {row} has path {image!r} and label {label!r}; expected both")
        if split not in SIDES:
            raise ValueError(f"{path}: row {row} has split {split!r}; expected one of {', '.join(filter(None, SIDES))}")
    (image, times), *_ = Counter(ids).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{path}: {image!r} stands in {times} rows; expected one row an image")
    classes = tuple(sorted(set(names)))
    if len(classes) < 2:
        raise ValueError(f"{path}: labels found: {', '.join(classes) or 'none'}; expected at least two")
    folder = Path(path).parent
    if absent := [image for image in ids if not os.path.isfile(os.path.join(folder, image))]:
        raise FileNotFoundError(
            f"{path}: {len(absent)} of {len(ids)} images are not there, the first {absent[0]!r}; "
            f"expected paths that count from {folder}"
        )
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[name] for name in names]
    groups = columns["group"] if any(columns["group"]) else ()
    sides = [SIDES[split] for split in columns["split"]] if any(columns["split"]) else ()
    return _listing_of_files(folder, classes, ids, labels, groups, sides)
