"""The cache of decoded images: a memory-mapped uint8 array, decoded once, keyed by what the data are.

Written under another name and renamed when complete, so a kill never leaves half a cache that is read. Each block has a
digest that is checked when the cache is opened; a cache without them, or a damaged one, is decoded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bmjax.config.data import DataConfig
from bmjax.data.dataset import Dataset
from bmjax.data.images.decode import decode_images
from bmjax.data.images.laboratories import VERSION as MATCHING
from bmjax.data.images.laboratories import check_laboratories, colours_of_all
from bmjax.data.images.stain import METHODS, normalised
from bmjax.data.progress import Meter
from bmjax.data.sources.listing import Listing, Seen, alike, read_each
from bmjax.environment import check_own_cache, why_foreign
from bmjax.files import mapped, seal, sealed_json, temporary_folder, unsealed_json

log = logging.getLogger(__name__)
VERSION = 2  # of decoding, resizing and the cache's layout; a change rebuilds every cache
Errors = dict[int, str]


def fingerprint(entries: Sequence[tuple[str, str, int]], image_size: int, stain: Sequence[object] = ()) -> str:
    """sha256 over (path, content hash, label) of every image in order, the image size, the version of decoding, and the
    stain's normalisation where there is one."""
    return hashlib.sha256(json.dumps([VERSION, image_size, entries, *stain]).encode()).hexdigest()


def hash_images(listing: Listing) -> list[str]:
    """sha256 of each file's bytes, by threads; "" where they can't be read, which decoding will name."""
    return read_each(listing, lambda data: hashlib.sha256(data).hexdigest(), "")


def stained(source: Iterable[np.ndarray | str], config: DataConfig) -> Iterable[np.ndarray | str]:
    """Images uint8 [h, w, 3], or reasons why there is none, with the stain normalised as configured."""
    return source if config.stain == "none" else normalised(source, config.stain, config.stain_reference)


def listed_dataset(listing: Listing, config: DataConfig, cache_dir: Path, *, progress: bool = True) -> Dataset:
    """The images of a listing, from the cache or decoded into it, as `config` says.

    Unreadable images are left out, and named in one warning and in `skipped`. One line of the log says how many files
    were seen and what became of them. Files are hashed at every call, so a
    changed file is never taken for its old self.

    Raises:
      ValueError: with `config.strict`, for unreadable images and for copies in two classes; always for a class all of
        whose images are unreadable.
    """
    if config.match_colours:
        check_laboratories(listing)
    digests = hash_images(listing)
    entries = list(zip(listing.ids, digests, listing.labels.tolist(), strict=True))
    stain = () if config.stain == "none" else (config.stain, config.stain_reference or METHODS[config.stain].reference)
    fields = _fields(listing, config)
    key = fingerprint(entries, config.image_size, (*stain, *([] if fields is None else [["fields", fields]])))
    source = stained(decode_images(listing.read, len(listing), config.image_size, fields), config)
    images, errors = cached(cache_dir, key, len(entries), config.image_size, source, progress)
    if errors:
        lines = "\n".join(f"  {os.path.join(listing.origin, listing.ids[i])}: {why}" for i, why in errors.items())
        message = f"{listing.origin}: {len(errors)} of {len(entries)} images can't be read:\n{lines}"
        if config.strict:
            raise ValueError(f"{message}\nexpected none, since data.strict is set")
        log.warning("%s\nThey are skipped.", message)
    kept = np.array([i for i in range(len(entries)) if i not in errors], np.int64)
    labels = listing.labels[kept]
    for label, name in enumerate(listing.classes):
        if not (labels == label).any():
            where = os.path.join(listing.origin, name)
            raise ValueError(f"{where}: none of its images can be read; expected at least one")
    if config.match_colours:
        check_laboratories(listing, kept.tolist())
        laboratories = [listing.laboratories[i] for i in kept]
        key, images = _matched(images, labels, laboratories, (cache_dir, key), progress)
    for one, other in alike(listing.classes):
        log.warning("%s: labels %r and %r are taken for two classes; are they one?", listing.origin, one, other)
    _check_one_label(listing, digests, config.strict)
    seen = listing.seen or Seen(files=len(entries))
    seen = dataclasses.replace(seen, used=len(kept), unreadable=len(errors))
    log.info("%s: %d classes; %s", listing.origin, len(listing.classes), seen)
    return Dataset(
        name=listing.name or Path(listing.origin).resolve().name,
        classes=listing.classes,
        images=images,
        labels=labels,
        ids=tuple(listing.ids[i] for i in kept),
        hashes=tuple(digests[i] for i in kept),
        fingerprint=key,
        skipped=tuple((listing.ids[i], reason) for i, reason in errors.items()),
        groups=tuple(listing.groups[i] for i in kept) if listing.groups else (),
        sides=tuple(listing.sides[i] for i in kept) if listing.sides else (),
    )


