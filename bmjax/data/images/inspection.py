"""What image files are, told without decoding them: format, colour mode, size, compression."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bmjax.data.images.decode import FORMATS, quiet
from bmjax.data.sources.listing import Listing, read_each

# Endings by what a file holds.
ENDINGS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
}


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """Of one file: its length, Pillow's names of format and colour mode, width and height in pixels, the number of
    frames, whether it has EXIF, and the mean step of JPEG's luminance quantisation (0 for other formats)."""

    bytes: int
    format: str
    mode: str
    width: int
    height: int
    frames: int
    exif: bool
    quantisation: float


def facts_of(data: bytes) -> FileFacts:
    """The facts of a file's bytes.

    Raises:
      ValueError, OSError: it is no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            tables = getattr(image, "quantization", None) or {}
            return FileFacts(
                bytes=len(data),
                format=image.format or "",
                mode=image.mode,
                width=image.width,
                height=image.height,
                frames=getattr(image, "n_frames", 1),
                exif=bool(image.info.get("exif")),
                quantisation=float(np.mean(tables[0])) if 0 in tables else 0.0,
            )
    except Exception as e:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(str(e)) from e


def inspect_files(listing: Listing) -> list[FileFacts | None]:
    """The facts of each file of a listing, by threads; None for those that are no image."""
    with quiet():
        return read_each(listing, facts_of, None)


def metadata_features(facts: Sequence[FileFacts]) -> np.ndarray:
    """What files tell without their pixels and their length, float32 [n, 7]: numbers to learn from."""

    def numbered(values: Sequence[str]) -> np.ndarray:
        return np.unique(values, return_inverse=True)[1]

    columns = [numbered([f.format for f in facts]), numbered([f.mode for f in facts])]
    columns += [[getattr(f, name) for f in facts] for name in ("width", "height", "frames", "exif", "quantisation")]
    return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)
