"""The table that `bmjax predict` writes: a row for each input, block by block, so that a million rows need no memory.

The columns `error` and, in parquet, `path_bytes` are there only where they are needed. That may show late; what was
written until then is copied once, into a table that has the column. So that no two columns have one name, a class that
is called like a column of the table itself has the column `p(NAME)`.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bmjax.environment import is_utf8
from bmjax.files import remove_leftovers

ERROR, PATH_BYTES = "error", "path_bytes"
# Whether they are there or not: a class's column is called the same in every table.
OWN = ("path", "predicted", "answer", "set", "familiarity", ERROR, PATH_BYTES)
log = logging.getLogger(__name__)


def shown(text: str) -> str:
    """Text that can be printed and encoded: what is no UTF-8 in a file's name becomes the replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def columns_of(classes: Sequence[str], own: Sequence[str] = OWN) -> tuple[str, ...]:
    """The column of each class: its name, or where the table's `own` columns have that, p(NAME)."""
    columns = []
    for name in classes:
        column = name
        while column in own or (column != name and column in classes):
            column = f"p({column})"
        columns.append(column)
    return tuple(columns)


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows to write."""

    paths: Sequence[str]
    predicted: Sequence[str | None]
    """The class, or None where there is an error."""
    probs: np.ndarray
    """float32 [n, k]; not a number where there is an error."""
    errors: Sequence[str | None]
    more: Sequence[Sequence[str | float | None]] = ()
    """Values of the table's further columns."""


class PredictionTable:
    """A .csv or .parquet file with the columns path, predicted, one for each class, `more`, and, where needed, the two
    above. `more`: names and types, str or float, of further columns.

    Rows go into `<name>.<thread>.<process>.part`, which takes the table's name when it is whole: of several tables of
    one name at a time the last one stays. Parts that killed processes left are removed when they are a day old.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], *, errors: bool = False, more: Mapping[str, type] | None = None
    ):
        remove_leftovers(path.parent, f"{glob.escape(path.name)}.[0-9]*.[0-9]*.part*")
        self.path = path
        self.part = path.with_name(f"{path.name}.{threading.get_ident()}.{os.getpid()}.part")
        self._more = dict(more or {})
        self._kind: type[_Csv | _Parquet] = _Csv if path.suffix.lower() == ".csv" else _Parquet
        self._classes, self._extra = columns_of(classes, (*OWN, *self._more)), {ERROR} if errors else set()
        if other := [column for column in self._classes if column not in classes]:
            log.warning("probabilities of classes called like a column of the table are in %s", ", ".join(other))
        self._file = self._kind(self.part, self._classes, self._more, self._extra)

    def add(self, block: Block) -> None:
        """Writes rows."""
        needed = self._extra | ({ERROR} if any(block.errors) else set())
        if self._kind is _Parquet and not all(map(is_utf8, block.paths)):
            needed = needed | {PATH_BYTES}
        if needed != self._extra:
            self._widen(needed)
        self._file.write(block)

    def _widen(self, needed: set[str]) -> None:
        self._file.close()
        wider = self.part.with_name(f"{self.part.name}2")
        file = self._kind(wider, self._classes, self._more, needed)
        file.copy(self.part, self._extra)
        os.replace(wider, self.part)  # the open file goes with its name
        self._file, self._extra = file, needed

    def close(self, *, whole: bool) -> None:
        """Closes the file; gives it its name if it is whole."""
        self._file.close()
        if whole:
            os.replace(self.part, self.path)


class _Csv:
    """UTF-8, with the bytes of names that are not; text is quoted, numbers and what is missing are not."""

    def __init__(self, path: Path, classes: Sequence[str], more: dict[str, type], extra: set[str]):
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._writer = csv.writer(self._file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        self._has_error, self._missing = ERROR in extra, [""] * len(classes)
        self._writer.writerow(["path", "predicted", *classes, *more, *([ERROR] if self._has_error else [])])

    def write(self, block: Block) -> None:
        # The shortest decimals that are the float32, and not those of its float64.
        numbers = block.probs.astype(str).astype(np.float64).tolist()
        more = list(zip(*block.more, strict=True)) or [()] * len(block.paths)
        rows = zip(block.paths, block.predicted, numbers, more, block.errors, strict=True)
        for path, name, row, values, error in rows:
            cells: list[Any] = [path, name or "", *(self._missing if name is None else row)]
            cells += ["" if value is None else value for value in values]
            self._writer.writerow([*cells, error or ""] if self._has_error else cells)

    def copy(self, path: Path, extra: set[str]) -> None:
        """Takes over the rows of a table without the error column."""
        del extra
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as f:
            rows = csv.reader(f, quoting=csv.QUOTE_NONNUMERIC)
            next(rows)
            for row in rows:
                self._writer.writerow([*row, ""])

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """A block is a row group. A name that is no UTF-8 stands in `path` for reading, in `path_bytes` as it is."""

    def __init__(self, path: Path, classes: Sequence[str], more: dict[str, type], extra: set[str]):
        fields = [pa.field("path", pa.string()), pa.field("predicted", pa.string())]
        fields += [pa.field(shown(name), pa.float32()) for name in classes]
        self._more = [pa.float32() if kind is float else pa.string() for kind in more.values()]
        fields += [pa.field(name, kind) for name, kind in zip(more, self._more, strict=True)]
        fields += [pa.field(ERROR, pa.string())] if ERROR in extra else []
        fields += [pa.field(PATH_BYTES, pa.binary())] if PATH_BYTES in extra else []
        self._schema, self._extra, self._base = pa.schema(fields), extra, 2 + len(classes) + len(more)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, block: Block) -> None:
        bad = np.array([name is None for name in block.predicted], bool)
        columns = [
            pa.array([shown(path) for path in block.paths], pa.string()),
            pa.array([None if name is None else shown(name) for name in block.predicted], pa.string()),
            *(pa.array(column, pa.float32(), mask=bad) for column in np.asarray(block.probs, np.float32).T),
        ]
        columns += [
            pa.array([shown(v) if isinstance(v, str) else v for v in values], kind)
            for values, kind in zip(block.more, self._more, strict=True)
        ]
        if ERROR in self._extra:
            columns.append(pa.array([None if e is None else shown(e) for e in block.errors], pa.string()))
        if PATH_BYTES in self._extra:
            columns.append(pa.array(list(map(os.fsencode, block.paths)), pa.binary()))
        self._write(columns)

    def copy(self, path: Path, extra: set[str]) -> None:
        """Takes over the rows of a table with fewer columns, `extra` those it has beyond the classes."""
        with pyarrow.parquet.ParquetFile(path) as old:
            for group in range(old.num_row_groups):
                table = old.read_row_group(group)
                columns = [table.column(i) for i in range(self._base)]
                if ERROR in self._extra:
                    has = ERROR in extra
                    columns.append(table.column(self._base) if has else pa.nulls(len(table), pa.string()))
                if PATH_BYTES in self._extra:
                    has = PATH_BYTES in extra
                    columns.append(table.column(table.num_columns - 1) if has else columns[0].cast(pa.binary()))
                self._write(columns)

    def _write(self, columns: list[Any]) -> None:
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
