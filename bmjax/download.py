"""Fetches a published file: resumed where it broke off, checked, whole or not at all."""

from __future__ import annotations

import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from bmjax.files import checksum

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_ATTEMPTS = 5


class Published(Protocol):
    """A file that someone publishes; `checksum` is `md5:<hex>` or `sha256:<hex>`, or empty where none is known."""

    @property
    def url(self) -> str: ...
    @property
    def checksum(self) -> str: ...
    @property
    def file_name(self) -> str: ...


def _manual(record: Published, target: Path, otherwise: str) -> str:
    check = f"check that its {record.checksum.replace(':', ' is ')}, and " if record.checksum else ""
    return (
        f"To fetch it by hand: download {record.url} on a machine with a network, {check}put it at {target}; "
        f"or {otherwise}."
    )


def _expected(record: Published, target: Path) -> tuple[str, str]:
    """(algorithm, digest) that the file must have; the digest is empty where none is known yet.

    Where the publisher gives none, the file is held to the one noted when it first came.
    """
    note = _note(target)
    known = record.checksum or (note.read_text().strip() if note.is_file() else "sha256:")
    algorithm, _, digest = known.partition(":")
    return algorithm, digest


def is_whole(record: Published, target: Path) -> bool:
    """Whether a fetched file is the one it must be; True where nothing tells."""
    algorithm, expected = _expected(record, target)
    return not expected or checksum(target, algorithm) == expected


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.checksum")


def _trust(record: Published, target: Path, found: str) -> None:
    """Notes the checksum of a file whose publisher gives none."""
    _note(target).write_text(f"sha256:{found}\n")
    log.warning(
        "%s: its publisher gives no checksum, so nothing proves that this is the file. sha256 is %s; it is noted in %s "
        "and checked from now on",
        record.url,
        found,
        _note(target),
    )


def fetch(record: Published, folder: Path, *, otherwise: str, progress: bool = True, wait: float = 1.0) -> Path:
    """Path of the record's file in a folder, downloaded if it is not there. `wait`: seconds before a new attempt.

    `otherwise` ends the advice on a download by hand: "or ...".

    Raises:
      ConnectionError: the server can't be reached or breaks off each time; says how to fetch the file by hand. What
        came so far is kept and continued from the next time.
      ValueError: the file that came isn't the published one (checksum). Where no checksum is known, what comes first is
        trusted, with a warning, and noted; later it must be the same.
    """
    target = folder / record.file_name
    algorithm, expected = _expected(record, target)
    if target.is_file():
        found = checksum(target, algorithm)
        if not expected:
            _trust(record, target, found)
        elif found != expected:
            raise ValueError(f"{target}: {algorithm} is {found}; expected {expected}. Delete it to fetch it again.")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    error: Exception | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(wait * attempt)
        try:
            _download(record, part, progress)
            break
        except urllib.error.HTTPError as e:
            if e.code == 416:  # nothing left to send: the part is whole, or longer than the file
                break
            if e.code < 500:  # the server has answered: asking again won't change it
                message = f"{record.url}: the server answers {e.code} {e.reason}. {_manual(record, target, otherwise)}"
                raise ConnectionError(message) from e
            error = e
        except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
            error = e
    else:
        message = f"{record.url}: not fetched in {_ATTEMPTS} attempts ({error}). {_manual(record, target, otherwise)}"
        raise ConnectionError(message) from error
    found = checksum(part, algorithm)
    if expected and found != expected:
        part.unlink()
        message = f"{record.url}: {algorithm} of what came is {found}; expected {expected}. It was deleted. "
        raise ValueError(message + _manual(record, target, otherwise))
    os.replace(part, target)
    if not expected:
        _trust(record, target, found)
    return target


def _download(record: Published, part: Path, progress: bool) -> None:
    """Appends to the part what is missing; raises if the connection breaks before the end."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(record.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        if have and response.status != 206:  # the server ignores ranges: from the start
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=record.file_name, disable=not progress)
        with bar, part.open("ab" if have else "wb") as out:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.stat().st_size < total:
            raise http.client.IncompleteRead(b"", total - part.stat().st_size)
