"""A CSV or parquet file that names images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from bmjax.data.sources.columns import read_columns
from bmjax.data.sources.labels import classes_of, known
from bmjax.data.sources.listing import SIDES, Listing, _listing_of_files


def list_table(path: str | Path, fewest: int = 2) -> Listing:
    """A CSV or parquet file with the columns path, label and, where known, split (train, val, test or ""), group,
    pixel_size (micrometres) and laboratory.

    Paths count from the table's folder unless they are absolute; those of Windows are read too. The classes are the
    labels there are, sorted as numbers where all are numbers (2.0 is the class 2), else as text.

    Raises:
      FileNotFoundError: the table, or an image that it names, is not there.
      ValueError: a column, a path, a label or a split is missing or wrong, or two rows name one file; names them.
    """
    if not str(path) or Path(path).is_dir():
        raise FileNotFoundError(f"config field 'data.root' is {str(path)!r}; expected a .csv or .parquet file")
    columns = read_columns(path, ("path", "label"), ("split", "group", "pixel_size", "laboratory"))
    columns = {name: [value.strip() for value in values] for name, values in columns.items()}  # "a.png, BLA"
    groups, splits, laboratories = ([known(value) for value in columns[n]] for n in ("group", "split", "laboratory"))
    _check_rows(path, columns["path"], columns["label"], splits)
    pixel_sizes = _pixel_sizes(path, columns["pixel_size"])
    folder = Path(path).parent
    ids = [_as_it_is_there(folder, image) for image in columns["path"]]
    _check_once(path, folder, ids, columns["label"])
    names, classes = classes_of(columns["label"])
    if len(classes) < fewest:
        least = "two" if fewest == 2 else fewest
        raise ValueError(f"{path}: labels found: {', '.join(classes) or 'none'}; expected at least {least}")
    if absent := [i for i, image in enumerate(ids) if not os.path.isfile(os.path.join(folder, image))]:
        raise FileNotFoundError(
            f"{path}: {len(absent)} of {len(ids)} images are not there, the first {ids[absent[0]]!r} in row "
            f"{absent[0] + 1}; expected paths that count from {folder}"
        )
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[name] for name in names]
    sides = [SIDES[split.lower()] for split in splits] if any(splits) else ()
    more = {"pixel_sizes": pixel_sizes, "laboratories": laboratories if any(laboratories) else ()}
    return _listing_of_files(folder, classes, ids, labels, groups if any(groups) else (), sides, **more)


def _check_rows(path: str | Path, ids: Sequence[str], names: Sequence[str], splits: Sequence[str]) -> None:
    for row, (image, label, split) in enumerate(zip(ids, names, splits, strict=True), 1):
        if not image or not label:
            raise ValueError(f"{path}: row {row} has path {image!r} and label {label!r}; expected both")
        if not known(label):
            raise ValueError(
                f"{path}: row {row}, column label: {label!r} is how tables write a missing value; expected a class: "
                f"leave the row out, or if a class is called so, name it otherwise, such as 'class {label}'"
            )
        if "\0" in image:
            raise ValueError(f"{path}: row {row}, column path: {image!r} holds a byte of value 0; expected a path")
        if split.lower() not in SIDES:
            raise ValueError(f"{path}: row {row} has split {split!r}; expected one of {', '.join(filter(None, SIDES))}")


def _pixel_sizes(path: str | Path, values: Sequence[str]) -> list[float]:
    """Each row's pixel size, 0 where it has none; empty where no row has one."""
    found = []
    for row, value in enumerate(values, 1):
        try:
            size = float(known(value).replace(",", ".") or 0)
        except ValueError:
            size = -1.0
        if not 0 <= size < 1000 or (size == 0 and known(value)):
            raise ValueError(
                f"{path}: row {row} has pixel_size {value!r}; expected micrometres, such as 0.1, or nothing"
            )
        found.append(size)
    return found if any(found) else []


def _as_it_is_there(folder: Path, image: str) -> str:
    """A path with backslashes as one with slashes, and accents in the other form, where only that is there."""
    if ("\\" not in image and image.isascii()) or os.path.isfile(os.path.join(folder, image)):
        return image
    for path in (image, image.replace("\\", "/")):
        for form in ("NFC", "NFD"):
            if os.path.isfile(os.path.join(folder, other := unicodedata.normalize(form, path))):
                return other
    return image


def _check_once(path: str | Path, folder: Path, ids: Sequence[str], names: Sequence[str]) -> None:
    """A ValueError where two rows name one file, however it is spelled."""
    start = os.path.abspath(folder)
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(ids):
        rows.setdefault(os.path.normpath(os.path.join(start, image)), []).append(row)
    for found in rows.values():
        if len(found) > 1:
            which = ", ".join(f"row {row + 1} says {ids[row]!r} is {names[row]!r}" for row in found[:5])
            raise ValueError(
                f"{path}: {ids[found[0]]!r} stands in {len(found)} rows; expected one row an image: {which}"
            )
