"""Files: written whole or not at all, and told apart by their bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_IN_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as `os.fsdecode` keeps it
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(found[0], f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Text that any output takes: bytes of a file's name that are not UTF-8 become \xNN, and so do control characters;
    with `lines` ends of lines and tabs stay. For people: a record that is read again keeps the name itself."""
    return (_CONTROL_IN_LINES if lines else _CONTROL).sub(_escaped, str(text))


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a UTF-8 file whole or not at all, also under a kill; `errors` as in `str.encode`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(text.encode("utf-8", errors))
    os.replace(temporary, path)


def checksum(path: Path, algorithm: str) -> str:
    """Hex digest of a file's bytes; `algorithm` as in hashlib."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, algorithm).hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs left half written, `.<name>.<random>`; a day old, so that no live run's is taken."""
    for path in folder.glob(".*.*"):
        if time.time() - path.stat().st_mtime > 86400:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str, need: int, what: str) -> Iterator[Path]:
    """A folder beside what it will replace, for something to be renamed out of it when it is whole; removed at the end.

    Raises:
      OSError: the disk has less than `need` bytes free for `what`: a memory map on a full disk would kill the process.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    if (free := shutil.disk_usage(parent).free) < need:
        raise OSError(f"{parent} has {free / 1e9:.1f} GB free; {what} need {need / 1e9:.1f} GB")
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no file.

    Raises:
      ValueError: it is damaged; names the file.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}; expected JSON as `bmjax train` wrote it") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {str(found)[:40]!r}; expected a JSON object")
    return found
