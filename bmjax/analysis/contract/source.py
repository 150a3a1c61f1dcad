"""The contract of a data source: f(root) -> bmjax.Listing, images that are not read yet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bmjax.analysis.contract.verdict import Contract, first_line, say
from bmjax.data.batches import evenly
from bmjax.data.images.decode import decode_image, quiet
from bmjax.data.sources.listing import Listing

LOOKED_AT = 16
"""Images that are read: the first, the last, and others at equal distances."""
_SIDES = ("", "train", "val", "test")


class Subject:
    """A source under examination; `part` lists."""

    def __init__(self, part: Callable[[], Any]):
        self.part = part

    @functools.cached_property
    def listing(self) -> Any:
        return self.part()

    @functools.cached_property
    def places(self) -> list[int]:
        """The images that are read."""
        return evenly(len(self.listing), LOOKED_AT).tolist()


def call(s: Subject) -> str | None:
    """Gives a bmjax.Listing with at least one image of at least two classes."""
    found = s.listing
    if not isinstance(found, Listing):
        return say(f"it gave {type(found).__name__}", "a bmjax.Listing", "from bmjax import Listing")
    if not len(found):
        return say("it lists no image", "at least one", "Is `root` where they are? Raise FileNotFoundError if not.")
    if len(found.classes) < 2 or not all(isinstance(c, str) and c for c in found.classes):
        return say(f"the classes are {found.classes!r}", "at least two names", "`classes` is a tuple of text.")
    if len(set(found.classes)) < len(found.classes):
        return say(f"the classes are {found.classes!r}", "names that differ", "Number the sorted set of their names.")
    return None


def lengths(s: Subject) -> str | None:
    """Labels are as many as ids; all else that comes by image is too, or empty."""
    n = len(s.listing.ids)
    for name in ("labels", "groups", "sides", "pixel_sizes", "laboratories"):
        found = len(getattr(s.listing, name))
        if found != n and (name == "labels" or found):
            return say(f"{found} {name} for {n} ids", f"{n}, one an image", "Are files left out in one, not the other?")
    return None


def ids(s: Subject) -> str | None:
    """Ids are text and all different: they name an image in every record."""
    seen: set[str] = set()
    for i, name in enumerate(s.listing.ids):
        if not isinstance(name, str):
            return say(f"id {i} is {name!r}", "text", "The path within root, with slashes, is a good one.")
        if name in seen:
            hint = "Take the path within root, not the file's name alone."
            return say(f"{name!r} comes twice", "ids that differ", hint)
        seen.add(name)
    return None


def labels(s: Subject) -> str | None:
    """Labels are whole numbers that index `classes`, from 0."""
    found, k = np.asarray(s.listing.labels), len(s.listing.classes)
    hint = "np.array([classes.index(name) for name in names], np.int32)"
    if found.dtype.kind not in "iu" or found.ndim != 1:
        return say(f"labels are {found.dtype}{list(found.shape)}", "whole numbers [n]", hint)
    if found.min() < 0 or found.max() >= k:
        return say(f"labels range from {found.min()} to {found.max()}", f"0 to {k - 1}, for {k} classes", hint)
    return None


def groups_and_sides(s: Subject) -> str | None:
    """Groups and laboratories are text; sides are train, val, test or empty."""
    for what, names in (("group", s.listing.groups), ("laboratory", s.listing.laboratories)):
        for i, name in enumerate(names):
            if not isinstance(name, str):
                return say(f"{what} {i} is {name!r}", "text", "str(...) of a number.")
    if odd := sorted({repr(side) for side in s.listing.sides if side not in _SIDES}):
        return say(f"a side is {odd[0]}", "'train', 'val', 'test' or ''", "Validation images are of side 'val'.")
    return None


def reads(s: Subject) -> str | None:
    """read(i) gives the bytes of an image file that decodes: the first, the last, and some between."""
    for i in s.places:
        data = s.listing.read(i)
        if not isinstance(data, bytes):
            return say(f"read({i}) gave {type(data).__name__}", "bytes", "The file's, not decoded: path.read_bytes().")
        try:
            with quiet():
                decode_image(data, 16)
        except (ValueError, OSError) as e:
            hint = "PNG, JPEG, TIFF, BMP, GIF and WebP are read; does `read` use the order of `ids`?"
            return say(f"image {s.listing.ids[i]!r} raised {first_line(e)}", "an image", hint)
    return None


def threads(s: Subject) -> str | None:
    """read(i) gives the same from several threads at once."""
    alone = [s.listing.read(i) for i in s.places]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(s.listing.read, s.places * 4))
    if together != alone * 4:
        hint = "Open the file within `read`, or a lock around what threads share (an archive, a position)."
        return say("read by 8 threads at once an image had other bytes", "the same", hint)
    return None


def deterministic(s: Subject) -> str | None:
    """A second call lists the same images in the same order."""
    again = s.part()
    for name in ("classes", "ids", "groups", "sides", "pixel_sizes", "laboratories"):
        if tuple(getattr(again, name)) != tuple(getattr(s.listing, name)):
            hint = "Sort: a folder's files and a set have no order of their own, and a resume must find the same."
            return say(f"a second call gave other {name}, or in another order", "the same", hint)
    if not np.array_equal(again.labels, s.listing.labels):
        return say("a second call gave other labels", "the same", "Number classes by their sorted names.")
    if any(again.read(i) != s.listing.read(i) for i in s.places):
        return say("a second call reads other bytes", "the same", "Look for random numbers or a moving position.")
    return None


CONTRACT = Contract(
    "source",
    Subject,
    (call, lengths, ids, labels, groups_and_sides, reads, threads, deterministic),
    basis=("call", "lengths"),
)
