"""What the folders of a tree or an archive mean: classes, or the sides of a split with classes in each."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence

from bmjax.data.sources.listing import SIDES, SUFFIXES
from bmjax.files import printable

log = logging.getLogger(__name__)
_TABLE = "or list the images in a table (data.source table), which says label and split of each"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Images in classes: paths, labels into `classes`, and each one's side, or none where no split is given."""

    classes: tuple[str, ...]
    ids: list[str]
    labels: list[int]
    sides: list[str]


def arrange(where: str, images: Sequence[str], folders: Iterable[str], fewest: int = 2) -> Layout:
    """`images` by class, in their order; those that lie in no class's folder are left out. Paths count from `where`.

    The outermost folders are the classes. If all of them are named as sides of a split are, the classes are the
    folders within those. `folders` are all folders, also those without an image.

    Raises:
      ValueError: fewer than `fewest` classes, a class without an image, or folders of both kinds side by side.
    """
    outer, inner = set[str](), set[tuple[str, str]]()
    for folder in folders:
        first, *rest = folder.split("/")
        outer.add(first)
        if rest:
            inner.add((first, rest[0]))
    sides = {name: side for name in outer if (side := _side(name))}
    _check_depth_of_sides(where, outer, inner)
    given = _is_split(where, outer, inner, sides, images)
    depth = int(given)
    ids = [path for path in images if path.count("/") > depth]
    parts = [path.split("/", depth + 1) for path in ids]
    classes = tuple(sorted({name for _, name in inner} if given else outer))
    if len(classes) < fewest:
        place = f"class folders within {_names(outer)}" if given else "sub-folders found"
        deeper = next(iter(sides or outer)) if not given and len(inner) > 1 else ""
        inside = f"; the classes may lie in {where}/{printable(deeper)}" if deeper else ""
        least = "two" if fewest == 2 else fewest
        raise ValueError(
            f"{where}: {place}: {_names(classes) or 'none'}; expected at least {least}, one a class{inside}"
        )
    filled = {part[depth] for part in parts} | ({part[0] for part in parts} if given else set())
    for name in sorted(set(classes) | (outer if given else set())):
        if name not in filled:
            place = f"{where}/{name}" if not given or name in outer else f"{where}: class {name!r} of the given split"
            raise ValueError(
                f"{printable(place)} holds no image; expected files ending in {', '.join(sorted(SUFFIXES))}"
            )
    if given:
        log.info("%s: %s are taken for a given split; the folders within them are the classes", where, _names(outer))
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[part[depth]] for part in parts]
    return Layout(classes, ids, labels, [sides[part[0]] for part in parts] if given else [])


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(printable, sorted(names)))


def _check_depth_of_sides(where: str, outer: set[str], inner: set[tuple[str, str]]) -> None:
    """A ValueError where sides of a split lie within the classes, or under names that only hold `train` or `test`."""
    within: dict[str, set[str]] = {}
    for first, second in inner:
        within.setdefault(first, set()).add(second)
    for name, folders in sorted(within.items()):
        if len(set(map(_side, folders))) > 1 and all(map(_side, folders)):
            if len(outer) == 1:
                raise ValueError(
                    f"{where}: the split {_names(folders)} lies in {printable(name)}; expected it outermost: give "
                    f"{where}/{printable(name)} as data.root"
                )
            raise ValueError(
                f"{where}: {printable(name)} holds the folders {_names(folders)}, named as sides of a split are; "
                f"expected the sides outermost and the classes within them, as in train/{printable(name)}: move "
                f"them, {_TABLE}"
            )
    others = {name for name in outer if not _side(name)}
    like = {name: side for name in others if (side := _like_a_side(name))}
    shared = set.intersection(*(within.get(name, set()) for name in like)) if len(set(like.values())) > 1 else set()
    if len(shared) > 1:
        raise ValueError(
            f"{where}: folders {_names(like)} look like sides of a split, for all hold {_names(shared)}; expected "
            f"sides called train, val and test: rename them, {_TABLE}"
        )
    everywhere = {frozenset(within.get(name, ())) for name in others}
    alike = next(iter(everywhere)) if len(everywhere) == 1 and len(others) > 1 and others == outer else frozenset()
    if len(alike) > 1 and all(re.search(r"[^\W\d_]", name) for name in alike):  # `0001-1000` is a stretch of files
        log.warning(
            "%s: folders %s are taken for the classes, and each holds %s; if those are the classes, they must stand "
            "outermost",
            where,
            _names(others),
            _names(alike),
        )


def _side(name: str) -> str:
    """The side of a split that a folder is called, or ""."""
    return SIDES.get(name.strip().lower(), "")


def _like_a_side(name: str) -> str:
    """The side that a word of a folder's name begins as, in English or German, or ""."""
    starts = {"train": "train", "val": "val", "eval": "val", "test": "test", "holdout": "test"}
    short = {"tr": "train", "trn": "train", "dev": "val", "te": "test", "tst": "test", "ts": "test"}
    for word in re.findall("[a-z]+", name.lower()):
        if side := short.get(word) or next((side for start, side in starts.items() if word.startswith(start)), ""):
            return side
    return ""


def _is_split(
    where: str, outer: set[str], inner: set[tuple[str, str]], sides: dict[str, str], images: Sequence[str]
) -> bool:
    """Whether the outermost folders are the sides of a split; a ValueError where they may be that or classes."""
    others = outer - sides.keys()
    if not sides or (len(outer) == 1):
        return False
    with_folders = {first for first, _ in inner} & sides.keys()
    if others:
        # One folder called `test` with nothing but images in it is a class of that name.
        if len(sides) == 1 and not with_folders:
            return False
        raise ValueError(
            f"{where}: folders {_names(sides)} are named as sides of a split are, but beside them lie "
            f"{_names(others)}; expected folders of one kind: move those of the other kind out of data.root, {_TABLE}"
        )
    direct = {path.split("/")[0] for path in images if path.count("/") == 1}
    if bare := (direct & sides.keys()) - with_folders:
        raise ValueError(
            f"{where}: folders {_names(outer)} are named as sides of a split are, but {_names(bare)} has no folders "
            f"of classes within; expected one a class in each; if they are classes, name them otherwise, {_TABLE}"
        )
    if len(set(sides.values())) < 2:
        raise ValueError(
            f"{where}: folders {_names(outer)} are all named as the {next(iter(sides.values()))} side of a split; "
            f"expected at least two sides: name them otherwise, {_TABLE}"
        )
    return True
