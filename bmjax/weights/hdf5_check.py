"""Looks through an HDF5 file in a process of its own: over a damaged one the HDF5 library may hang or die.

This file is run as a program too, by `check`, and so imports nothing of bmjax. A file passes where all of it is within
the file: no links to others, no external or virtual data sets, nothing that unpacks to far more than its length.
"""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 2
"""Of computing, and one more for each 50 MB."""
MEMORY = 900_000_000
"""Bytes beside what the file itself may take."""
RATIO, FLOOR, MOST = 100, 1 << 24, 1 << 34
"""Arrays may hold so many times the file's length; so many bytes in any case, and never more than the last."""
DEPTH, NODES, ATTRIBUTES = 24, 100_000, 1_000
FILTERS = (1, 2, 3, 32000)  # deflate, shuffle, fletcher32, lzf; others would be loaded from outside
REFUSED = 3


def check(path: Path, content: bytes | None = None) -> None:
    """Raises where a file, or its `content` from an archive, isn't one to be opened.

    Raises:
      ValueError: damaged, or made to harm; names the file and what was seen.
    """
    size = path.stat().st_size if content is None else len(content)
    command = [sys.executable, "-P", __file__, "-" if content is not None else str(path.resolve())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=content or b"", capture_output=True, env=environment, timeout=60 + size / 10_000_000
        )
        code, said = done.returncode, done.stdout.decode("utf-8", "replace").strip()
    except subprocess.TimeoutExpired:
        code, said = -9, ""
    if code == 0:
        return
    if code != REFUSED:
        said = f"the HDF5 library hung, ran out of memory or died over it (exit {code})"
    raise ValueError(f"{path}: not a readable Keras weight file, or truncated: {said[:500]}")


class _Refused(Exception):
    pass


def _limit_this_process(size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows; the time limit of `check` remains
        return
    seconds = SECONDS + size // 50_000_000
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform == "linux":
        most = MEMORY + min(MOST, 3 * size)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _visit(file: Any, size: int) -> None:
    import h5py

    limit, total, count = min(MOST, max(FLOOR, RATIO * size)), 0, 0
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("/", file, 0)]
    while waiting:
        name, node, depth = waiting.pop()
        address = h5py.h5o.get_info(node.id).addr  # pyright: ignore[reportAttributeAccessIssue]
        if address in seen:
            continue
        seen.add(address)
        count += 1
        if depth > DEPTH or count > NODES:
            raise _Refused(f"more than {DEPTH} groups within each other, or {NODES} nodes; expected fewer")
        _check_attributes(name, node, size)
        if isinstance(node, h5py.Dataset):
            total += _check_dataset(name, node)
            if total > limit:
                raise _Refused(
                    f"its arrays would take {total} bytes or more, by {name!r} of shape {node.shape}; "
                    f"expected at most {limit} in a file of {size} bytes"
                )
            if node.shape is not None:
                node[()]
        elif isinstance(node, h5py.Group):
            for key in node:
                link = node.get(key, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    raise _Refused(f"{name}/{key} is a {type(link).__name__}; expected no link, to this file or others")
                waiting.append((f"{name.rstrip('/')}/{key}", node[key], depth + 1))


def _check_attributes(name: str, node: Any, size: int) -> None:
    import h5py

    if len(node.attrs) > ATTRIBUTES:
        raise _Refused(f"{name!r} has {len(node.attrs)} attributes; expected at most {ATTRIBUTES}")
    for key in node.attrs:
        attribute = h5py.h5a.open(node.id, key.encode("utf-8", "surrogateescape"))
        kind, shape = attribute.get_type(), attribute.shape
        needed = math.prod(shape) * kind.get_size()
        if needed > size:
            raise _Refused(f"attribute {key!r} of {name!r} would take {needed} bytes in a file of {size}")
        # Of others, as lists of varying length, the library follows addresses in the file wherever they lead.
        if kind.get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM):
            raise _Refused(f"attribute {key!r} of {name!r} is neither text nor a number; Keras writes no others")
        node.attrs[key]


def _check_dataset(name: str, node: Any) -> int:
    """The bytes that a data set takes in memory."""
    plist = node.id.get_create_plist()
    if plist.get_external_count():
        raise _Refused(f"{name!r} takes its values from another file, {node.external[0][0]!r}; expected none that does")
    if node.is_virtual:
        raise _Refused(f"{name!r} is a virtual data set, of other files; expected values within this one")
    if node.dtype.kind not in "fiubS":
        raise _Refused(f"{name!r} holds {node.dtype}; expected numbers")
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if unknown := [number for number in filters if number not in FILTERS]:
        raise _Refused(f"{name!r} is packed by filter {unknown[0]}; expected gzip or lzf")
    return math.prod(node.shape or (0,)) * node.dtype.itemsize


def main(path: str) -> int:
    source: Any = io.BytesIO(sys.stdin.buffer.read()) if path == "-" else path
    size = len(source.getvalue()) if path == "-" else os.path.getsize(path)
    import h5py

    _limit_this_process(size)
    try:
        with h5py.File(source, "r") as file:
            _visit(file, size)
    # Whatever h5py raises, its words are the report.
    except Exception as e:
        print(str(e) or type(e).__name__, flush=True)
        os._exit(REFUSED)  # closing a damaged file may hang again
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
