"""What every source gives: decoded images with labels, identities and a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np


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
          ValueError: a shape, a type or a range is wrong; names it and what was expected.
        """
        images, of = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8:
            remedy = "np.round(255 * images).astype(np.uint8) of floats 0..1, images.astype(np.uint8) of 0..255"
            raise ValueError(f"images are {images.dtype}; expected uint8, 0..255: {remedy}")
        if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2] or not len(images):
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
