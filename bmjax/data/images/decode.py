"""Image files to RGB: every colour mode becomes what it shows, everything else is an error that says why."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

Found = TypeVar("Found")

# Of Pillow's formats only these: others run programs (EPS calls Ghostscript) or are seldom met and little tested.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
# A cell image has some 10^4 to 10^6 pixels; one of 10^8 is a mistake or an attack, and decoding it takes gigabytes.
MAX_PIXELS = 50_000_000
# The most that so many pixels fill without compression: four channels of 16 bits.
MAX_BYTES = 8 * MAX_PIXELS
MOST_MIRRORED = 8
"""Times an image's side that a field may have."""
LEAST_FIELD = 16
"""Pixels that a field has at least: fewer show no cell, and are a scale in wrong units."""


def read_file(path: str | Path) -> bytes:
    """A file's bytes.

    Raises:
      ValueError: too large for an image; says how large.
      OSError: not there or not to be read.
    """
    with open(path, "rb") as f:
        if (size := os.fstat(f.fileno()).st_size) > MAX_BYTES:
            raise ValueError(f"{size} bytes; expected at most {MAX_BYTES}")
        return f.read()


def _deep(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floating, as 8 bits; Pillow's own conversion clips it at 255.

    Integers are divided by 257; floats by the least of 1, 255 and 65535 that none exceeds, over 255.
    """
    values = np.asarray(image, np.float64)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 65535):
        raise ValueError(f"values from {values.min():g} to {values.max():g}; expected finite ones within 0 to 65535")
    tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    top = next(t for t in tops if values.max() <= t)
    return Image.fromarray((values / top * 255.0).round().astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB: EXIF rotation applied, transparency over white, deep grey scaled to 8 bits.

    White is the empty field of a bright-field microscope. Colour profiles are not applied.

    Raises:
      ValueError: a mode that Pillow can't turn into RGB, or values out of range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep(image)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_rgb(source: str | Path | bytes) -> Image.Image:
    """A file, or its bytes -> its image in Pillow's RGB; of several frames the first. Pillow may warn meanwhile.

    What kind of image it is, its content says and not its name.

    Raises:
      ValueError: empty, truncated, not an image, or far too large; says which, without the path.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels; expected at most {MAX_PIXELS} in all")
            image.load()
            return to_rgb(image)
    # A damaged file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error, zlib.error, KeyError, ...
    except Exception as e:
        # Pillow names the file object or its address in places; the path is the caller's to tell.
        reason = "not an image of a known kind" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        raise ValueError(reason or type(e).__name__) from e


def decode_image(source: str | Path | bytes, size: int, field: float | None = None) -> np.ndarray:
    """A file, or its bytes -> uint8 RGB 0..255 [size, size, 3].

    Squeezed to a square where it isn't one, by Pillow's bilinear filter, which averages when it shrinks. With a
    `field`, it is the square of so many of the file's pixels in its middle; beyond its border it is mirrored.
    `decode_images` keeps Pillow's warnings quiet.

    Raises:
      ValueError: as `open_rgb`; or the field is far larger than the image.
    """
    return _resized(open_rgb(source), size, field)


def _resized(image: Image.Image, size: int, field: float | None = None) -> np.ndarray:
    box = None
    if field is not None:
        if field < LEAST_FIELD:
            raise ValueError(
                f"the field is {field:.3g} pixels of an image of {image.width}x{image.height}; expected at least "
                f"{LEAST_FIELD} (data.pixel_size, --pixel-size and data.field_size are in micrometres)"
            )
        if field > MOST_MIRRORED * min(image.size):
            raise ValueError(
                f"the field is {field:.0f} pixels, the image {image.width}x{image.height}; expected at most "
                f"{MOST_MIRRORED} times its side (data.pixel_size and data.field_size are in micrometres)"
            )
        wide, high = (max(0, math.ceil((field - side) / 2)) for side in image.size)
        if wide or high:
            image = Image.fromarray(np.pad(np.asarray(image), ((high, high), (wide, wide), (0, 0)), "symmetric"))
        left, top = (max((side - field) / 2, 0.0) for side in image.size)
        box = (left, top, min(left + field, image.width), min(top + field, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box), np.uint8)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Pillow's warnings off, but for its warning of a bomb, which is an error."""
    # Filters of warnings belong to the process: set around threads, and not in them.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield


def decode_images(
    read: Callable[[int], bytes], n: int, size: int, fields: Sequence[float] | None = None
) -> Iterator[np.ndarray | str]:
    """Images 0 to n - 1, each uint8 RGB [size, size, 3] or the reason why it can't be read; by threads, in order.

    `read(i)` gives the bytes of file i, in any thread; `fields` as in `decode_image`, of each.
    """

    def one(i: int) -> np.ndarray | str:
        try:
            return decode_image(read(i), size, None if fields is None else fields[i])
        except (ValueError, OSError) as e:
            return str(e)

    with quiet():
        yield from _by_threads(one, n)


def resize_images(images: np.ndarray, size: int, field: float | None = None) -> Iterator[np.ndarray]:
    """Images uint8 RGB [n, h, w, 3] -> each uint8 [size, size, 3], as `decode_images` makes them of files."""
    return _by_threads(lambda i: _resized(Image.fromarray(np.ascontiguousarray(images[i])), size, field), len(images))


def _by_threads(one: Callable[[int], Found], n: int) -> Iterator[Found]:
    """one(0) to one(n - 1), in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Asked for in stretches: the executor's own map would hold every decoded image at once.
        for start in range(0, n, 256):
            yield from pool.map(one, range(start, min(start + 256, n)))


def decode_files(paths: Sequence[str | Path], size: int, field: float | None = None) -> Iterator[np.ndarray | str]:
    """As `decode_images`, of files, all with one field."""
    fields = None if field is None else [field] * len(paths)
    return decode_images(lambda i: read_file(paths[i]), len(paths), size, fields)
