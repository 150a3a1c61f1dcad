"""What every source gives: images that are not read yet, and what is known of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np

from bmjax.data.images.decode import read_file

Found = TypeVar("Found")

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"})

# How sources spell the sides of a split, in any case.
SIDES = {
    "": "",
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

# Folders that systems and tools leave beside the images, in any case; what they hold is no data of the user's.
SYSTEM_FOLDERS = frozenset(
    (
        *(
            "@eadir",
            "@tmp",
            "@sharebin",
            "@recycle",
            "@recently-snapshot",
            "#recycle",
            "#snapshot",
            "__macosx",
            "__pycache__",
        ),
        *("~snapshot", "_gsdata_", "temporary items", "network trash folder", "_vti_cnf"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found", "thumbs"),
        *(".ipynb_checkpoints", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd", ".temporaryitems"),
        *(".documentrevisions-v100", ".git", ".svn", ".cache", ".thumbnails", ".trash"),
        *("thumb", "_thumb", "_thumbs", "thumbnails", "_thumbnails", "cvs"),
    )
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a source holds, by what became of it: `files` is the sum of `used` and all passed over.

    A link that is not followed counts as one file.
    """

    files: int = 0
    used: int = 0
    system: int = 0
    """In a system's folder."""
    hidden: int = 0
    """Hidden, or in a hidden folder."""
    no_image: int = 0
    """Not an image by the name's ending."""
    broken: int = 0
    """Links that lead nowhere."""
    again: int = 0
    """Links to a folder that is read already, or that holds the link itself."""
    outside: int = 0
    """Images beside the classes' folders."""
    unreadable: int = 0
    """Images that can't be read, which decoding finds."""
    links: int = 0
    """Links to folders that were followed; the files behind them are counted above."""

    def __str__(self) -> str:
        reasons = {
            "in system folders": self.system,
            "hidden": self.hidden,
            "files that aren't images": self.no_image,
            "broken links": self.broken,
            "links to a folder that is read already": self.again,
            "images in no class's folder": self.outside,
            "images that can't be read": self.unreadable,
        }
        text = f"{self.files} files seen, {self.used} used"
        if self.files > self.used:
            text += "; passed over: " + ", ".join(f"{n} {why}" for why, n in reasons.items() if n)
        return text + (f"; {self.links} links to folders followed" if self.links else "")


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
    seen: Seen | None = None
    """What was passed over, where the source knows."""
    pixel_sizes: tuple[float, ...] = ()
    """Micrometres to a pixel of each image, 0 where not known; empty where a source has none."""
    laboratories: tuple[str, ...] = ()
    """Where each image was stained and photographed, for `data.match_colours`; empty where a source doesn't say."""

    def __len__(self) -> int:
        return len(self.ids)


def alike(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in case, spaces or the form of their accents alone, or as numbers not at all, as 1.5
    and 1.50: most often one class."""
    seen: dict[str, str] = {}
    pairs = []
    for name in classes:
        key = unicodedata.normalize("NFKC", "".join(name.lower().split()))
        key = "".join(c for c in key if unicodedata.category(c) != "Cf")  # of no width
        if re.fullmatch(r"[+-]?\d{1,300}(\.\d{0,300})?", key, re.ASCII):
            key = str(Fraction(key.rstrip(".")))
        if (other := seen.setdefault(key, name)) != name:
            pairs.append((other, name))
    return pairs


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


def why_passed_over(path: str) -> str:
    """Why a path with slashes is no image of the user's, as a field of `Seen`; empty where it is one."""
    *folders, name = path.split("/")
    for folder in folders:
        if reason := why_folder_passed_over(folder):
            return reason
    if name.startswith("."):
        return "hidden"
    return "" if os.path.splitext(name)[1].lower() in SUFFIXES else "no_image"


def why_folder_passed_over(name: str) -> str:
    """Why a folder of this name is passed over with all that it holds, as a field of `Seen`; empty where it is not."""
    if name.lower() in SYSTEM_FOLDERS:
        return "system"
    return "hidden" if name.startswith(".") else ""


def _listing_of_files(
    folder: Path,
    classes: tuple[str, ...],
    ids: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str] = (),
    sides: Sequence[str] = (),
    seen: Seen | None = None,
    pixel_sizes: Sequence[float] = (),
    laboratories: Sequence[str] = (),
) -> Listing:
    def read(i: int) -> bytes:
        return read_file(os.path.join(folder, ids[i]))

    labels_of = np.array(labels, np.int32)
    return Listing(
        str(folder),
        classes,
        tuple(ids),
        labels_of,
        read,
        tuple(groups),
        tuple(sides),
        seen=seen,
        pixel_sizes=tuple(pixel_sizes),
        laboratories=tuple(laboratories),
    )
