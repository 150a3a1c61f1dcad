"""Loads the dataset that a configuration names."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config.arguments import check_type
from bmjax.config.data import DataConfig
from bmjax.data.dataset import Dataset
from bmjax.data.images.arrays import check_images
from bmjax.data.images.cache import listed_dataset, stained
from bmjax.data.images.decode import decode_files, resize_images
from bmjax.data.sources.archive import list_archive
from bmjax.data.sources.folder import list_folder
from bmjax.data.sources.huggingface import list_huggingface
from bmjax.data.sources.listing import Listing
from bmjax.data.sources.synthetic import synthetic_dataset
from bmjax.data.sources.table import list_table
from bmjax.data.sources.tfds import list_tfds
from bmjax.data.splits import NAMES
from bmjax.environment import cache_folder
from bmjax.files import printable
from bmjax.registry import explain_error, is_own, load_own, source_file

log = logging.getLogger(__name__)
_SOURCES: dict[str, Callable[..., Listing]] = {
    "folder": list_folder,
    "table": list_table,
    "archive": list_archive,
    "tfds": list_tfds,
    "huggingface": list_huggingface,
}


def list_source(config: DataConfig, **options: int) -> Listing:
    """The images that a configuration names, none of them read yet but the first of a source of one's own; not for
    rendered cells. `options` go to the source.

    Raises:
      FileNotFoundError, ValueError: they are not there or not as expected; names the place.
    """
    if config.source == "arrays":
        raise ValueError("config field 'data.source' is 'arrays', images given from Python; expected them as `data`")
    if not is_own(config.source):
        return _SOURCES[config.source](config.root, **options)
    source = load_own("data source", config.source, callable, "a function of root that gives a bmjax.Listing")
    try:
        listing = source(config.root)
    except Exception as e:
        why = explain_error(e, source_file(config.source) or config.source)
        kind = FileNotFoundError if isinstance(e, FileNotFoundError) else ValueError
        raise kind(
            f"config field 'data.source' is {config.source!r}, which raised an error for data.root {config.root!r}: "
            f"{why}; expected a bmjax.Listing"
        ) from e
    if not isinstance(listing, Listing):
        raise ValueError(f"data source {config.source!r} gives {listing!r}; expected a bmjax.Listing")
    return _checked(config.source, listing, options.get("fewest", 2))


def check_sides(config: DataConfig, needed: Sequence[str], by: str) -> None:
    """Refuses data whose split leaves no image to a side that a verb, `by`, goes by: nothing is read but names. What a
    manifest gives is not known yet, and passes.

    Raises:
      ValueError: names the field, its value and the side.
    """
    empty = [side for side, share in zip(NAMES, config.split, strict=True) if side in needed and not share]
    if config.folds:
        empty = [side for side in empty if side != "test"]
    if not empty or config.manifest or config.source == "arrays":
        return
    if config.source != "synthetic":  # a source may bring a split of its own
        given = set(list_source(config).sides)
        empty = [side for side in empty if side not in given]
    if empty:
        raise ValueError(
            f"config field 'data.split' is {config.split!r}, which leaves no image to {' and '.join(empty)}; "
            f"{by} goes by {' and '.join(needed)}, so expected shares above 0 there, as in 0.7 0.15 0.15"
        )


_SINGULAR = {"ids": "an id", "classes": "a class", "groups": "a group", "sides": "a side"}
_SINGULAR |= {"laboratories": "a laboratory", "pixel_sizes": "a pixel size"}


def _checked(source: str, listing: Listing, fewest: int = 2) -> Listing:
    """A listing of a source of one's own, whose parts fit together, and whose first image is read; `bmjax check` looks
    at more.

    Raises:
      ValueError: names the part.
    """

    def check(condition: bool, found: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"data source {source!r}: {found}; expected {expected}")

    parts: dict[str, tuple[Any, ...]] = {}
    for name, one in _SINGULAR.items():
        given = getattr(listing, name)
        given = given.tolist() if hasattr(given, "tolist") else given  # NumPy's, pandas's
        listed = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
        check(listed, f"{name} are {_shown(given)}", "a tuple")
        parts[name] = found = tuple(given)
        if name != "pixel_sizes":
            odd = [value for value in found if not isinstance(value, str)]
            check(not odd, f"{one} is {_shown(odd[0]) if odd else ''}", "text")
        if name in ("ids", "classes") and len(set(found)) < len(found):
            twice = next(value for value, times in collections.Counter(found).items() if times > 1)
            check(False, f"{one} comes twice, {twice!r}", f"{name} that differ")
    n, k = len(parts["ids"]), len(parts["classes"])
    check(n > 0, "it lists no image", "at least one")
    check(k >= fewest and all(parts["classes"]), f"the classes are {parts['classes']!r}", f"at least {fewest} names")
    try:
        labels = np.asarray(listing.labels)
        parts["labels"] = tuple(labels) if labels.ndim else ()
    except (ValueError, TypeError) as e:  # rows of several lengths
        raise ValueError(f"data source {source!r}: labels are {_shown(listing.labels)}; expected int [{n}]") from e
    for name in ("labels", "groups", "sides", "pixel_sizes", "laboratories"):
        many = len(parts[name])
        check(many == n or not (many or name == "labels"), f"{many} {name} for {n} ids", f"{n}, one an image")
    odd = [side for side in parts["sides"] if side not in ("", *NAMES)]
    check(not odd, f"a side is {odd[0] if odd else ''!r}", "'train', 'val', 'test' or ''")
    odd = [size for size in parts["pixel_sizes"] if not _is_pixel_size(size)]
    check(not odd, f"a pixel size is {_shown(odd[0]) if odd else ''}", "micrometres, such as 0.1, or 0")
    check(isinstance(listing.origin, (str, os.PathLike)), f"origin is {_shown(listing.origin)}", "text")
    check(isinstance(listing.name, str), f"name is {_shown(listing.name)}", "text")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (n and not (labels.min() >= 0 and labels.max() < k)):
        shown = f"{labels.dtype} {list(labels.shape)}" + (
            f" from {labels.min()} to {labels.max()}" if n and labels.dtype.kind in "iuf" else ""
        )
        raise ValueError(f"data source {source!r}: labels are {shown}; expected int [{n}], 0 to {k - 1}")
    _read_one(source, listing.read, 0)
    return dataclasses.replace(
        listing,
        origin=os.fspath(listing.origin),
        labels=labels.astype(np.int32),
        read=functools.partial(_read_or_refuse, source, listing.read),
        **{name: parts[name] for name in _SINGULAR if name != "pixel_sizes"},
        pixel_sizes=tuple(map(float, parts["pixel_sizes"])),
    )


def _shown(value: object) -> str:
    """A value in an error, cut where it is long."""
    return " ".join(repr(value).split())[:80]


def _is_pixel_size(size: Any) -> bool:
    number = isinstance(size, (int, float, np.integer, np.floating)) and not isinstance(size, bool)
    return number and bool(0 <= size < 1000)


def _read_one(source: str, read: Callable[[int], bytes], i: int) -> None:
    """Reads one image of a source of one's own; that there may be none is left to decoding.

    Raises:
      ValueError: `read` can't be called, or gives or raises something else than it may.
    """
    if not callable(read):
        raise ValueError(f"data source {source!r}: read is {_shown(read)}; expected a function of a number")
    try:
        _read_or_refuse(source, read, i)
    except _OwnReadError:
        raise
    except (ValueError, OSError):
        pass


class _OwnReadError(ValueError):
    """A `read` of a source of one's own did what none may."""


