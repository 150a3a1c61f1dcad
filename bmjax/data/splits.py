"""Train, validation and test: stable when files are added, what belongs together on one side, kept as a manifest.

A unit is what must stay on one side: copies of an image, near duplicates that are given as such, and where asked for
all images of a group or a block of file numbers. Each unit has a key that doesn't depend on other units, a number in
0..1 drawn from the key and the seed alone, and its side by where that number falls.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bmjax.config.arguments import check_type
from bmjax.config.data import DataConfig
from bmjax.data.dataset import Dataset
from bmjax.data.groups import connected
from bmjax.data.sources.columns import read_columns
from bmjax.data.sources.labels import known
from bmjax.files import write_text

log = logging.getLogger(__name__)
NAMES = ("train", "val", "test")
_FREE = -1  # the side of what no one has assigned


@dataclasses.dataclass(frozen=True)
class Splits:
    """Rows of a dataset, int64, sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def equals(self, other: Splits) -> bool:
        """Whether both put every row on the same side."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("train", "val", "test"))


@dataclasses.dataclass(frozen=True)
class _Units:
    """`of_row` int [n]: each row's unit; by unit its key and the side given for it, or _FREE; the same by row."""

    of_row: np.ndarray
    keys: list[str]
    given: np.ndarray
    given_rows: np.ndarray


def draw(key: str, seed: int) -> float:
    """A number in 0..1, 1 excluded, by a hash of seed and key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode(errors="surrogatepass")).digest()[:8], "big") / 2**64


def side_of(key: str, seed: int, shares: tuple[float, float, float]) -> int:
    """0, 1 or 2 for train, val or test, by `draw`."""
    u = draw(key, seed)
    return int(u >= shares[0]) + int(u >= _end_of_val(np.array(shares)))


def _end_of_val(shares: np.ndarray) -> np.ndarray:
    """Where in 0..1 the test split begins, of shares [..., 3]; nowhere if it has none, whatever sums round to."""
    return np.where(shares[..., 2] > 0, shares[..., 0] + shares[..., 1], 2.0)


def cross_validation(folds: int, repeats: int = 1) -> Iterator[dict[str, Any]]:
    """What an experiment's `sweep()` yields for repeated k-fold cross-validation: overrides, one a fold and repeat."""
    for repeat in range(repeats):
        for fold in range(folds):
            yield {"data.folds": folds, "data.fold": fold, "data.split_seed": repeat}


def _numbered(names: Iterable[str]) -> np.ndarray:
    """0 for the first name and its equals, 1 for the next, ..."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _block(path: str, size: int) -> str:
    """What comes before the last number in a file's name, and that number's block."""
    found = re.fullmatch(r"(.*?)(\d+)\D*", PurePosixPath(path).stem, re.DOTALL)
    if found is None:
        raise ValueError(f"{path}: no number in the file's name; expected one, since data.split_by is 'block'")
    return f"{found[1]}{int(found[2]) // size}"


def _keys(dataset: Dataset, config: DataConfig) -> Sequence[str]:
    """The key of each row by `config.split_by`."""
    if config.split_by == "image":
        return dataset.hashes
    if config.split_by == "block":
        names = [dataset.classes[label] for label in dataset.labels]
        return [f"{c} {_block(path, config.block_size)}" for c, path in zip(names, dataset.ids, strict=True)]
    without = (
        [path for path, group in zip(dataset.ids, dataset.groups, strict=True) if not group] if dataset.groups else []
    )
    if without or not dataset.groups:
        which = f"{len(without)} images, the first {without[0]!r}, have" if without else f"{dataset.name} has"
        raise ValueError(f"{which} no group; expected one for each image, since data.split_by is 'group'")
    return dataset.groups


def _duplicates(path: str, dataset: Dataset) -> list[str]:
    """The group of near duplicates of each row, or the row's own hash."""
    columns = read_columns(path, ("path", "group"))
    rows = {name: i for i, name in enumerate(dataset.ids)}
    groups = list(dataset.hashes)
    _check_once(path, columns["path"])
    for row, (name, group) in enumerate(zip(columns["path"], columns["group"], strict=True), 1):
        if name not in rows:
            raise ValueError(f"{path}: {name!r} is no image of {dataset.name}; expected only images that are")
        if not known(group):
            raise ValueError(f"{path}: row {row}, column group: {group!r}; expected a group, or no row for the image")
        groups[rows[name]] = f"group {group}"
    return groups


