"""Zip and tar files, read in place: nothing is unpacked, so nothing can land where it shouldn't."""

from __future__ import annotations

import collections
import itertools
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bmjax.data.images.decode import MAX_BYTES
from bmjax.data.sources.layout import arrange
from bmjax.data.sources.listing import Listing, Seen, why_folder_passed_over, why_passed_over
from bmjax.files import printable, reading

Read = Callable[[], bytes]


class _Members(NamedTuple):
    """The files, the folders that have an entry of their own, and of a zip the checks of the files' names."""

    reads: dict[str, Read]
    folders: set[str]
    checks: dict[str, Callable[[], None]]


def list_archive(path: str | Path) -> Listing:
    """A .zip or uncompressed .tar whose folders are classes or sides, as in `list_folder`; ids are paths in it.

    Folders that all images have in common are passed over: the classes are those below. Archives inside the archive,
    and other files that aren't images, are not opened. Backslashes, as Windows writes them, count as slashes.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such an archive, or it holds a link, an encrypted file, a path that is absolute or leads out of
        it, or fewer than two classes; names the member.
    """
    if not str(path) or not Path(path).is_file():
        raise FileNotFoundError(f"config field 'data.root' is {str(path)!r}; expected a .zip or .tar file")
    path = Path(path)
    with reading(path, "zip or tar file"):
        if zipfile.is_zipfile(path):
            members, folders, checks = _zip_members(path)
        elif _is_tar(path):
            members, folders, checks = _tar_members(path)
        else:
            raise ValueError(f"{path}: neither a zip nor a tar file; expected one of them")
    reasons = {name: why_passed_over(name) for name in members}
    images = sorted(name for name, reason in reasons.items() if not reason)
    # Sorted paths have in common what the first and the last have.
    ends = [name.split("/")[:-1] for name in (images[:1] + images[-1:])]
    depth = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
    above = "".join(f"{part}/" for part in ends[0][:depth]) if ends else ""
    inner = [name.removeprefix(above) for name in images]
    folders |= {posixpath.dirname(name) for name in members}
    folders = {name for name in folders if not any(map(why_folder_passed_over, name.split("/")))}
    below = {name.removeprefix(above) for name in folders if name.startswith(above)} - {""}
    tops = sorted({name.split("/")[0] for name in inner if "/" in name})
    if len(tops) < 2:
        found = ", ".join(map(printable, tops)) or "none"
        raise ValueError(f"{path}: folders of images found: {found}; expected at least two")
    layout = arrange(str(path), inner, below)
    ids = [above + inside for inside in layout.ids]
    # Never opened later, so a damaged name would lose an image without a word.
    for name in sorted(checks.keys() & (set(images) - set(ids))):
        checks[name]()
    counts = collections.Counter(reason for reason in reasons.values() if reason)
    seen = Seen(len(members), len(ids), outside=len(images) - len(ids), **counts)
    reads = [members[name] for name in ids]
    labels = np.array(layout.labels, np.int32)
    return Listing(
        str(path), layout.classes, tuple(ids), labels, lambda i: reads[i](), sides=tuple(layout.sides), seen=seen
    )


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (ValueError, OverflowError, EOFError):  # numbers in the first header that no file has
        return False


def _check_name(archive: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{archive}: member {name!r} is absolute or leads out of the archive; expected none that does")


def _plain(name: str) -> str:
    """A member's name with slashes alone and without parts that say nothing: `.\\A\\0.png` -> `A/0.png`."""
    return posixpath.normpath(name.replace("\\", "/"))


def _limited(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes; expected at most {MAX_BYTES}")


def _zip_members(path: Path) -> _Members:
    try:
        archive = zipfile.ZipFile(path)  # stays open: it is read by many threads until the listing is gone
    except zipfile.BadZipFile as e:
        raise ValueError(f"{path}: {e}") from e
    found = _Members({}, set(), {})
    for info in archive.infolist():
        _check_name(path, info.filename)
        name = _plain(info.filename)
        if b"PK\x01\x02" in info.comment + info.extra:
            raise ValueError(f"{path}: member {info.filename!r} swallows the one after it: the list is damaged")
        if why_passed_over(name):  # never opened, so a damaged name would lose an image without a word
            _check_entry(path, info)
        if info.filename.endswith(("/", "\\")):
            found.folders.add(name)
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"{path}: member {info.filename!r} is a link; expected files only")
        if info.flag_bits & 1:
            raise ValueError(f"{path}: member {info.filename!r} is encrypted; expected files that can be read")
        if name in found.reads:
            raise ValueError(f"{path}: member {info.filename!r} is there twice; expected one of a name")
        found.reads[name] = lambda info=info: _read_zipped(archive, info)
        found.checks[name] = lambda info=info: _check_entry(path, info)
    return found


def _check_entry(path: Path, info: zipfile.ZipInfo) -> None:
    """Holds a member's name in the list at the archive's end to the name before its bytes."""
    with path.open("rb") as f:
        f.seek(info.header_offset)
        head = f.read(30)
        name = f.read(int.from_bytes(head[26:28], "little"))
    if name.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") != info.orig_filename:
        raise ValueError(f"{path}: member {info.filename!r} is {name!r} before its bytes; expected one name")


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    _limited(info.file_size)  # what it unpacks to; zipfile stops there, whatever the compressed bytes go on to say
    try:
        return archive.read(info)
    # zlib.error, LZMAError, EOFError, NotImplementedError, RuntimeError: each way of packing has its own.
    except Exception as e:
        raise ValueError(f"{info.filename}: damaged in the archive: {str(e) or type(e).__name__}") from e


def _tar_members(path: Path) -> _Members:
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115  (its file is closed below)
    except tarfile.ReadError as e:
        raise ValueError(f"{path}: a compressed tar has no random access; expected a plain .tar or a .zip") from e
    found = _Members({}, set(), {})
    with archive:
        for info in _infos(path, archive):
            _check_name(path, info.name)
            if info.isdir():
                found.folders.add(_plain(info.name))
                continue
            if not info.isreg() or info.issparse():
                raise ValueError(f"{path}: member {info.name!r} is a link or a device; expected files only")
            # Of two of a name the later one counts, as in unpacking.
            found.reads[_plain(info.name)] = lambda info=info: _read_tarred(path, info)
    return found


def _infos(path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members; a ValueError where the archive breaks off, which tarfile takes for its end between two members."""
    last, length = -1, path.stat().st_size
    try:
        for info in archive:
            # A negative size sends tarfile back to where it was, for ever.
            if info.size < 0 or info.offset_data <= last or info.offset_data + (info.isreg() and info.size) > length:
                raise ValueError(
                    f"{path}: member {info.name!r} of {info.size} bytes at {info.offset_data} is not within the file's "
                    f"{length}: unexpected end of data, or a damaged header"
                )
            last = info.offset_data
            yield info
    except (tarfile.TarError, EOFError, OverflowError) as e:
        raise ValueError(f"{path}: {e}") from e
    with path.open("rb") as f:
        f.seek(archive.offset)
        if f.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise ValueError(f"{path}: unexpected end of data; expected a block of zeros there")


def _read_tarred(path: Path, info: tarfile.TarInfo) -> bytes:
    _limited(info.size)
    with path.open("rb") as f:
        f.seek(info.offset_data)
        data = f.read(info.size)
    if len(data) < info.size:
        raise ValueError(f"{info.name}: {len(data)} bytes in the archive; expected {info.size}")
    return data