def _read_or_refuse(source: str, read: Callable[[int], bytes], i: int) -> bytes:
    try:
        data = read(i)
    except (ValueError, OSError):
        raise
    except Exception as e:
        why = explain_error(e, source_file(source) or source)
        raise _OwnReadError(f"data source {source!r}: read({i}) raised an error: {why}; expected bytes") from e
    if not isinstance(data, bytes):
        raise _OwnReadError(f"data source {source!r}: read({i}) gives {_shown(data)}; expected bytes, as of a file")
    return data


def load_dataset(config: DataConfig, *, progress: bool = True) -> Dataset:
    """The dataset a configuration names, from the cache where it has been decoded before.

    Raises:
      FileNotFoundError, ValueError: it is not there or not as expected; names the place.
      TypeError: an argument is of another type.
    """
    check_type("config", config, DataConfig, "a bmjax.config.DataConfig; that of a Config is its field data")
    check_type("progress", progress, bool, "True or False")
    cache_dir = _cache_dir(config)
    if config.source == "synthetic":
        if config.field_size:
            raise ValueError(f"config field 'data.field_size' is {config.field_size}; expected 0 for rendered cells")
        if config.stain != "none":
            raise ValueError(f"config field 'data.stain' is {config.stain!r}; expected 'none' for rendered cells")
        return synthetic_dataset(config.synthetic_per_class, config.image_size, cache_dir, progress=progress)
    return listed_dataset(list_source(config), config, cache_dir, progress=progress)


