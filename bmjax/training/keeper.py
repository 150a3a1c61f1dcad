"""The checkpoints of a run: which are kept, when they are written, and which one a run goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bmjax.model.parameters import Tree
from bmjax.runs.checkpoint import Checkpoints, Damaged
from bmjax.runs.state import Progress, TrainState
from bmjax.training.progress import Recorder
from bmjax.training.signals import Interrupted, Signals
from bmjax.training.stages import Stretch

if TYPE_CHECKING:
    from bmjax.training.loop import Engine

log = logging.getLogger(__name__)


class Keeper:
    """The checkpoints of a run: `best`, and `last`, before which the best so far is on disk."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        *,
        least_seconds: float = 0.0,
        most_seconds: float = math.inf,
        one_at_a_time: bool = False,
        keeps_best: bool = False,
        ends_with_best: bool = False,
    ):
        # Two of each: where one is damaged, the one before it stands in.
        self._best = Checkpoints(run_dir / "checkpoints/best", one_at_a_time=one_at_a_time)
        self._last = Checkpoints(run_dir / "checkpoints/last", one_at_a_time=one_at_a_time)
        self._engine, self._least, self._most = engine, least_seconds, most_seconds
        self._pending: tuple[TrainState, dict[str, Any]] | None = None
        self._keeps_best, self._ends_with_best = keeps_best, ends_with_best
        self._kept: TrainState | None = None
        self._saved = time.monotonic()

    def newest(self, template: Callable[[Progress], TrainState]) -> tuple[Progress, TrainState]:
        """(where the run stood, its state) of the newest whole checkpoint; damaged ones are said and set aside.

        `template` gives the structure, shapes and types of the state that a progress goes with.
        """

        def read(step: int) -> tuple[Progress, TrainState]:
            try:
                progress = Progress(**self._last.meta(step))
            except TypeError as e:  # one of a version without digests
                raise Damaged(f"{self._last.folder / str(step)} is damaged: its meta is of no run ({e})") from e
            return progress, self._engine.own(self._last.restore(step, self._engine.whole(template(progress))))

        return self._last.newest_whole(read, repair=True)[1]

    def best(self, state: TrainState, progress: Progress) -> None:
        """Keeps a fetched state as the best so far; it is written before the next `last`."""
        self._pending = (state, dataclasses.asdict(progress))

    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._saved >= self._least

    def is_late(self) -> bool:
        """Whether the last checkpoint is so old that the next step is followed by one."""
        return time.monotonic() - self._saved >= self._most

    def last(self, state: TrainState, progress: Progress) -> None:
        """Writes the best so far, and then a fetched state in the background."""
        if self._write_best():
            self._best.wait()  # else `last` might be there first, naming a best that a kill leaves out
        self._last.save(self._engine.whole(state), dataclasses.asdict(progress))
        self._saved = time.monotonic()

    def end(self, state: TrainState, progress: Progress, whole: bool) -> None:
        """Writes what a training ended with, and returns when all is on disk. Where the keeper `ends_with_best`, the
        best alone of a `whole` training, which no resume goes on from."""
        if whole and self._ends_with_best:
            self._write_best()
        else:
            self.last(state, progress)
        self.wait()

    def _write_best(self) -> bool:
        """Writes the best so far, if it is not written yet; whether it was not."""
        if self._pending is None:
            return False
        best, at = self._pending
        self._best.save(self._engine.whole(best), at)
        self._pending, self._kept = None, best if self._keeps_best else None
        return True

    def best_variables(self, step: int, template: dict[str, Tree], ema: bool) -> tuple[int, dict[str, Tree]]:
        """(its step, what evaluation uses) of the best checkpoint, that of `step`; of the best before it where that is
        damaged. Where the keeper `keeps_best`, what this process wrote is not read again."""
        if self._kept is not None and int(self._kept.step) == step:
            return step, self._engine.whole(self._kept).variables()
        if step not in (there := self._best.steps()):
            log.warning("%s: the best checkpoint, of step %d, is not there, but %s", self._best.folder, step,
                        ", ".join(map(str, there)) or "none")  # fmt: skip
        return self._best.newest_whole(lambda at: self._best.restore_variables(at, template, ema), at_most=step)

    def wait(self) -> None:
        """Returns when all is on disk."""
        self._best.wait()
        self._last.wait()

    def close(self) -> None:
        self._best.close()
        self._last.close()


class Safe:
    """Within it a checkpoint is written wherever one is due by time, and after an error, so that what was trained by
    then need not be trained again."""

    def __init__(self, engine: Engine, keeper: Keeper, recorder: Recorder):
        self._engine, self._keeper, self._recorder = engine, keeper, recorder
        self._ended: tuple[Any, Progress] | None = None

    def run(self, placed: Any, stretch: Stretch, rates: np.ndarray, signals: Signals) -> tuple[Any, int]:
        """As the engine's `run`."""
        engine, keeper, recorder, start = self._engine, self._keeper, self._recorder, stretch.start
        while True:
            self._ended = None
            left = stretch._replace(start=start), rates[start - stretch.start :]
            placed, step = engine.run(placed, *left, recorder, keeper.is_late)
            # A copy: evaluation begins to change it before the state has followed.
            self._ended = placed, dataclasses.replace(recorder.progress)
            if step in (start, stretch.end) or signals.stop is not None:
                return placed, step
            keeper.last(engine.fetch(placed), recorder.progress)
            start = step

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or not issubclass(kind, Exception) or kind is Interrupted or jax.process_count() > 1:
            return
        with contextlib.suppress(Exception):  # the error under way is the one to be raised
            placed, progress = self._ended or (self._engine.under_way(self._recorder), self._recorder.progress)
            if placed is not None:
                state = self._engine.fetch(placed)
                self._keeper.last(state, progress)
                self._keeper.wait()
                log.warning("the error below came at step %d, which is saved; go on with --resume", int(state.step))
