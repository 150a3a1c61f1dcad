"""Several runs trained by one process: threads that take turns until none is left, what runs share, and what failed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bmjax.config.base import Config
from bmjax.data.splits import split_dataset
from bmjax.runs.folder import run_folder
from bmjax.training import hosts
from bmjax.training.progress import Callback
from bmjax.training.run import Prepared, Result, prepare
from bmjax.training.signals import GRACE_SECONDS, Interrupted, exit_now

log = logging.getLogger(__name__)
_MOST_FEATURES, _MOST_PROGRAMS = 4, 64
_LONGEST_REASON = 300  # letters; a loss that is not finite names every image of its batch


def width(at_once: int | None, cached: bool) -> int:
    """How many runs to train at a time: as asked for, else on cached features one a device and on CPUs two, since one
    leaves cores idle while it evaluates and writes; end to end one, which has all devices.

    Raises:
      ValueError: not positive, or more than one end to end.
    """
    if at_once is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cpus = jax.default_backend() == "cpu"
        at_once = (min(2, cores) if cpus else jax.local_device_count()) if cached else 1
    if at_once < 1 or (at_once > 1 and not cached):
        expected = "at least 1" if cached else "1 end to end, where a run has all devices"
        raise ValueError(f"--at-once is {at_once}; expected {expected}")
    return at_once


class Crew:
    """Threads that call `turn` until it says that nothing is left; a signal or a failure ends all."""

    def __init__(self) -> None:
        self.signals = hosts.signals()
        self._failure: BaseException | None = None

    def work(self, turn: Callable[[], bool], at_once: int) -> None:
        """So many at a time. Raises what a turn raised, once others that were under way have ended.

        Raises:
          Interrupted: a signal came.
        """
        if at_once == 1:
            with self.signals:
                while turn():
                    self.signals.check()
            return
        with self.signals, self.signals.gently():
            threads = [threading.Thread(target=self._thread, args=(turn, i), daemon=True) for i in range(at_once)]
            for thread in threads:
                thread.start()
            asked = None
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.1) if threads[0].is_alive() else time.sleep(0.1)  # signals are handled between two
                stop = self.signals.stop
                if isinstance(stop, signal.Signals):
                    asked = asked or time.monotonic()
                    if time.monotonic() - asked > GRACE_SECONDS:
                        exit_now(stop)
        if self._failure is not None:
            raise self._failure
        self.signals.check()

    def _thread(self, turn: Callable[[], bool], i: int) -> None:
        devices = jax.local_devices()
        on_one = jax.default_device(devices[i % len(devices)]) if len(devices) > 1 else contextlib.nullcontext()
        try:
            with on_one:
                while self.signals.stop is None and self._failure is None and turn():
                    pass
        except BaseException as e:
            self._failure = self._failure or e


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that failed in training: what it is, in words, its configuration and the reason."""

    what: str
    run: Config
    reason: str
    diverged: bool
    """Whether its loss or gradient was not finite."""

    def __str__(self) -> str:
        return f"{self.what} ({run_folder(self.run)}): {self.reason}"


def reason_of(error: Exception) -> str:
    """An error in one line, with its type where bmjax did not word it."""
    kind = "" if isinstance(error, (ValueError, FloatingPointError)) else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}", _LONGEST_REASON, placeholder=" ...")


def attempt(what: str, run: Config, train: Callable[[Callback], Result]) -> Result | Failure:
    """What `train` returns, or how it failed in training, after which other runs can go on. It gives its run the
    callback, which notes that training has begun.

    Raises:
      Interrupted: a signal came.
      OSError: the disk can't be written, or another process has the folder.
      ValueError: the run failed before its first step, as others would by the same data, or is that of several hosts,
        which would wait for each other's files; names the run.
    """
    begun: list[str] = []
    try:
        return train(lambda event: begun.append(event.kind))
    except (Interrupted, OSError):
        raise
    except Exception as e:
        diverged = isinstance(e, FloatingPointError)
        failure = Failure(what, run, reason_of(e), diverged)
        if begun and not hosts.several():
            # The error itself is not kept: its frames hold the run's arrays.
            log.debug("%s", failure, exc_info=True)
            return failure
        if diverged or isinstance(e, ValueError):
            raise ValueError(str(failure)) from e
        raise


def refuse(failures: Sequence[Failure], count: int, word: str, helps: str) -> None:
    """Ends a command some of whose `count` runs failed, once the others are trained.

    Raises:
      ValueError: there are failures; names each and says what helps.
    """
    if failures:
        lines = [f"{len(failures)} of {count} {word}s failed in training:", *(f"  {failure}" for failure in failures)]
        raise ValueError("\n".join([*lines, f"What helps: {helps}"]))


class Shared:
    """Data, feature maps and programs of runs on cached features, each made once for all that have it in common."""

    def __init__(self) -> None:
        self._features: dict[str, Prepared] = {}
        self._programs: dict[str, Prepared] = {}
        self._lock = threading.Lock()

    def prepared(self, config: Config) -> Prepared:
        """What this run needs, whose configuration is complete. Programs are those of any seed."""
        features, programs = _keys(config)
        with self._lock:
            if programs not in self._programs:
                self._programs[programs] = prepare(config, shared=_in_fold(config, self._features.get(features)))
            # The newest stand last, the oldest go.
            found = self._programs[programs] = self._programs.pop(programs)
            self._features.pop(features, None)
            self._features[features] = found
            for kept, most in ((self._programs, _MOST_PROGRAMS), (self._features, _MOST_FEATURES)):
                while len(kept) > most:
                    gone = kept.pop(next(iter(kept)))
                    if kept is self._features and not any(gone.features is one.features for one in kept.values()):
                        gone.features.forget()  # programs keep them too; maps on the device are read again if needed
        return found


def _in_fold(config: Config, found: Prepared | None) -> Prepared | None:
    """What there is, with the split of this run's fold."""
    if found is None or found.fold == config.data.fold:
        return found
    found.features.forget()  # the maps of another fold, which may fill the memory
    return dataclasses.replace(found, splits=split_dataset(found.dataset, config.data), fold=config.data.fold)


def _keys(config: Config) -> tuple[str, str]:
    """What decides the feature maps of a run, and what decides its programs."""
    tree: dict[str, Any] = dataclasses.asdict(config)
    model, train = tree["model"], tree["train"]
    backbone = {name: model[name] for name in ("backbone", "backbone_options", "weights", "preprocess")}
    # Random backbones are the seed's own; pretrained ones are one.
    data = {name: value for name, value in tree["data"].items() if name != "fold"}
    maps = [data, tree["augment"], tree["features"], backbone, train["dtype"], train["precision"]]
    maps.append(config.seed if config.model.weights is None else None)
    for name in ("seed", "name", "run_dir", "tracking"):
        del tree[name]
    text = json.dumps(maps, sort_keys=True, default=repr)
    return text, text + json.dumps(tree, sort_keys=True, default=repr)
