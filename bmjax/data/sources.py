"""Finds images and what is known of them: one folder per class, or a table."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from bmjax.data.decode import read_file
from bmjax.data.table import read_columns

log = logging.getLogger(__name__)
Found = TypeVar("Found")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
# How sources spell the sides of a split.
SIDES = {"": "", "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Images that are not read yet: `ids` within `origin`, labels int32 [n] into `classes`.

    `read(i)` gives the bytes of image i's file, in any thread; it raises ValueError or OSError where there are none.
    `groups` (patient, slide, ...) and `sides` ("train", "val", "test" or "") are empty where a source has none.
    """

    origin: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[int], bytes]
    groups: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    name: str = ""
    """What the data set calls itself; empty: by the last part of `origin`."""

    def __len__(self) -> int:
        return len(self.ids)


def read_each(listing: Listing, function: Callable[[bytes], Found], otherwise: Found) -> list[Found]:
    """`function` of each file's bytes, by threads; `otherwise` where it or the reading raises an error."""
    found = [otherwise] * len(listing)

    def stretch(start: int) -> None:  # singly, 171,374 tiny files would spend their time in the pool's queue
        for i in range(start, min(start + 256, len(listing))):
            with contextlib.suppress(ValueError, OSError):
                found[i] = function(listing.read(i))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(stretch, range(0, len(listing), 256)))
    return found


def is_image_name(path: str) -> bool:
    """Whether a path with slashes ends as an image's does, and no part of it is hidden."""
    hidden = path.startswith(".") or "/." in path
    return not hidden and os.path.splitext(path)[1].lower() in SUFFIXES


def _files(folder: str, prefix: str = "") -> Iterator[str]:
    """Paths of all files at any depth, with slashes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name


def images_below(folder: str | Path) -> list[str]:
    """Paths relative to `folder`, with slashes, of the images at any depth, sorted; hidden files and folders are passed
    over."""
    return sorted(path for path in _files(str(folder)) if is_image_name(path))


def image_files(paths: Sequence[str]) -> list[Path]:
    """The files given, and the images within the folders given, sorted; hidden ones are passed over.

    Raises:
      FileNotFoundError: a path is not there.
      ValueError: a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        names = images_below(path)
        if not names:
            raise ValueError(f"{path} holds no image; expected files ending in {', '.join(sorted(SUFFIXES))}")
        found += [path / name for name in names]
    return found


def list_folder(root: str | Path) -> Listing:
    """One sub-folder of `root` is one class; classes and paths are sorted.

    Images may lie deeper inside a class's folder. Passed over: files directly in `root`, hidden files and folders
    (notebooks and desktops leave copies there), and files that aren't images by their suffix, which are counted in
    the log.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: fewer than two classes, or a class without any image; names it.
    """
    if not str(root) or not Path(root).is_dir():
        raise FileNotFoundError(
            f"config field 'data.root' is {str(root)!r}; expected a folder with one sub-folder a class"
        )
    root = Path(root)
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(
            f"{root}: sub-folders found: {', '.join(folders) or 'none'}; expected at least two, one a class"
        )
    ids: list[str] = []
    labels: list[int] = []
    passed_over = 0
    for label, folder in enumerate(folders):
        files = list(_files(str(root / folder)))
        images = sorted(f"{folder}/{path}" for path in files if is_image_name(path))
        if not images:
            raise ValueError(f"{root / folder} holds no image; expected files ending in {', '.join(sorted(SUFFIXES))}")
        passed_over += len(files) - len(images)
        ids += images
        labels += [label] * len(images)
    if passed_over:
        log.info("%s: %d files that aren't images are passed over", root, passed_over)
    return _listing_of_files(root, tuple(folders), ids, labels)


def _listing_of_files(
    folder: Path,
    classes: tuple[str, ...],
    ids: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str] = (),
    sides: Sequence[str] = (),
) -> Listing:
    def read(i: int) -> bytes:
        return read_file(os.path.join(folder, ids[i]))

    labels_of = np.array(labels, np.int32)
    return Listing(str(folder), classes, tuple(ids), labels_of, read, tuple(groups), tuple(sides))


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
