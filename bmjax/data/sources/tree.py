"""What lies below a folder: its images, and everything that is passed over, counted by the reason."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import heapq
import os
import stat

from bmjax.data.sources.listing import Seen, why_folder_passed_over, why_passed_over


@dataclasses.dataclass
class Tree:
    """Paths relative to the folder, with slashes: images, folders that were read, links that lead nowhere, links to a
    folder that is read already. `counts` are Seen's, by field."""

    images: list[str] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)
    again: list[str] = dataclasses.field(default_factory=list)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def seen(self, used: int) -> Seen:
        """The summary, if of the images `used` were taken and the others lie beside the classes' folders."""
        counts = {**self.counts, "outside": len(self.images) - used}
        links = counts.pop("links", 0)
        return Seen(files=used + sum(counts.values()), used=used, links=links, **counts)


def walk(root: str) -> Tree:
    """Everything below `root`, in no order.

    Links to folders are followed, each folder once, after all that lies below `root` without links; a link to a folder
    that holds the link is not followed.

    Raises:
      OSError: a folder can't be listed, other than a system's or a hidden one.
    """
    tree = Tree()
    real_root = os.path.realpath(root)
    read: set[str] = set()
    # Path as given, path without links, path relative to the root with a slash at its end.
    folders = [(root, real_root, "")]
    links: list[tuple[str, str, str]] = []  # relative path, path as given, real folder in which the link lies
    while folders or links:
        if folders:
            _read_folder(*folders.pop(), tree, read, folders, links)
            continue
        relative, path, holder = heapq.heappop(links)
        target = os.path.realpath(path)
        if target in read or f"{holder}{os.sep}".startswith(target.rstrip(os.sep) + os.sep):
            tree.again.append(relative)
            tree.counts["again"] += 1
        else:
            tree.counts["links"] += 1
            tree.folders.append(relative)
            folders.append((path, target, f"{relative}/"))
    return tree


def _read_folder(
    path: str,
    real: str,
    prefix: str,
    tree: Tree,
    read: set[str],
    folders: list[tuple[str, str, str]],
    links: list[tuple[str, str, str]],
) -> None:
    """Sorts one folder's entries into `tree`, and into the folders and links that are to be read."""
    read.add(real)
    with os.scandir(path) as entries:
        for entry in entries:
            relative = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                inner = os.path.join(real, entry.name)
                if reason := why_folder_passed_over(entry.name):
                    tree.counts[reason] += _files_below(entry.path)
                elif inner in read:  # by a link that was followed earlier
                    tree.again.append(relative)
                    tree.counts["again"] += 1
                else:
                    tree.folders.append(relative)
                    folders.append((entry.path, inner, f"{relative}/"))
                continue
            try:
                mode = os.stat(entry.path).st_mode
            except OSError:  # a link to nowhere or to itself, or a file that has just been removed
                mode = 0
            if stat.S_ISDIR(mode):
                if reason := why_folder_passed_over(entry.name):
                    tree.counts[reason] += 1
                else:
                    heapq.heappush(links, (relative, entry.path, real))
            elif not mode and not entry.name.startswith("."):
                tree.broken.append(relative)
                tree.counts["broken"] += 1
            elif reason := why_passed_over(entry.name):
                tree.counts[reason] += 1
            elif not stat.S_ISREG(mode):  # a pipe or a device: reading it could wait for ever
                tree.counts["no_image"] += 1
            else:
                tree.images.append(relative)


def _files_below(folder: str) -> int:
    """How many files and links a folder that is passed over holds, as far as it can be listed."""
    n, folders = 0, [folder]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:  # systems lock their own folders
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    n += 1
    return n
