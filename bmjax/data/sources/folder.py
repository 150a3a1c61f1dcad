"""One folder of images per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from bmjax.data.sources.layout import arrange
from bmjax.data.sources.listing import SUFFIXES, Listing, _listing_of_files
from bmjax.data.sources.tree import Tree, walk
from bmjax.files import printable

log = logging.getLogger(__name__)


def images_below(folder: str | Path) -> list[str]:
    """Paths relative to `folder`, with slashes, of the images at any depth, sorted; what is passed over, as in
    `list_folder`, is counted in the log."""
    tree = walk(str(folder))
    _warn_of_links(folder, tree)
    seen = tree.seen(len(tree.images))
    if seen.files > seen.used:
        log.info("%s: %s", folder, seen)
    return sorted(tree.images)


def _warn_of_links(root: str | Path, tree: Tree) -> None:
    for paths, what in ((tree.broken, "lead nowhere"), (tree.again, "lead to a folder that is read already")):
        if paths:
            named = ", ".join(map(printable, sorted(paths)[:5])) + (", ..." if len(paths) > 5 else "")
            log.warning("%s: %d links %s and are passed over: %s", root, len(paths), what, named)


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


def list_folder(root: str | Path, fewest: int = 2) -> Listing:
    """One sub-folder of `root` is one class, or one side of a split (train, val, test and their like) with one folder a
    class in it; classes and paths are sorted.

    Images may lie deeper inside a class's folder. Links to folders are followed, each folder once. Passed over, and
    counted in `seen`: files directly in `root`, system folders, hidden files and folders, broken links, and
    files that aren't images by their suffix.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: fewer than `fewest` classes, a class without any image, classes beside sides of a split, or two
        that are links to one folder; names them.
    """
    if not str(root) or not Path(root).is_dir():
        raise FileNotFoundError(
            f"config field 'data.root' is {str(root)!r}; expected a folder with one sub-folder a class"
        )
    tree = walk(str(root))
    _warn_of_links(root, tree)
    above = f"{os.path.realpath(root)}{os.sep}"
    for name in sorted(name for name in tree.again if "/" not in name):
        target = os.path.realpath(os.path.join(root, name))
        # A link to another class's folder is that class under a second name, and one upwards is a loop.
        if not above.startswith(f"{target.rstrip(os.sep)}{os.sep}") and not target.startswith(above):
            raise ValueError(
                f"{printable(root)}: {printable(name)} leads to {printable(target)}, which is read already by another "
                "link; expected a folder for each class"
            )
    images = sorted(tree.images, key=lambda path: (path.split("/")[0], path))
    layout = arrange(str(root), images, tree.folders, fewest)
    seen = tree.seen(len(layout.ids))
    return _listing_of_files(Path(root), layout.classes, layout.ids, layout.labels, (), layout.sides, seen)
