"""Ctrl-C and SIGTERM: obeyed at once where nothing can be lost, else between two steps, within seconds in any case."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

GRACE_SECONDS = 4.0
"""After so long the process ends by itself, if it is within a long call such as a compilation. What is on disk is
whole, so a resume goes on from the last checkpoint."""
_HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal came; its only argument is the signal."""

    @property
    def code(self) -> int:
        """The exit status that tells of it: 130 of Ctrl-C, 143 of SIGTERM."""
        return 128 + self.args[0]


def exit_now(number: int) -> NoReturn:
    """Ends the process without waiting for what is under way; what is on disk is whole."""
    print(
        f"{signal.Signals(number).name}: ended within a long call; a resume goes on from the last checkpoint",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(128 + number)


class Pause(enum.Enum):
    """Ends a run between two epochs as a signal does, so that a resume goes on; by its caller's wish."""

    PAUSE = 0


class Signals:
    """Within it, Ctrl-C and SIGTERM raise Interrupted in the main thread; within `gently` they set `stop` only, which
    is polled between steps and between evaluation batches. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._stop: signal.Signals | None = None
        self._seen = threading.Event()
        self._gently = False
        self._old: dict[signal.Signals, Any] = {}
        self._pipe: tuple[socket.socket, socket.socket] | None = None
        self._old_fd = -1

    @property
    def stop(self) -> signal.Signals | Pause | None:
        """The signal that came, if one did."""
        if self._stop is not None:
            self._seen.set()
        return self._stop

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.stop is not None:
            raise Interrupted(self._stop)

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        """Within it a signal raises nothing: what is under way ends by polling `stop`."""
        before, self._gently = self._gently, True
        try:
            yield
        finally:
            self._gently = before

    def _handle(self, number: int, _frame: object) -> None:
        again, self._stop = self._stop is not None, signal.Signals(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._gently and not again:
            self._seen.set()
            raise Interrupted(self._stop)

    def _watch(self, waiting: socket.socket) -> None:
        """Ends the process where the main thread does not come round: Python's handlers wait for its current call."""
        with contextlib.suppress(OSError):
            for numbers in iter(lambda: waiting.recv(16), b""):
                stops = [n for n in numbers if n in _HANDLED]
                if stops and not self._seen.wait(GRACE_SECONDS):
                    exit_now(stops[0])

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not in the main thread: signals stay as they are
            self._old = {s: signal.signal(s, self._handle) for s in _HANDLED}
            ours, waiting = self._pipe = socket.socketpair()
            ours.setblocking(False)
            self._old_fd = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(waiting,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._old_fd)
            self._seen.set()
            for end in self._pipe:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._pipe = None


class Pausing(Signals):
    """The signals of a caller that trains several runs, for one that the caller may pause by itself."""

    def __init__(self, whole: Signals):
        super().__init__()
        self._whole, self._paused = whole, False

    def pause(self) -> None:
        """Ends the run when the epoch under way is evaluated; where that was the last, the run is whole."""
        self._paused = True

    @property
    def stop(self) -> signal.Signals | Pause | None:
        return self._whole.stop or (Pause.PAUSE if self._paused else None)

    def check(self) -> None:
        self._whole.check()

    def gently(self) -> contextlib.AbstractContextManager[None]:
        return self._whole.gently()
