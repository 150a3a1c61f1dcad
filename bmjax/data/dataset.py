"""What every source gives: decoded images with labels, identities and a fingerprint."""

from __future__ import annotations

import dataclasses

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
