"""Files: written whole or not at all, and told apart by their bytes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 24
"""Bytes of a block that has a digest of its own."""
_SEAL = b"bmjaxs01"
UNPACKED, RATIO = 1 << 27, 100
"""What a compressed file may unpack to: so many bytes in any case, beyond that so many times its own length."""

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
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, also under a kill; of several writers the last one stays."""
    # The process last: by it a run's folder tells what a killed one has left.
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def checksum(path: Path, algorithm: str) -> str:
    """Hex digest of a file's bytes; `algorithm` as in hashlib."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, algorithm).hexdigest()


def remove_leftovers(folder: Path, pattern: str = ".*.*") -> None:
    """Removes what killed runs left half written, `.<name>.<random>` or by another pattern of names; a day old, so that
    no live run's is taken."""
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process removes them, too
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
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}; expected JSON as `bmjax train` wrote it") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {str(found)[:40]!r}; expected a JSON object")
    return found


@contextlib.contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turns whatever a library raises over a damaged file into one ValueError that names the file.

    `what` says what the file should be. Files that are missing or may not be read keep their own errors, and so
    do errors of the program.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NameError, ImportError):
        raise
    # Over damaged bytes zipfile, h5py and NumPy raise nearly anything: zlib.error, LZMAError, KeyError, TokenError.
    except Exception as e:
        if isinstance(e, ValueError) and str(path) in str(e):
            raise
        raise ValueError(f"{path}: not a readable {what}, or truncated: {str(e) or type(e).__name__}") from e


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], Any]:
    """(shape, dtype) of a .npy file, which is left at its first value.

    Raises:
      ValueError: no header that can be believed: objects, values without bytes, or columns before rows.
    """
    import numpy as np

    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=10_000)
    # NumPy's parser of headers passes on what Python's has: TokenError, SyntaxError, OverflowError, RecursionError.
    except Exception as e:
        raise ValueError(f"no header of a .npy file: {str(e) or type(e).__name__}") from e
    if (
        fortran
        or (dtype.kind not in "fiubU" and str(dtype) != "bfloat16")
        or not dtype.itemsize
        or min(shape, default=0) < 0
    ):
        raise ValueError(f"a .npy file of {dtype} {shape}; expected numbers or text, row by row")
    return shape, dtype


def _block_digests(path: Path, length: int) -> bytes:
    """The sha256 of each block of a file's first `length` bytes, one after another; by threads."""

    def digest(start: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            found, left = hashlib.sha256(), min(BLOCK, length - start)
            while left and (part := file.read(min(left, 1 << 20))):
                found.update(part)
                left -= len(part)
            return found.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return b"".join(pool.map(digest, range(0, length, BLOCK)))


def seal(path: Path) -> None:
    """Appends a digest of each block of a file to it, and one of those, so that `mapped` can prove what it reads."""
    digests = _block_digests(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(digests + hashlib.sha256(digests).digest() + _SEAL)


def _check_seal(path: Path, end: int) -> int:
    """How many bytes of a sealed file stand after its values, which end at `end`.

    Raises:
      ValueError: the file has no seal, or a block is not what was sealed; says which.
    """
    size, blocks = hashlib.sha256().digest_size, -(-end // BLOCK)
    with path.open("rb") as file:
        file.seek(end)
        trailer = file.read()
    digests, own, mark = trailer[: blocks * size], trailer[blocks * size : -len(_SEAL)], trailer[-len(_SEAL) :]
    if mark != _SEAL or own != hashlib.sha256(digests).digest():
        raise ValueError("it has no whole list of digests at its end")
    now = _block_digests(path, end)
    if wrong := [i for i in range(blocks) if now[i * size : (i + 1) * size] != digests[i * size : (i + 1) * size]]:
        raise ValueError(f"block {wrong[0]} of {BLOCK >> 20} MiB is not what was written ({len(wrong)} of {blocks})")
    return len(trailer)


def sealed_json(value: Any) -> str:
    """JSON of a value with a digest of it, for `unsealed_json`."""
    text = json.dumps(value)
    return json.dumps({"value": value, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def unsealed_json(text: str) -> Any:
    """The value that `sealed_json` wrote.

    Raises:
      ValueError: it is not what was written.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.keys() != {"value", "sha256"}:
        raise ValueError("it has no digest")
    if hashlib.sha256(json.dumps(found["value"]).encode()).hexdigest() != found["sha256"]:
        raise ValueError("it is not what was written")
    return found["value"]


def mapped(path: Path, *, sealed: bool = False) -> Any:
    """The array of a .npy file, memory-mapped and read-only; a sealed one is read whole and proven.

    Raises:
      FileNotFoundError: there is none.
      ValueError: damaged: its header, its length or, of a sealed one, a block of it; says how.
    """
    import numpy as np

    with path.open("rb") as file:
        shape, dtype = npy_header(file)
        start, length = file.tell(), os.fstat(file.fileno()).st_size
    expected = math.prod(shape) * dtype.itemsize
    if sealed and length - start >= expected:
        length -= _check_seal(path, start + expected)
    if length - start != expected:
        raise ValueError(f"{length - start} bytes of values; expected {expected} for {dtype} {shape}")
    if not expected:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape)


def read_npz(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The arrays named of a .npz file, and of `optional` ones those that are there.

    Raises:
      ValueError: damaged, without one of them, or unpacking to far too much for its length; names the file.
    """
    import numpy as np

    arrays = {}
    with reading(path, ".npz file of NumPy"), zipfile.ZipFile(path) as archive:
        there = {info.filename: info for info in archive.infolist()}
        if missing := [name for name in names if f"{name}.npy" not in there]:
            raise ValueError(f"no array {missing[0]!r}; it holds {', '.join(sorted(there))[:200] or 'nothing'}")
        names = [*names, *(name for name in optional if f"{name}.npy" in there)]
        infos = [there[f"{name}.npy"] for name in names]
        limit = max(UNPACKED, RATIO * path.stat().st_size)
        if (total := sum(info.file_size for info in infos)) > limit:
            raise ValueError(f"it unpacks to {total} bytes; expected at most {limit}")
        for name, info in zip(names, infos, strict=True):
            file = io.BytesIO(archive.read(info))
            shape, dtype = npy_header(file)
            values = file.read()
            if len(values) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"array {name!r} has {len(values)} bytes; expected {dtype} {shape}")
            arrays[name] = np.frombuffer(values, dtype).reshape(shape).copy()
    return arrays
