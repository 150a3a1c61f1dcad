"""Where a run's figures go: the epoch's sums, the trackers, the callbacks, the bar or a line now and then."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from bmjax.data.dataset import Dataset
from bmjax.data.progress import Meter
from bmjax.model.parameters import Tree
from bmjax.runs.state import Progress
from bmjax.runs.tracking import Tracker
from bmjax.training.parallel import Parallel
from bmjax.training.watch import Clock

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Event:
    """What a callback sees: `kind` is "start", "step", "epoch" or "end"; `step` counts completed updates.

    `figures` are those logged. `variables()` gives {"params", "batch_stats"} on the host, as evaluation uses them; not
    at a "step", when the device is ahead of the record.
    """

    kind: Literal["start", "step", "epoch", "end"]
    step: int
    figures: dict[str, Any]
    variables: Callable[[], dict[str, Tree]]


Callback = Callable[[Event], Any]
"""f(event); where it returns True, training ends after the epoch under way, as by early stopping. It changes nothing
else, so that a resume stays exact."""


def variables_refused() -> dict[str, Tree]:
    raise RuntimeError("an event of kind 'step' has no variables; expected 'start', 'epoch' or 'end'")


class Recorder:
    """Logs steps and epochs, adds them to the epoch's sums, and calls the callbacks."""

    def __init__(
        self,
        progress: Progress,
        tracker: Tracker,
        dataset: Dataset,
        callbacks: Sequence[Callback] = (),
        *,
        total: int = 0,
        quiet: bool = False,
    ):
        self.progress, self._tracker, self._dataset = progress, tracker, dataset
        self._callbacks = tuple(callbacks)
        self._meter = Meter("training", total, "step", quiet=quiet)
        self.stop = False
        """Whether a callback asked for the end."""
        self.recorded = 0
        """The last step that is in the epoch's sums and the record."""

    def event(
        self, kind: Any, step: int, figures: dict[str, Any], variables: Callable[[], Any] = variables_refused
    ) -> None:
        """Calls the callbacks."""
        for callback in self._callbacks:
            if callback(Event(kind, step, figures, variables)) is True:
                self.stop = True

    def step(self, step: int, values: dict[str, Any], rows: np.ndarray, lr: float, speed: float) -> None:
        """Logs what a step returned; `speed` in images/s.

        Raises:
          FloatingPointError: the loss or the gradient is not finite; names the step and the images of the batch.
        """
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            ids = ", ".join(self._dataset.ids[i] for i in rows)
            raise FloatingPointError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; expected finite numbers. "
                f"Images of the batch: {ids}"
            )
        count, progress = int(values["count"]), self.progress
        progress.loss_sum += values["loss"] * count
        progress.correct += values["correct"]
        progress.count += count
        record = {"loss": values["loss"], "accuracy": values["correct"] / count, "grad_norm": values["grad_norm"]}
        record |= {"lr": lr, "images_per_second": speed}
        self._tracker.log(step, record, kind="train")
        self.recorded = step
        self.event("step", step, record)
        self._meter.to(step, f"loss {values['loss']:.3f}, {speed:.0f} images/s")

    def epoch(self, step: int, record: dict[str, Any], variables: Callable[[], dict[str, Tree]]) -> None:
        """Logs an epoch's figures."""
        self._tracker.log(step, record, kind="epoch")
        said = {k: v for k, v in record.items() if not k.startswith(("seconds/", "memory/"))}
        log.info(" ".join(f"{k} {v:.4g}" for k, v in said.items()))
        self.event("epoch", step, record, variables)

    def close(self) -> None:
        self._meter.close()


class StepLog:
    """Records one step behind the device, so that reading a loss never makes it wait."""

    def __init__(self, recorder: Recorder, parallel: Parallel):
        self._recorder, self._parallel, self.clock = recorder, parallel, Clock()
        self._pending: tuple[int, dict[str, jax.Array], np.ndarray, float] | None = None
        self._last = time.perf_counter()

    def __call__(self, step: int, metrics: dict[str, jax.Array], rows: np.ndarray, lr: float) -> None:
        before, self._pending = self._pending, (step, metrics, rows, lr)
        self._record(before)

    def flush(self) -> None:
        """Records what is outstanding; before anything is saved, so that a checkpoint is never ahead of the record."""
        before, self._pending = self._pending, None
        self._record(before)

    def _record(self, outstanding: tuple[int, dict[str, jax.Array], np.ndarray, float] | None) -> None:
        if outstanding is None:
            return
        step, metrics, rows, lr = outstanding
        with self.clock.on("compute"):
            values = {name: value.item() for name, value in self._parallel.to_host(metrics).items()}
        now = time.perf_counter()
        speed, self._last = values["count"] / (now - self._last), now
        with self.clock.on("logging"):
            self._recorder.step(step, values, rows, lr, speed)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that passes until each is there."""
        while True:
            with self.clock.on("waiting"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