def _check_once(path: str | Path, names: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for row, name in enumerate(names, 1):
        if (first := seen.setdefault(name, row)) != row:
            raise ValueError(f"{path}: {name!r} stands in rows {first} and {row}; expected one row an image")


def _units(dataset: Dataset, config: DataConfig) -> _Units:
    """What stays together, and the sides that the source or a manifest gives."""
    n, keys = len(dataset), _keys(dataset, config)
    relations = [keys]
    if config.split_by != "image":
        relations.append(dataset.hashes)
    if config.duplicates:
        relations.append(_duplicates(config.duplicates, dataset))
    # A graph of rows and of what they share; who is connected stays together.
    ends, n_nodes = [], n
    for relation in relations:
        numbers = _numbered(relation)
        ends.append(numbers + n_nodes)
        n_nodes += int(numbers.max(initial=-1)) + 1
    rows, shared = np.tile(np.arange(n), len(relations)), np.concatenate(ends)
    of_row = _numbered(connected(n_nodes, rows, shared)[:n].tolist())

    given_rows = _read_sides(config.manifest, dataset) if config.manifest else np.full(n, _FREE)
    if dataset.sides:
        if config.folds:
            raise ValueError(f"{dataset.name} comes with a split; expected data.folds to be 0, not {config.folds}")
        own = np.array([NAMES.index(side) if side else _FREE for side in dataset.sides])
        given_rows = np.where(given_rows == _FREE, own, given_rows)
    # The least key: it changes only when a new image joins the unit, and says nothing of the number drawn from it.
    least: dict[int, str] = {}
    given = np.full(int(of_row.max(initial=-1)) + 1, _FREE)
    torn: list[int] = []
    first: dict[int, int] = {}  # of each unit, a row with the unit's side
    for row, (unit, key, side) in enumerate(zip(of_row.tolist(), keys, given_rows.tolist(), strict=True)):
        least[unit] = min(key, least.get(unit, key))
        if given[unit] == _FREE:
            given[unit] = side
            first[unit] = row
        elif side not in (_FREE, given[unit]):
            torn.append(row)
    if torn:
        named = [
            f"{dataset.ids[row]!r} in {NAMES[given_rows[row]]} and {dataset.ids[other]!r} in {NAMES[given_rows[other]]}"
            for row in torn[:5]
            for other in (first[of_row[row]],)
        ]
        message = (
            f"{dataset.name}: {len(torn)} images stand on another side than their copies, near duplicates or group in "
            f"the split that is given: {'; '.join(named)}{'; ...' if len(torn) > 5 else ''}"
        )
        if config.strict:
            raise ValueError(f"{message}; expected what belongs together on one side, since data.strict is set")
        log.warning("%s; figures on such a split are too good", message)
    return _Units(of_row, [least[unit] for unit in range(len(given))], given, given_rows)


def kept_together(dataset: Dataset, config: DataConfig) -> np.ndarray:
    """The number of the unit of each row, int [n]: rows of one unit stand on one side of every split under `config`.

    Raises:
      ValueError: as `split_dataset`.
    """
    return _units(dataset, config).of_row


def _sides(places: np.ndarray, shares: np.ndarray, config: DataConfig) -> np.ndarray:
    """The side of each place in 0..1; shares [..., 3] sum to 1."""
    if not config.folds:
        return (places >= shares[..., 0]).astype(int) + (places >= _end_of_val(shares))
    # Folds are equal stretches of 0..1. Those after the test fold, taken round, begin with the validation split.
    along = (places * config.folds - config.fold - 1) % config.folds
    val = config.split[1] / (config.split[0] + config.split[1])
    is_test = np.floor(places * config.folds) == config.fold
    return np.where(is_test, 2, (along < val * (config.folds - 1)).astype(int))


def _assign(labels: np.ndarray, classes: int, units: _Units, config: DataConfig) -> np.ndarray:
    """The side of each row: as given, or with its unit by the number drawn, or by its place in its class's order."""
    places = np.array([draw(key, config.split_seed) for key in units.keys])
    shares = np.array(config.split)
    free = units.given == _FREE
    if config.stratify:
        table = np.zeros((len(free), classes), np.int64)
        np.add.at(table, (units.of_row, labels), 1)
        size, kind = table.sum(1), table.argmax(1)  # a unit of several classes counts for its commonest
        shares = np.tile(shares, (len(free), 1))
        for label in range(classes):
            mine = np.flatnonzero(free & (kind == label))
            mine = mine[np.argsort(places[mine], kind="stable")]
            places[mine] = (np.cumsum(size[mine]) - size[mine] / 2) / max(size[mine].sum(), 1)
            # What is given already counts towards the shares; the rest makes up for what each side lacks.
            has = np.array([table[units.given == side, label].sum() for side in range(3)])
            lacks = np.maximum(np.array(config.split) * table[:, label].sum() - has, 0)
            if lacks.any():
                shares[mine] = lacks / lacks.sum()
    of_unit = np.where(free, _sides(places, shares, config), units.given)
    return np.where(units.given_rows == _FREE, of_unit[units.of_row], units.given_rows)


def _needed(config: DataConfig) -> list[int]:
    """The sides in which every class must have an image: those that have a share, and in folds test."""
    return [k for k in range(3) if config.split[k] > 0 or (k == 2 and config.folds)]


def _seed_that_works(dataset: Dataset, units: _Units, config: DataConfig) -> int | None:
    """The first of a few hundred seeds under which every class has an image in every split."""
    sizes = np.bincount(dataset.labels, minlength=len(dataset.classes))
    # Large classes nearly never decide; leaving them out keeps the search short.
    small = np.flatnonzero(sizes[dataset.labels] <= max(100, sizes.min()))
    chosen, of_row = np.unique(units.of_row[small], return_inverse=True)
    few = dataset.labels[small]
    part = _Units(of_row, [units.keys[i] for i in chosen], units.given[chosen], units.given_rows[small])
    needed = {(label, side) for label in set(few.tolist()) for side in _needed(config)}
    for seed in range(300):
        side = _assign(few, len(dataset.classes), part, dataclasses.replace(config, split_seed=seed))
        if set(zip(few.tolist(), side.tolist(), strict=True)) >= needed:
            return seed
    return None


def split_dataset(dataset: Dataset, config: DataConfig) -> Splits:
    """Splits as `config` says: shares or folds, by image, group or block, stratified or not, grown from a manifest.

    The side of a unit depends on its key and the seed alone: adding files moves none, unless they join units into one.
    The price is that each class has its shares up to binomial noise. Stratified it has them exactly, and added files
    move those whose place in the class's order comes to lie beyond a bound; a manifest holds them where they were.

    Raises:
      FileNotFoundError: the manifest or the list of duplicates is not there.
      TypeError: an argument is of another type.
      ValueError: a class has no image in one of the splits; a group or a file number is missing; a manifest or a list
        of duplicates is of other data; with `config.strict`, a split that is given tears apart what belongs together.
    """
    check_type("dataset", dataset, Dataset, "a bmjax.Dataset")
    check_type("config", config, DataConfig, "a bmjax.config.DataConfig; that of a Config is its field data")
    units = _units(dataset, config)
    side = _assign(dataset.labels, len(dataset.classes), units, config)
    for label, name in enumerate(dataset.classes):
        for k in _needed(config):
            split = NAMES[k]
            if not ((dataset.labels == label) & (side == k)).any():
                n = int((dataset.labels == label).sum())
                other = _seed_that_works(dataset, units, config)
                advice = "add images" if other is None else f"add images, or set data.split_seed to {other}"
                if (units.given != _FREE).all():
                    advice = "the split that is given has none, so leave some of its images without a side"
                raise ValueError(
                    f"class {name!r} ({n} images) has none in the {split} split; expected at least one under "
                    f"data.split {config.split} and data.split_seed {config.split_seed}: {advice}"
                )
    return Splits(*(np.flatnonzero(side == k) for k in range(3)))


def write_split(path: str | Path, dataset: Dataset, splits: Splits) -> None:
    """The split as a manifest, CSV: path, sha256, label, group, split."""
    side = {int(i): name for name in NAMES for i in getattr(splits, name)}
    groups = dataset.groups or [""] * len(dataset)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "sha256", "label", "group", "split"))
    for i, (name, digest, group) in enumerate(zip(dataset.ids, dataset.hashes, groups, strict=True)):
        writer.writerow((name, digest, dataset.classes[dataset.labels[i]], group, side[i]))
    # File names need not be valid text.
    write_text(Path(path), text.getvalue(), errors="surrogateescape")


