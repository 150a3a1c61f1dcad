"""What every source gives: images that are not read yet, and what is known of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from bmjax.data.images.decode import read_file

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
