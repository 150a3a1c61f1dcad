"""One folder of images per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bmjax.data.sources.listing import SUFFIXES, Listing, _listing_of_files, is_image_name

log = logging.getLogger(__name__)


def _files(folder: str, prefix: str = "") -> Iterator[str]:
    """Paths of all files at any depth, with slashes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name


def images_below(folder: str | Path) -> list[str]:
    """Paths relative to `folder`, with slashes, of the images at any depth, sorted; hidden files and folders are passed
    over."""
    return sorted(path for path in _files(str(folder)) if is_image_name(path))


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


def list_folder(root: str | Path) -> Listing:
    """One sub-folder of `root` is one class; classes and paths are sorted.

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
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(
            f"{root}: sub-folders found: {', '.join(folders) or 'none'}; expected at least two, one a class"
        )
    ids: list[str] = []
    labels: list[int] = []
    passed_over = 0
    for label, folder in enumerate(folders):
        files = list(_files(str(root / folder)))
        images = sorted(f"{folder}/{path}" for path in files if is_image_name(path))
        if not images:
            raise ValueError(f"{root / folder} holds no image; expected files ending in {', '.join(sorted(SUFFIXES))}")
        passed_over += len(files) - len(images)
        ids += images
        labels += [label] * len(images)
    if passed_over:
        log.info("%s: %d files that aren't images are passed over", root, passed_over)
    return _listing_of_files(root, tuple(folders), ids, labels)
