"""Train, validation and test: stratified, stable when files are added, copies always on one side."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config import DataConfig
from bmjax.data.dataset import Dataset
from bmjax.files import write_text

NAMES = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Splits:
    """Rows of a dataset, int64, sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def side_of(content_hash: str, seed: int, shares: tuple[float, float, float]) -> int:
    """0, 1 or 2 for train, val or test, by a hash of seed and content alone."""
    digest = hashlib.sha256(f"{seed}:{content_hash}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    return int(u >= shares[0]) + int(u >= shares[0] + shares[1])


def _seed_that_works(dataset: Dataset, shares: tuple[float, float, float]) -> int | None:
    """The first of a few hundred seeds under which every class has an image in every split."""
    sizes = np.bincount(dataset.labels, minlength=len(dataset.classes))
    # Large classes nearly never decide; leaving them out keeps the search short.
    small = [i for i, label in enumerate(dataset.labels) if sizes[label] <= max(100, sizes.min())]
    needed = {(dataset.labels[i], side) for i in small for side in range(3)}
    for seed in range(300):
        if {(dataset.labels[i], side_of(dataset.hashes[i], seed, shares)) for i in small} == needed:
            return seed
    return None


def split_dataset(dataset: Dataset, config: DataConfig) -> Splits:
    """Splits by `config.split` and `config.split_seed`.

    The side of an image depends on its bytes and the seed alone: adding files moves none, and copies of one file stay
    together. The price is that each class has its shares up to binomial noise rather than exactly.

    Raises:
      ValueError: a class has no image in one of the splits; names both.
    """
    side = np.array([side_of(h, config.split_seed, config.split) for h in dataset.hashes])
    for label, name in enumerate(dataset.classes):
        for k, split in enumerate(NAMES):
            if not ((dataset.labels == label) & (side == k)).any():
                n = int((dataset.labels == label).sum())
                other = _seed_that_works(dataset, config.split)
                advice = "add images" if other is None else f"add images, or set data.split_seed to {other}"
                raise ValueError(
                    f"class {name!r} ({n} images) has none in the {split} split; expected at least one under "
                    f"data.split {config.split} and data.split_seed {config.split_seed}: {advice}"
                )
    return Splits(*(np.flatnonzero(side == k) for k in range(3)))


def write_split(path: str | Path, dataset: Dataset, splits: Splits) -> None:
    """The split as CSV: path, sha256, label, split."""
    side = {int(i): name for name in NAMES for i in getattr(splits, name)}
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "sha256", "label", "split"))
    for i, (name, digest) in enumerate(zip(dataset.ids, dataset.hashes, strict=True)):
        writer.writerow((name, digest, dataset.classes[dataset.labels[i]], side[i]))
    # File names need not be valid text.
    write_text(Path(path), text.getvalue(), errors="surrogateescape")


def read_split(path: str | Path, dataset: Dataset) -> Splits:
    """`write_split`'s file -> the split, as rows of `dataset`.

    Raises:
      ValueError: the file and the dataset don't hold the same images; names the first that differs.
    """
    with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as f:
        rows = {row["path"]: (row["sha256"], row["label"], row["split"]) for row in csv.DictReader(f)}
    for name in rows.keys() - set(dataset.ids):
        raise ValueError(f"{path} lists {name!r}, which the data lack")
    side = np.empty(len(dataset), np.int64)
    for i, (name, digest) in enumerate(zip(dataset.ids, dataset.hashes, strict=True)):
        found = rows.get(name, ("", "", ""))
        if found[:2] != (digest, dataset.classes[dataset.labels[i]]) or found[2] not in NAMES:
            raise ValueError(f"{path}: {name!r} is {found}; expected {digest}, its class and one of {NAMES}")
        side[i] = NAMES.index(found[2])
    return Splits(*(np.flatnonzero(side == k) for k in range(3)))


def dataset_summary(dataset: Dataset, splits: Splits) -> dict[str, Any]:
    """What a run records of its data, fit for JSON; `copies` are images whose bytes another one has too."""
    counts = {
        name: np.bincount(dataset.labels[getattr(splits, name)], minlength=len(dataset.classes)) for name in NAMES
    }
    return {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "n": len(dataset),
        "image_size": int(dataset.images.shape[1]),
        "fingerprint": dataset.fingerprint,
        "counts": {name: dict(zip(dataset.classes, map(int, c), strict=True)) for name, c in counts.items()},
        "copies": len(dataset) - len(set(dataset.hashes)),
        "skipped": [list(entry) for entry in dataset.skipped],
    }