def groups_in(path: str | Path, ids: Sequence[str]) -> list[str]:
    """The group (patient, slide) of each image by a manifest; empty where it names none, or where there is no file."""
    if not Path(path).is_file():
        return []
    columns = read_columns(path, ("path",), ("group",))
    group = dict(zip(columns["path"], columns["group"], strict=True))
    groups = [group.get(str(name), "") for name in ids]
    return groups if any(groups) else []


def sides_of(path: str | Path, hashes: Sequence[str]) -> list[str]:
    """The side that a manifest gives images of each sha256, wherever the file lies now; "" for others, and where there
    is no manifest."""
    if not Path(path).is_file():
        return [""] * len(hashes)
    columns = read_columns(path, ("sha256", "split"))
    side = dict(zip(columns["sha256"], columns["split"], strict=True))
    return [side.get(digest, "") for digest in hashes]


def _read_sides(path: str | Path, dataset: Dataset) -> np.ndarray:
    """The side that a manifest gives each row, int [n], or _FREE."""
    columns = read_columns(path, ("path", "sha256", "label", "split"))
    _check_once(path, columns["path"])
    rows = {name: i for i, name in enumerate(dataset.ids)}
    side = np.full(len(dataset), _FREE)
    for name, *found in zip(*columns.values(), strict=True):
        if name not in rows:
            raise ValueError(f"{path}: {name!r} is no image of {dataset.name}; expected only images that are")
        i = rows[name]
        if found[:2] != [dataset.hashes[i], dataset.classes[dataset.labels[i]]] or found[2] not in NAMES:
            expected = f"{dataset.hashes[i]}, {dataset.classes[dataset.labels[i]]} and one of {', '.join(NAMES)}"
            raise ValueError(f"{path}: {name!r} is {', '.join(found)}; expected {expected}")
        side[i] = NAMES.index(found[2])
    return side


def read_split(path: str | Path, dataset: Dataset) -> Splits:
    """`write_split`'s file -> the split, as rows of `dataset`.

    Raises:
      ValueError: the file is not of these images; names the first that differs.
    """
    side = _read_sides(path, dataset)
    if (side == _FREE).any():
        name = dataset.ids[int(np.argmax(side == _FREE))]
        raise ValueError(f"{path}: {name!r} is not there; expected every image of {dataset.name}")
    return Splits(*(np.flatnonzero(side == k) for k in range(3)))


def dataset_summary(dataset: Dataset, splits: Splits) -> dict[str, Any]:
    """What a run records of its data, fit for JSON; `copies` are images whose bytes another one has too."""
    counts = {
        name: np.bincount(dataset.labels[getattr(splits, name)], minlength=len(dataset.classes)) for name in NAMES
    }
    return {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "n": len(dataset),
        "image_size": int(dataset.images.shape[1]),
        "fingerprint": dataset.fingerprint,
        "counts": {name: dict(zip(dataset.classes, map(int, c), strict=True)) for name, c in counts.items()},
        "copies": len(dataset) - len(set(dataset.hashes)),
        "groups": len(set(dataset.groups)),
        "skipped": [list(entry) for entry in dataset.skipped],
    }
