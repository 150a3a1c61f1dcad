"""What every source gives: decoded images with labels, identities and a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from bmjax.data.images.arrays import check_images
from bmjax.data.sources.labels import classes_of, known


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images uint8 0..255 RGB [n, h, w, 3] (often memory-mapped), labels int32 [n] into `classes`.

    `ids` are paths relative to the root, `hashes` the sha256 of each file's bytes. `fingerprint` depends on contents,
    labels and image size. `skipped` lists (path, reason) of unreadable images. `groups` (patient, slide, ...) and
    `sides` ("train", "val", "test" or "") are what the source says of each image, and empty where it says nothing.
    """

    name: str
    classes: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    hashes: tuple[str, ...]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()
    groups: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Holds the fields to what is said above, without a look at the pixels; lists become tuples.

        Raises:
          TypeError, ValueError: names the field, what it is and what was expected.
        """
        for field in ("classes", "ids", "hashes", "groups", "sides"):
            self._check_texts(field)
        images, labels = check_images(self.images), np.asarray(self.labels)
        object.__setattr__(self, "images", images)
        n, k = len(images), len(self.classes)
        if not k or len(set(self.classes)) < k:
            raise ValueError(f"classes are {self.classes!r}; expected at least one, all different")
        if labels.shape != (n,):
            raise ValueError(f"labels have shape {list(labels.shape)}; expected [{n}], one an image")
        if n and labels.dtype.kind not in "iu":
            hint = "; Dataset.from_arrays takes labels of any kind"
            raise ValueError(f"labels are {labels.dtype}; expected int32, places in classes{hint}")
        if n and not (labels.min() >= 0 and labels.max() < k):
            i = int(np.argmax((labels < 0) | (labels >= k)))
            raise ValueError(f"label of image {i} is {labels[i]}; expected 0 to {k - 1}, for there are {k} classes")
        object.__setattr__(self, "labels", labels.astype(np.int32, copy=False))
        for field in ("ids", "hashes", "groups", "sides"):
            given = len(getattr(self, field))
            if given != n and (given or field in ("ids", "hashes")):
                raise ValueError(f"{field} are {given}; expected {n}, one an image")
        if odd := set(self.sides) - {"", "train", "val", "test"}:
            raise ValueError(f"sides hold {min(odd)!r}; expected each to be 'train', 'val', 'test' or ''")

    def _check_texts(self, field: str) -> None:
        given = getattr(self, field)
        if isinstance(given, str) or not isinstance(given, (tuple, list)):
            raise TypeError(f"{field} is {given!r:.60} ({type(given).__name__}); expected a tuple of text")
        odd = next((part for part in given if not isinstance(part, str)), None)
        if odd is not None:
            raise TypeError(f"{field} hold {odd!r:.60} ({type(odd).__name__}); expected a tuple of text")
        object.__setattr__(self, field, tuple(given))

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: Sequence[Any] | np.ndarray,
        groups: Sequence[Any] | None = None,
        *,
        ids: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> Dataset:
        """A dataset of arrays: images uint8 0..255 RGB [n, s, s, 3], labels [n] of numbers or text, which become
        classes as in a table (numbers in their order, 2.0 as `2`; none may be missing), and groups [n] (patient, slide)
        that stay on one side of a split; one that is None or NaN is not known.

            data = Dataset.from_arrays(images, labels)
            bmjax.train(config, data=data)

        Raises:
          TypeError, ValueError: a shape, a type or a range is wrong; names it and what was expected.
        """
        images, of = check_images(images), np.asarray(labels)
        if isinstance(labels, np.ma.MaskedArray):
            raise TypeError("labels are a masked array; expected one label an image: leave the others' images out")
        if images.shape[1] != images.shape[2] or not len(images):
            raise ValueError(f"images have shape {list(images.shape)}; expected [n, s, s, 3], square and RGB, n >= 1")
        if of.shape != (len(images),):
            hint = "; of one-hot labels it is labels.argmax(-1)" if of.ndim == 2 else ""
            raise ValueError(f"labels have shape {list(of.shape)}; expected [{len(images)}], one an image{hint}")
        numbers, classes = _numbered(of)
        if len(classes) < 2:
            raise ValueError(f"labels hold the classes {', '.join(classes)}; expected at least two")
        given = [
            tuple(map(_text, groups if groups is not None else ())),
            tuple(map(str, ids if ids is not None else ())),
        ]
        for part, what in zip(given, ("groups", "ids"), strict=True):
            if part and len(part) != len(images):
                raise ValueError(f"{what} are {len(part)}; expected {len(images)}, one an image")
        named = given[1] or tuple(f"{i:06d}" for i in range(len(images)))
        if len(set(named)) < len(named):
            raise ValueError("ids are not all different; expected one of its own for each image")
        hashes = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in images)
        entries = json.dumps([images.shape[1], list(zip(named, hashes, numbers, strict=True))])
        return cls(
            name=name,
            classes=classes,
            images=images,
            labels=np.array(numbers, np.int32),
            ids=named,
            hashes=hashes,
            fingerprint=hashlib.sha256(entries.encode()).hexdigest(),
            groups=given[0],
        )


def _text(value: Any) -> str:
    """A label or a group as text; "" where it is missing, as None, NaN and the like are."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    return "" if value is None or known(str(value)) == "" else str(value)


def _numbered(labels: np.ndarray) -> tuple[list[int], tuple[str, ...]]:
    """Each label's place among the classes, and the classes.

    Raises:
      ValueError: a label is missing; names its image.
    """
    # NumPy's text of a number is the shortest that is it: 0.1 for float32 too.
    names = [_text(value) for value in (labels.astype(str) if labels.dtype.kind in "iuf" else labels)]
    if "" in names:
        i = names.index("")
        raise ValueError(f"label of image {i} is {labels[i]!r}, which is not a number or a name; expected one an image")
    names, classes = classes_of(names)
    place = {name: i for i, name in enumerate(classes)}
    return [place[name] for name in names], classes
