"""What a run logs of its steps, and where it stands."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bmjax.data import Dataset
from bmjax.parallel import Parallel
from bmjax.tracking import Tracker

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]


@dataclasses.dataclass
class Progress:
    """What a resume needs beside the arrays; the `meta` item of a checkpoint."""

    run_id: str
    stage: int = 0
    epochs_evaluated: int = 0
    best: float | None = None
    best_step: int = 0
    epochs_since_best: int = 0
    stopped_early: bool = False
    # Running sums of the epoch under way.
    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0


def log_step(
    step: int,
    values: dict[str, Any],
    rows: np.ndarray,
    lr: float,
    speed: float,
    progress: Progress,
    tracker: Tracker,
    dataset: Dataset,
) -> None:
    """Logs what a step returned, and adds it to the epoch's sums; `speed` in images/s.

    Raises:
      FloatingPointError: the loss or the gradient is not finite; names the step and the images of the batch.
    """
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        ids = ", ".join(dataset.ids[i] for i in rows)
        raise FloatingPointError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; expected finite numbers. "
            f"Images of the batch: {ids}"
        )
    count = int(values["count"])
    progress.loss_sum += values["loss"] * count
    progress.correct += values["correct"]
    progress.count += count
    record = {"loss": values["loss"], "accuracy": values["correct"] / count, "grad_norm": values["grad_norm"]}
    tracker.log(step, record | {"lr": lr, "images_per_second": speed}, kind="train")


def announced(step: Callable[..., Any], stage: int) -> Callable[..., Any]:
    """A stage's step; logs the seconds of its first call, which compiles it or reads the program from the cache."""
    called = False

    def first_announced(*args: Any) -> Any:
        nonlocal called
        began = time.perf_counter()
        result = step(*args)
        if not called:
            called = True
            log.info(
                "stage %d: its step compiled, or was read from the cache, in %.1f s", stage, time.perf_counter() - began
            )
        return result

    return first_announced


class StepLog:
    """Logs one step behind the device, so that reading a loss never makes it wait."""

    def __init__(self, progress: Progress, tracker: Tracker, parallel: Parallel, dataset: Dataset, bar: tqdm):
        self._progress, self._tracker, self._parallel = progress, tracker, parallel
        self._dataset, self._bar = dataset, bar
        self._began: float | None = None
        self._waited = 0.0
        self._pending: tuple[int, dict[str, jax.Array], np.ndarray, float] | None = None
        self._last = time.perf_counter()

    def __call__(self, step: int, metrics: dict[str, jax.Array], rows: np.ndarray, lr: float) -> None:
        self.flush()
        self._pending = (step, metrics, rows, lr)

    def flush(self) -> None:
        """Logs what is outstanding; before anything is saved, so that a checkpoint is never ahead of the record."""
        if self._pending is None:
            return
        step, metrics, rows, lr = self._pending
        self._pending = None
        values = {name: value.item() for name, value in self._parallel.to_host(metrics).items()}
        now = time.perf_counter()
        speed, self._last = values["count"] / (now - self._last), now
        log_step(step, values, rows, lr, speed, self._progress, self._tracker, self._dataset)
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.0f} images/s", refresh=False)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that passes until each is there."""
        self._began = self._began or time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    def input_wait(self) -> float | None:
        """The share 0..1 of the time since the last call that was spent waiting for batches; None where none was asked
        for. The device may have been busy meanwhile, so this is the most that faster input could gain."""
        if self._began is None:
            return None
        share = self._waited / (time.perf_counter() - self._began)
        self._began, self._waited = None, 0.0
        return share
