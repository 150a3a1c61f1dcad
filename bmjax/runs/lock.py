"""Lock files, which go with the process that holds them."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file for as long as it is inside; the lock goes with the process, however that ends.

    Where the system or the file system has no locks, as some network folders, nothing is held, and that is said.

    Raises:
      BlockingIOError: another holds it; names its host and process.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                file.seek(0)
                raise BlockingIOError(file.read().strip() or "unknown") from e
            except OSError as e:
                log.warning("%s: no lock can be held here (%s); start one process at a time", path.parent, e)
                yield
                return
            if not _is_at(file.fileno(), path):  # removed by its last owner between the two lines above
                continue
            file.truncate(0)
            file.write(f"host {platform.node()}, process {os.getpid()}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def waiting_for(path: Path, seconds: float) -> Iterator[None]:
    """As `locked`, as soon as the file is free, which is asked at such intervals."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path))
                break
            except BlockingIOError:
                time.sleep(seconds)
        yield


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
