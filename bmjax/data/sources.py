"""Finds and decodes images: one folder per class."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bmjax.files import checksum

log = logging.getLogger(__name__)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
# A cell image has some 10^4 to 10^6 pixels; one of 10^8 is a mistake or an attack, and decoding it takes gigabytes.
MAX_PIXELS = 50_000_000


def images_below(folder: Path) -> list[Path]:
    """Paths relative to `folder` of the images at any depth, sorted; hidden files and folders are passed over."""
    paths = (p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.parts))


def image_files(paths: Sequence[str]) -> list[Path]:
    """The files given, and the images within the folders given, sorted; hidden ones are passed over.

    Raises:
      FileNotFoundError: a path is not there.
      ValueError: a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        names = images_below(path)
        if not names:
            raise ValueError(f"{path} holds no image; expected files ending in {', '.join(sorted(SUFFIXES))}")
        found += [path / name for name in names]
    return found


def list_images(root: str | Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """(classes, [(path relative to root, label)]), both sorted; one sub-folder of `root` is one class.

    Images may lie deeper inside a class's folder. Passed over: files directly in `root`, hidden files and folders
    (notebooks and desktops leave copies there), and files that aren't images by their suffix, which are counted in
    the log.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: fewer than two classes, or a class without any image; names it.
    """
    if not str(root) or not Path(root).is_dir():
        raise FileNotFoundError(
            f"config field 'data.root' is {str(root)!r}; expected a folder with one sub-folder a class"
        )
    root = Path(root)
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        found = ", ".join(f.name for f in folders) or "none"
        raise ValueError(f"{root}: sub-folders found: {found}; expected at least two, one a class")
    entries, passed_over = [], 0
    for label, folder in enumerate(folders):
        images = images_below(folder)
        if not images:
            raise ValueError(f"{folder} holds no image; expected files ending in {', '.join(sorted(SUFFIXES))}")
        passed_over += sum(p.is_file() for p in folder.rglob("*")) - len(images)
        entries += sorted(((Path(folder.name) / p).as_posix(), label) for p in images)
    if passed_over:
        log.info("%s: %d files that aren't images are passed over", root, passed_over)
    return tuple(f.name for f in folders), entries


def hash_files(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file's bytes, by threads."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda path: checksum(path, "sha256"), paths))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB: EXIF rotation applied, transparency over white, deep grey scaled to 8 bits.

    16-bit grey is divided by 257; 32-bit floats by the least of 1, 255 and 65535 that none exceeds.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion clips these at 255.
        values = np.nan_to_num(np.asarray(image, np.float64))
        tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        top = next((t for t in tops if values.max() <= t), values.max())
        image = Image.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_rgb(path: str | Path) -> Image.Image:
    """A file -> its image in Pillow's RGB; of several frames the first. Pillow may warn meanwhile.

    Raises:
      ValueError: empty, truncated, not an image, or far too large; says which, without the path.
    """
    try:
        if Path(path).stat().st_size == 0:
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels; expected at most {MAX_PIXELS} in all")
            image.load()
            return to_rgb(image)
    # A damaged file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error, zlib.error, KeyError, ...
    except Exception as e:
        # Pillow names the file object or its address in places; the path is the caller's to tell.
        reason = "not an image of a known kind" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        raise ValueError(reason or type(e).__name__) from e


def decode_image(path: str | Path, size: int) -> np.ndarray:
    """A file -> uint8 RGB 0..255 [size, size, 3].

    Squeezed to a square where it isn't one, by Pillow's bilinear filter, which averages when it shrinks.
    `decode_images` keeps Pillow's warnings quiet.

    Raises:
      ValueError: as `open_rgb`.
    """
    return np.asarray(open_rgb(path).resize((size, size), Image.Resampling.BILINEAR), np.uint8)


def decode_images(paths: Sequence[str | Path], size: int) -> Iterator[np.ndarray | str]:
    """Each file's image, uint8 RGB [size, size, 3], or the reason why it can't be read; by threads, in order."""

    def one(path: str | Path) -> np.ndarray | str:
        try:
            return decode_image(path, size)
        except ValueError as e:
            return str(e)

    # Filters of warnings belong to the process, so they're set here and not in each thread.
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        # Asked for in stretches: the executor's own map would hold every decoded image at once.
        for start in range(0, len(paths), 256):
            yield from pool.map(one, paths[start : start + 256])