def _matched(
    images: np.ndarray, labels: np.ndarray, laboratories: Sequence[str], at: tuple[Path, str], progress: bool
) -> tuple[str, np.ndarray]:
    """(key, images uint8 [n, s, s, 3] in the colours of all laboratories [n]), from a cache of their own beside the one
    `at` a folder and key."""
    cache_dir, key = at
    key = hashlib.sha256(json.dumps([key, "match_colours", MATCHING, *laboratories]).encode()).hexdigest()
    maps = colours_of_all(images, labels, laboratories)
    changed = (maps[name](image) for name, image in zip(laboratories, images, strict=True))
    return key, cached(cache_dir, key, len(images), images.shape[1], changed, progress)[0]


def _fields(listing: Listing, config: DataConfig) -> list[float] | None:
    """The field of each image in its pixels; None where images are taken whole."""
    if not config.field_size:
        if any(listing.pixel_sizes):
            log.warning("%s gives pixel sizes; without data.field_size they are of no account", listing.origin)
        return None
    sizes = listing.pixel_sizes or [0.0] * len(listing)
    found = []
    for name, size in zip(listing.ids, sizes, strict=True):
        try:
            field = config.field_pixels(size)
        except ValueError as e:
            raise ValueError(f"{os.path.join(listing.origin, name)}: {e}") from e
        assert field is not None
        found.append(field)
    return found


def _check_one_label(listing: Listing, digests: Sequence[str], strict: bool) -> None:
    """Names copies of an image that stand in two classes; a ValueError with `strict`."""
    first: dict[str, int] = {}
    pairs = []
    for i, digest in enumerate(digests):
        if digest and listing.labels[first.setdefault(digest, i)] != listing.labels[i]:
            pairs.append((first[digest], i))
    if not pairs:
        return
    classes = [listing.classes[label] for label in listing.labels]
    named = "; ".join(f"{listing.ids[a]} in {classes[a]} and {listing.ids[b]} in {classes[b]}" for a, b in pairs[:5])
    message = (
        f"{listing.origin}: {len(pairs)} images are copies of one in another class: {named}{'; ...' * (len(pairs) > 5)}"
    )
    if strict:
        raise ValueError(f"{message}; expected one class for each image, since data.strict is set")
    log.warning("%s", message)


def cached(
    cache_dir: Path, key: str, n: int, size: int, source: Iterable[np.ndarray | str], progress: bool = True
) -> tuple[np.ndarray, Errors]:
    """(images uint8 [n', size, size, 3], memory-mapped; {place in source: reason}) for what `source` holds.

    Read from the cache, or taken from `source`, which gives n images uint8 [size, size, 3] or the reason why there is
    none; the n' images there are stand in its order.

    Raises:
      OSError: the disk is full.
      PermissionError: the cache is not this user's alone.
    """
    check_own_cache(cache_dir)
    folder = cache_dir / key[:32]
    found = _read(folder, n, size)
    if found is not None:
        return found
    with temporary_folder(cache_dir, key[:32], n * size * size * 3, "decoded images") as temporary:
        errors = _fill(temporary / "images.npy", n, size, source, progress)
        seal(temporary / "images.npy")
        (temporary / "skipped.json").write_text(sealed_json(list(errors.items())))
        # Another run may have made the same meanwhile; what it made is as good and may be in use.
        if _read(folder, n, size) is None:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    found = _read(folder, n, size)
    if found is None:
        raise OSError(f"{folder} was removed while it was written; is another program emptying the cache?")
    return found


def _fill(path: Path, n: int, size: int, source: Iterable[np.ndarray | str], progress: bool) -> Errors:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, size, size, 3))
    errors: Errors = {}
    with Meter("images", n, "image", quiet=not progress) as meter:
        for i, image in enumerate(source):
            if isinstance(image, str):
                errors[i] = image
            else:
                out[i - len(errors)] = image
            meter.to(i + 1)
    out.flush()
    if errors:  # The file's head says n, so what is there moves into a file of its own.
        short = path.with_name("short.npy")
        kept = np.lib.format.open_memmap(short, mode="w+", dtype=np.uint8, shape=(n - len(errors), size, size, 3))
        for start in range(0, len(kept), 256):
            kept[start : start + 256] = out[start : min(start + 256, len(kept))]
        kept.flush()
        os.replace(short, path)
    return errors


def _read(folder: Path, n: int, size: int) -> tuple[np.ndarray, Errors] | None:
    """What the cache holds; None where it isn't there or is damaged."""
    try:
        if why := why_foreign(folder):
            raise ValueError(f"it {why}")
        skipped = unsealed_json((folder / "skipped.json").read_text("utf-8"))
        errors = {i: str(reason) for i, reason in skipped}
        if len(errors) < len(skipped) or not all(type(i) is int and 0 <= i < n for i in errors):
            raise ValueError(f"skipped.json names images {list(errors)[:5]}; expected 0 to {n - 1}, each once")
        if n == len(errors):
            return np.zeros((0, size, size, 3), np.uint8), errors
        images = mapped(folder / "images.npy", sealed=True)
        if images.shape == (n - len(errors), size, size, 3) and images.dtype == np.uint8:
            return images, errors
        reason = f"{images.dtype} {images.shape}"
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError, RecursionError) as e:
        reason = str(e)
    log.warning("%s: damaged (%s); rebuilt", folder, reason)
    return None
