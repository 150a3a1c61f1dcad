"""What every source gives: decoded images with labels, identities and a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from bmjax.data.images.arrays import check_images


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
        """A dataset of arrays: images uint8 0..255 RGB [n, s, s, 3], labels [n] of any kind that sorts (numbers or
        text), which become classes in their order, and groups [n] (patient, slide) that stay on one side of a split.

            data = Dataset.from_arrays(images, labels)
            bmjax.train(config, data=data)

        Raises:
          TypeError, ValueError: a shape, a type or a range is wrong; names it and what was expected.
        """
        images, of = check_images(images), np.asarray(labels)
        if images.shape[1] != images.shape[2] or not len(images):
            raise ValueError(f"images have shape {list(images.shape)}; expected [n, s, s, 3], square and RGB, n >= 1")
        if of.shape != (len(images),):
            raise ValueError(f"labels have shape {list(of.shape)}; expected [{len(images)}], one an image")
        if of.dtype.kind == "f" and not np.isfinite(of).all():
            raise ValueError(f"label of image {int(np.argmin(np.isfinite(of)))} is not a number; expected one an image")
        values, numbers = np.unique(of, return_inverse=True)
        if len(values) < 2:
            raise ValueError(f"labels hold the classes {', '.join(map(str, values))}; expected at least two")
        given = [
            tuple(map(str, part)) for part in (groups if groups is not None else (), ids if ids is not None else ())
        ]
        for part, what in zip(given, ("groups", "ids"), strict=True):
            if part and len(part) != len(images):
                raise ValueError(f"{what} are {len(part)}; expected {len(images)}, one an image")
        named = given[1] or tuple(f"{i:06d}" for i in range(len(images)))
        if len(set(named)) < len(named):
            raise ValueError("ids are not all different; expected one of its own for each image")
        hashes = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in images)
        entries = json.dumps([images.shape[1], list(zip(named, hashes, numbers.tolist(), strict=True))])
        return cls(
            name=name,
            classes=tuple(map(str, values.tolist())),
            images=images,
            labels=numbers.astype(np.int32),
            ids=named,
            hashes=hashes,
            fingerprint=hashlib.sha256(entries.encode()).hexdigest(),
            groups=given[0],
        )
