"""What a tracker is, and the one that is always there: a line of JSON a record, on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

from bmjax.runs.tables import Finished

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a run's figures go."""

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None:
        """Figures of a step; `kind` is "train" or "epoch", each with a record of its own per step."""
        ...

    def finished(self, finished: Finished) -> None:
        """What the whole run has come to."""
        ...

    def close(self) -> None: ...


class NoTracker:
    """Writes nothing."""

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None: ...
    def finished(self, finished: Finished) -> None: ...
    def close(self) -> None: ...


class JsonlTracker(NoTracker):
    """One JSON object a line: kind, step, time, and the figures. Each step stands there once per kind.

    `last` maps each kind to its last logged step. A line that a kill tore is cut off when the file is opened, which is
    said; so are steps up to `resumed_at` that are not there, for they are not trained again.

    Raises:
      ValueError: a line that was finished is no record; names file and line.
      OSError: the disk is full; names the file.
    """

    def __init__(self, path: Path, resumed_at: int = 0):
        self.last: dict[str, int] = {}
        self._path, steps = path, set[int]()
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                log.warning("%s: the last line is not whole, and is cut off: %r", path, text[len(whole) :][:80])
                with path.open("r+b") as f:
                    f.truncate(len(whole))
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    record = json.loads(line)
                    self.last[record["kind"]] = max(record["step"], self.last.get(record["kind"], -1))
                    steps |= {record["step"]} if record["kind"] == "train" else set()
                except (ValueError, KeyError, TypeError) as e:
                    raise ValueError(f"{path}, line {number}: {line[:80]!r} is no record of a step: {e!r}") from e
        missing = sorted(set(range(1, resumed_at + 1)) - steps)
        if missing:
            log.warning(
                "%s lacks %d of the %d steps trained so far, the first of them step %d: the record is not whole",
                *(path, len(missing), resumed_at, missing[0]),
            )
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None:
        if step <= self.last.get(kind, -1):
            return
        self.last[kind] = step
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | metrics) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as e:
            raise OSError(e.errno, f"{e.strerror}; free some space and go on with --resume", str(self._path)) from e

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which was raised before
            self._file.flush()
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()
