"""Figures of the data's feed: index and split of a whole collection, decoding, the warm cache, memory.

    python tools/bench_data.py [--root FOLDER]

The collection is a tree of the marrow collection's own 171,374 names with files of a few bytes, made in a temporary
folder; FOLDER, by default rendered cells saved as JPEG, holds images to decode. Prints one line a figure.
"""

from __future__ import annotations

import time
from pathlib import Path

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import numpy as np
# isort: on

from bmjax.config import DataConfig
from bmjax.data import Dataset, list_source, split_dataset
from bmjax.data.builders.bm_cytomorphology import COUNTS
from bmjax.data.cache import hash_images

# What the limited process may have of its own: less than the images it feeds.
LIMIT_MB = 400


def make_collection(root: Path) -> None:
    """A tree as TCIA's, each file with bytes of its own."""
    for name, count in COUNTS.items():
        for start in range(1, count + 1, 1000):
            folder = root / name / f"{start:04d}-{min(start + 999, count):04d}"
            folder.mkdir(parents=True)
            for i in range(start, min(start + 1000, count + 1)):
                (folder / f"{name}_{i:05d}.jpg").write_text(f"{name} {i}")


def index_and_split(root: Path) -> None:
    """Prints the seconds for the index (names, classes, hashes) and for each kind of split."""
    config = DataConfig(source="folder", root=str(root))
    start = time.perf_counter()
    listing = list_source(config)
    listed = time.perf_counter() - start
    hashes = hash_images(listing)
    print(f"index: {len(listing):,} files in {time.perf_counter() - start:.1f} s, of which names {listed:.1f} s")
    images = np.broadcast_to(np.uint8(0), (len(listing), 1, 1, 3))
    dataset = Dataset("tree", listing.classes, images, listing.labels, listing.ids, tuple(hashes), "")
    # Eight images of the rarest class need a seed under which each split has one.
    for kind, by in (
        ("by content", {"split_seed": 1}),
        ("stratified", {"stratify": True}),
        ("by block", {"split_by": "block", "block_size": 2, "stratify": True}),
    ):
        start = time.perf_counter()
        splits = split_dataset(dataset, DataConfig(**by))
        seconds = time.perf_counter() - start
        print(f"split {kind}: {seconds:.2f} s; {len(splits.train):,} {len(splits.val):,} {len(splits.test):,}")