def _cache_dir(config: DataConfig) -> Path:
    """The folder of caches, which is made here.

    Raises:
      OSError: it can't be; names the field.
    """
    if not config.cache_dir:
        return cache_folder() / "images"
    try:
        os.makedirs(config.cache_dir, exist_ok=True)
    except OSError as e:
        raise type(e)(
            f"config field 'data.cache_dir' is {config.cache_dir!r}, which can't be made ({e.strerror}); expected a "
            "folder that can be written"
        ) from e
    return Path(config.cache_dir)


def with_usable_cache(config: DataConfig, of: object) -> DataConfig:
    """A run's data with this user's cache where that of the training machine can't be made here, which is said; `of`:
    the run's folder."""
    try:
        _cache_dir(config)
    except OSError:
        log.warning("%s: data.cache_dir %r can't be made here; this user's cache is used", of, config.cache_dir)
        return dataclasses.replace(config, cache_dir="")
    return config


def load_elsewhere(config: DataConfig, classes: Sequence[str]) -> Dataset:
    """As `load_dataset`, of a folder or a table that is judged and not trained on: one class is enough, of `classes`,
    and no laboratory is brought to others' colours.

    Raises:
      FileNotFoundError, ValueError: it is not there or not as expected, or of none of these classes; names the place.
    """
    config, listing = dataclasses.replace(config, match_colours=False), list_source(config, fewest=1)
    if not set(listing.classes) & set(classes):
        raise ValueError(
            f"{config.root} has the classes {', '.join(map(printable, listing.classes))}; expected some of the run's: "
            f"{', '.join(map(printable, classes))}"
        )
    return listed_dataset(listing, config, _cache_dir(config))


def read_files(paths: Sequence[str | Path], config: DataConfig) -> Iterable[np.ndarray | str]:
    """Files as `load_dataset` would read them: uint8 RGB [h, w, 3], or the reason why one can't be read."""
    return stained(decode_files(paths, config.image_size, config.field_pixels()), config)


def read_arrays(images: Any, config: DataConfig) -> np.ndarray:
    """Images uint8 RGB [n, h, w, 3] as `load_dataset` would read them from files: [n, s, s, 3], s the size configured.

    Those of size s are taken as read already, their stain normalised; they are not copied. Others are resized, and
    their stain is normalised as configured.

    Raises:
      TypeError, ValueError: they are not such images; names the remedy.
    """
    images, size = check_images(images), config.image_size
    if images.shape[1:3] == (size, size):
        return images
    read = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(stained(resize_images(images, size, config.field_pixels()), config)):
        read[i] = image
    return read
