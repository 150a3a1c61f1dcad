"""How far a long stage is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)
LINE_SECONDS = 30.0
"""Seconds between two lines where the output is not a terminal."""


class Meter:
    """Counts towards a total; used with `with`."""

    def __init__(self, what: str, total: int, unit: str, *, quiet: bool = False):
        self._what, self._total, self._unit = what, total, unit
        self._quiet = quiet or not log.isEnabledFor(logging.INFO)
        terminal = sys.stderr.isatty() and not self._quiet
        self._bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True) if terminal else None
        self._said = time.monotonic()

    def to(self, done: int, text: str = "") -> None:
        """So many are done; `text` says more of them."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif not self._quiet and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            log.info("%s: %d of %d %ss%s", self._what, done, self._total, self._unit, f", {text}" if text else "")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextlib.contextmanager
def saying(how: Callable[[], str], seconds: float = LINE_SECONDS) -> Iterator[None]:
    """Within it, a line every so many seconds on how things stand; none where `how` gives no text."""
    over = threading.Event()

    def speak() -> None:
        while not over.wait(seconds):
            if text := how():
                log.info("%s", text)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
