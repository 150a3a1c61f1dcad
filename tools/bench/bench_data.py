"""Figures of the data's feed: index and splits of a whole collection, decoding, the warm cache.

    python tools/bench/bench_data.py [--root FOLDER]

The collection is a tree of the marrow collection's 171,374 names with files of a few bytes, made in a temporary
folder. FOLDER, one sub-folder a class, holds the images to decode; by default rendered cells of 250 pixels as JPEG.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import numpy as np
from PIL import Image
# isort: on

from bmjax.config import DataConfig
from bmjax.data.batches import TrainBatches
from bmjax.data.builders.bm_cytomorphology import COUNTS
from bmjax.data.dataset import Dataset
from bmjax.data.images.cache import cached, hash_images
from bmjax.data.images.decode import decode_images
from bmjax.data.load import list_source
from bmjax.data.sources.cells import CLASSES
from bmjax.data.sources.listing import Listing
from bmjax.data.sources.synthetic import render
from bmjax.data.splits import split_dataset

SIZE = 224
BATCH = 32
# Blocks of two, for the rarest class has eight images.
SPLITS = {
    "by content": DataConfig(),
    "stratified": DataConfig(stratify=True),
    "by blocks of file numbers": DataConfig(split_by="block", block_size=2, stratify=True),
    "fold 1 of 5": DataConfig(folds=5, fold=1, stratify=True),
}


def make_collection(root: Path) -> None:
    """A tree as TCIA's, each file with bytes of its own."""
    for name, count in COUNTS.items():
        for start in range(1, count + 1, 1000):
            folder = root / name / f"{start:04d}-{min(start + 999, count):04d}"
            folder.mkdir(parents=True)
            for i in range(start, min(start + 1000, count + 1)):
                (folder / f"{name}_{i:05d}.jpg").write_text(f"{name} {i}")


def make_cells(root: Path, per_class: int = 100) -> None:
    """Rendered cells as the collection's files are: 250 pixels, JPEG."""
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(per_class):
            Image.fromarray(render(name, 250, 0, i)).save(root / name / f"{name}_{i:05d}.jpg", quality=95)


def bench_index(root: Path) -> None:
    """Prints the seconds of the index (names, classes, hashes) and of each kind of split."""
    start = time.perf_counter()
    listing = list_source(DataConfig(source="folder", root=str(root)))
    listed = time.perf_counter() - start
    hashes = hash_images(listing)
    print(f"index: {len(listing):,} files in {time.perf_counter() - start:.1f} s, {listed:.1f} s of it for names")
    images = np.broadcast_to(np.uint8(0), (len(listing), 1, 1, 3))
    dataset = Dataset("tree", listing.classes, images, listing.labels, listing.ids, tuple(hashes), "")
    for kind, config in SPLITS.items():
        start = time.perf_counter()
        splits = split_dataset(dataset, config)
        sizes = f"{len(splits.train):,} / {len(splits.val):,} / {len(splits.test):,}"
        print(f"split {kind}: {time.perf_counter() - start:.2f} s, {sizes}")


def bench_decoding(listing: Listing, rounds: int = 3) -> None:
    """Prints how many images a second are read and decoded, the best of some rounds; files are in the page cache."""
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        for image in decode_images(listing.read, len(listing), SIZE):
            assert not isinstance(image, str), image
        rates.append(len(listing) / (time.perf_counter() - start))
    mean = np.mean([len(listing.read(i)) for i in range(min(100, len(listing)))]) / 1000
    print(f"decoding: {max(rates):,.0f} images/s to {SIZE}x{SIZE}, files of {mean:.0f} kB")


def bench_cache(folder: Path, n: int = 4000, seconds: float = 5.0) -> None:
    """Prints how many images a second a warm cache gives in shuffled batches."""
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    images, _ = cached(folder, "bench", n, SIZE, (picture for _ in range(n)), progress=False)
    ids = tuple(map(str, range(n)))
    dataset = Dataset("bench", ("a",), images, np.zeros(n, np.int32), ids, ids, "")
    stream = TrainBatches(dataset, np.arange(n), BATCH, 0).batches(0)
    for _ in range(n // BATCH):  # warm
        next(stream)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += len(next(stream)["label"])
    print(f"warm cache: {done / (time.perf_counter() - start):,.0f} images/s of {SIZE}x{SIZE}, batches of {BATCH}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", help="folder of images to decode, one sub-folder a class")
    root = parser.parse_args().root
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, Pillow {Image.__version__}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        collection, cells = Path(temporary) / "collection", Path(temporary) / "cells"
        make_collection(collection)
        bench_index(collection)
        if root is None:
            cells.mkdir()
            make_cells(cells)
        bench_decoding(list_source(DataConfig(source="folder", root=root or str(cells))))
        bench_cache(Path(temporary) / "cache")


if __name__ == "__main__":
    main()
