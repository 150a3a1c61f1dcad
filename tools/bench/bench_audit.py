"""How well `bmjax data audit` finds copies: copies of real cells are planted and looked for.

    python tools/bench/bench_audit.py --root FOLDER [--every 4] [--seed 0] [--tiles 0]

FOLDER holds one sub-folder a class. Of every fourth image one copy of each kind is planted, one kind at a time, written
as a file, read again as any file is, and searched for among all images. "certain" is what the audit calls a copy.
Unrelated pairs are all pairs of the folder's own images. `--tiles N` adds the time of a search among N images, which
are the folder's own, rolled by ever more pixels.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import time
from collections.abc import Callable

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import numpy as np
from PIL import Image, ImageEnhance

# isort: on
from bmjax.config import DataConfig
from bmjax.data.images.decode import decode_image, open_rgb
from bmjax.data.images.duplicates import SUSPECTED, Pairs, find_pairs, thumbnails
from bmjax.data.load import list_source

SIZE = 224
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _turn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose(int(rng.integers(0, 7))))


def _brighter(low: float, high: float) -> Change:
    return lambda image, rng: ImageEnhance.Brightness(image).enhance(rng.uniform(low, high))


def _cut(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    w, h = image.size
    return image.crop((w // 40, h // 40, w - w // 40, h - h // 40))


# What is planted, and JPEG's quality where the copy is a JPEG; None: PNG.
KINDS: dict[str, tuple[Change | None, int | None]] = {
    "the file itself": (None, None),
    "same pixels, as PNG": (lambda image, rng: image, None),
    "mirrored or turned": (_turn, None),
    "JPEG of quality 75": (lambda image, rng: image, 75),
    "JPEG of quality 30": (lambda image, rng: image, 30),
    "brightness x 0.8 to 1.2": (_brighter(0.8, 1.2), None),
    "brightness x 0.7 to 1.3": (_brighter(0.7, 1.3), None),
    "half the size": (lambda image, rng: image.resize((image.width // 2, image.height // 2)), None),
    "grey": (lambda image, rng: image.convert("L").convert("RGB"), None),
    "turned, x 0.8 to 1.2, JPEG 60": (lambda image, rng: _brighter(0.8, 1.2)(_turn(image, rng), rng), 60),
    "turned by 5 degrees (not promised)": (lambda image, rng: image.rotate(5, Image.Resampling.BILINEAR), None),
    "5 % cut off (not promised)": (_cut, None),
}


def plant(data: bytes, change: Change | None, quality: int | None, rng: np.random.Generator) -> bytes:
    """The bytes of a changed copy of an image's file."""
    if change is None:
        return data
    out = io.BytesIO()
    image = change(open_rgb(data), rng)
    image.save(out, "PNG") if quality is None else image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def bench_kinds(files: list[bytes], grey: np.ndarray, every: int, seed: int) -> None:
    """Prints the share of each kind of copy that is found."""
    originals = np.arange(0, len(files), every)
    print(f"\n| planted in {len(files):,} images | copies | certain | suspected or certain | least correlation |")
    print("|---|---|---|---|---|")
    for kind, (change, quality) in KINDS.items():
        rng = np.random.default_rng(seed)
        copies = np.stack([decode_image(plant(files[i], change, quality, rng), SIZE) for i in originals])
        pairs = find_pairs(np.concatenate([grey, thumbnails(copies)]))
        of_copy = pairs.where(pairs.second == len(files) + np.searchsorted(originals, pairs.first))
        of_copy = of_copy.where(np.isin(of_copy.first, originals))
        least = f"{of_copy.correlation.min():.3f}" if len(of_copy) == len(originals) else "not all found"
        found = [100 * count / len(originals) for count in (of_copy.certain.sum(), len(of_copy))]
        print(f"| {kind} | {len(originals)} | {found[0]:.1f} % | {found[1]:.1f} % | {least} |", flush=True)


def report_unrelated(pairs: Pairs, n: int) -> None:
    all_pairs = n * (n - 1) // 2
    certain, suspected = int(pairs.certain.sum()), int((pairs.correlation >= SUSPECTED).sum())
    print(
        f"\npairs of the folder's own images: {all_pairs:,}; certain {certain} ({100 * certain / all_pairs:.5f} %), "
        f"suspected {suspected - certain}, highest correlation {pairs.correlation.max(initial=0):.3f}"
    )


def bench_time(images: list[np.ndarray], tiles: int) -> None:
    """Prints the seconds of thumbnails and of the search among so many images."""
    start = time.perf_counter()
    grey = thumbnails(np.stack(images))
    each = (time.perf_counter() - start) / len(images)
    many = np.stack([np.roll(grey[i % len(grey)], i // len(grey), axis=(0, 1)) for i in range(tiles)])
    start = time.perf_counter()
    find_pairs(many)
    print(f"\nsearch among {tiles:,} images: {time.perf_counter() - start:.0f} s, and thumbnails {each * tiles:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", required=True, help="folder of real images, one sub-folder a class")
    parser.add_argument(
        "--every", type=int, default=4, help="plant a copy of every so many images (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=0, help="time a search among so many images")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    listing = list_source(DataConfig(source="folder", root=options.root))
    files = [listing.read(i) for i in range(len(listing))]
    images = [decode_image(data, SIZE) for data in files]
    grey = thumbnails(np.stack(images))
    report_unrelated(find_pairs(grey, least=0.0), len(files))
    bench_kinds(files, grey, options.every, options.seed)
    if options.tiles:
        bench_time(images, options.tiles)


if __name__ == "__main__":
    main()
