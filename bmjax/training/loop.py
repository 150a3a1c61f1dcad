"""The loop: stretches of steps, and what happens when an epoch ends. It reads top to bottom.

An engine runs a stretch: on images step by step (`ImageEngine`), on a frozen backbone's feature maps an epoch a program
(bmjax/training/cached.py). Selection, plateau, early stopping and checkpoints are the same for both, and stand here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bmjax.config.base import Config
from bmjax.data.batches import TrainBatches
from bmjax.data.dataset import Dataset
from bmjax.data.splits import Splits
from bmjax.model.classifier import Classifier
from bmjax.model.parameters import Tree
from bmjax.registry import label_of
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.state import Progress, TrainState
from bmjax.training import hosts, optim
from bmjax.training.losses import Loss
from bmjax.training.parallel import Parallel
from bmjax.training.predict import Predictor, SplitName
from bmjax.training.progress import Batch, Recorder, StepLog, announced
from bmjax.training.signals import Interrupted, Signals
from bmjax.training.stages import StagePlan, Stretch, compile_stage, stretches

log = logging.getLogger(__name__)
_MOMENTUM = 0.99
"""Of the batch-norms' running statistics."""
_LEAST_KEPT = 0.05
"""Share of the first statistics that does no harm any more."""
_GAP = 0.15
"""Accuracy that evaluation may fall behind training without a word."""


class Engine(Protocol):
    """Runs the steps of a run. A state is `placed` where the engine wants it, and `fetched` to the host."""

    plans: Sequence[StagePlan]
    per_epoch: int
    predictor: Any

    def place(self, state: TrainState) -> Any: ...
    def fetch(self, placed: Any) -> TrainState: ...
    def run(self, placed: Any, stretch: Stretch, rates: np.ndarray, recorder: Recorder) -> tuple[Any, int]:
        """Runs a stretch, or up to where a signal stopped it: (the state, the step reached)."""
        ...

    def evaluate(self, placed: Any, split: SplitName) -> dict[str, Any]: ...
    def input_wait(self) -> float | None: ...
    def whole(self, state: TrainState) -> TrainState:
        """A fetched state with every parameter of the network, as a checkpoint holds it."""
        ...

    def own(self, state: TrainState) -> TrainState:
        """The inverse of `whole`."""
        ...


class Keeper:
    """The checkpoints of a run: `best`, and `last`, before which the best so far is on disk."""

    def __init__(self, run_dir: Path, engine: Engine, *, least_seconds: float = 0.0, one_at_a_time: bool = False):
        self._best = Checkpoints(run_dir / "checkpoints/best", keep=1, one_at_a_time=one_at_a_time)
        self._last = Checkpoints(run_dir / "checkpoints/last", one_at_a_time=one_at_a_time)
        self._engine, self._least = engine, least_seconds
        self._pending: tuple[TrainState, dict[str, Any]] | None = None
        self._saved = time.monotonic()

    def progress(self, step: int) -> Progress:
        """Where the run stood at that checkpoint."""
        return Progress(**self._last.meta(step))

    def restore(self, step: int, template: TrainState) -> TrainState:
        """The state of that checkpoint; `template` gives structure, shapes and types."""
        return self._engine.own(self._last.restore(step, self._engine.whole(template)))

    def best(self, state: TrainState, progress: Progress) -> None:
        """Keeps a fetched state as the best so far; it is written before the next `last`."""
        self._pending = (state, dataclasses.asdict(progress))

    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._saved >= self._least

    def last(self, state: TrainState, progress: Progress) -> None:
        """Writes the best so far and a fetched state, in the background."""
        if self._pending is not None:
            best, at = self._pending
            self._best.save(self._engine.whole(best), at)
            self._pending = None
        self._last.save(self._engine.whole(state), dataclasses.asdict(progress))
        self._saved = time.monotonic()

    def best_variables(self, step: int, template: dict[str, Tree], ema: bool) -> dict[str, Tree]:
        """What evaluation uses of the best checkpoint."""
        self._best.wait()
        return self._best.restore_variables(step, template, ema)

    def wait(self) -> None:
        """Returns when all is on disk."""
        self._best.wait()
        self._last.wait()

    def close(self) -> None:
        self._best.close()
        self._last.close()


def fit(
    config: Config, engine: Engine, state: TrainState, recorder: Recorder, keeper: Keeper, signals: Signals
) -> tuple[int, bool]:
    """Trains from `state` to the end of the last stage, an early stop or a signal: (the step reached, whether whole).

    Whatever ends it, the last checkpoint holds the state it ended with.
    """
    progress, plans = recorder.progress, engine.plans
    placed, step, fetched = engine.place(state), int(state.step), None
    total, every = plans[-1].end, config.train.checkpoint_steps
    recorder.event("start", step, {}, lambda: state.variables())
    with contextlib.suppress(Interrupted):  # the resume evaluates the epoch first
        for stretch in stretches(plans, engine.per_epoch, step, progress.epochs_evaluated, every):
            if progress.stopped_early or signals.stop is not None:
                break
            if stretch.stage != progress.stage:  # other parameters train now: the optimizer starts afresh
                progress.stage = stretch.stage
                now = engine.fetch(placed)
                placed = engine.place(now.replace(opt_state=plans[stretch.stage].opt_state(now.params)))
            plan = plans[stretch.stage]
            rates = learning_rates(plan, engine, placed, stretch)
            fetched = None
            placed, step = engine.run(placed, stretch, rates, recorder)
            if step < stretch.end:
                break
            is_best = False
            if stretch.ends_epoch:
                placed, is_best = end_epoch(config, engine, placed, step, recorder, plan)
            due = not stretch.ends_epoch or progress.epochs_evaluated % config.train.checkpoint_epochs == 0
            due = due and hosts.told(keeper.is_due())
            if is_best or due:
                fetched = engine.fetch(placed)
                if is_best:
                    keeper.best(fetched, progress)
                if due:
                    keeper.last(fetched, progress)
    fetched = fetched or engine.fetch(placed)
    keeper.last(fetched, progress)
    keeper.wait()
    recorder.event("end", step, {}, fetched.variables)
    return step, progress.stopped_early or (step == total and progress.epochs_evaluated * engine.per_epoch == total)


def learning_rates(plan: StagePlan, engine: Engine, placed: Any, stretch: Stretch) -> np.ndarray:
    """The learning rate of each step of a stretch; only a plateau's depends on the state, which is read for it."""
    reads = plan.optimizer.schedule.kind == "plateau"
    opt_state = engine.fetch(placed).opt_state if reads else None
    return plan.optimizer.rates_at(opt_state)(np.arange(stretch.start, stretch.end) - plan.start)


def end_epoch(
    config: Config, engine: Engine, placed: Any, step: int, recorder: Recorder, plan: StagePlan
) -> tuple[Any, bool]:
    """Evaluates, records and decides: (the state with the plateau's verdict, whether it is the best so far).

    `input_wait` is recorded: the share of the epoch's time that was spent waiting for batches.
    """
    progress, wait = recorder.progress, engine.input_wait()
    epoch, every = progress.epochs_evaluated + 1, config.train.train_eval_epochs
    val = engine.evaluate(placed, "val")
    # "Training success" is ambiguous: the running figure has dropout and augmentation, the other has neither.
    record = {"epoch": epoch, "train/loss": progress.loss_sum / max(progress.count, 1)}
    record["train/accuracy_running"] = progress.correct / max(progress.count, 1)
    if step == engine.plans[-1].end or (every and epoch % every == 0):
        record["train/accuracy_eval_mode"] = engine.evaluate(placed, "train")["accuracy"]
    own = map(label_of, config.train.metrics)
    record |= {f"val/{name}": val[name] for name in ("loss", "accuracy", "macro_f1", "balanced_accuracy", "n", *own)}
    if wait is not None:
        record["input_wait"] = wait
    if plan.optimizer.schedule.kind == "plateau":
        fetched = engine.fetch(placed)
        fetched = fetched.replace(opt_state=optim.update_plateau(plan.optimizer, fetched.opt_state, val["loss"]))
        placed = engine.place(fetched)
    name = config.train.monitor.removeprefix("-")
    falls = name != config.train.monitor or name in ("loss", "ece")
    score = -val[name] if falls else val[name]
    is_best = progress.best is None or score > progress.best
    if is_best:
        progress.best, progress.best_step, progress.epochs_since_best = score, step, 0
    else:
        progress.epochs_since_best += 1
    patience = config.train.early_stop_epochs
    progress.stopped_early = patience is not None and progress.epochs_since_best >= patience
    progress.epochs_evaluated, progress.loss_sum, progress.correct, progress.count = epoch, 0.0, 0, 0
    recorder.epoch(step, record, lambda: engine.fetch(placed).variables())
    progress.stopped_early = progress.stopped_early or recorder.stop
    if progress.stopped_early or step == engine.plans[-1].end:
        evaluated = record.get("train/accuracy_eval_mode", record["val/accuracy"])
        if (lag := statistics_lag(engine.plans, step, record["train/accuracy_running"], evaluated)) is not None:
            log.warning("%s", lag)
    return placed, is_best


def statistics_lag(plans: Sequence[StagePlan], step: int, running: float, evaluated: float) -> str | None:
    """What to say where batch-norm's running statistics have seen too few steps, and evaluation suffers; else None.

    `running` is the accuracy in training, where norms go by the batch; `evaluated` that in evaluation mode. After n
    steps the statistics still hold 0.99^n of what they began with.
    """
    by_batch = [plan for plan in plans if "train" in dataclasses.astuple(plan.batch_norm)]
    steps = sum(max(0, min(plan.end, step) - plan.start) for plan in by_batch)
    kept = _MOMENTUM**steps
    if not steps or kept < _LEAST_KEPT or running - evaluated < _GAP:
        return None
    enough = math.ceil(math.log(_LEAST_KEPT) / math.log(_MOMENTUM))
    return (
        f"accuracy is {running:.2f} in training and {evaluated:.2f} in evaluation: after {steps} steps batch-norm's "
        f"running statistics still hold {100 * kept:.0f} % of what they began with, so that the classifier is worse in "
        f"evaluation than it has learned to be. Train for {enough} steps or more (stages.epochs larger, or "
        "train.batch_size smaller), or leave the statistics of a pretrained backbone as they are "
        "(stages.batch_norm.backbone stats_frozen)"
    )


class ImageEngine:
    """Trains on images, step by step, on all devices of `parallel`."""

    def __init__(
        self,
        config: Config,
        model: Classifier,
        plans: Sequence[StagePlan],
        data: tuple[Dataset, Splits],
        *,
        loss: Loss,
        per_epoch: int,
        parallel: Parallel,
        signals: Signals,
    ):
        self.plans, self.per_epoch = plans, per_epoch
        self._config, self._model, self._loss, self._parallel = config, model, loss, parallel
        (self._dataset, self._splits), self._signals = data, signals
        part, parts = parallel.rows
        shard: dict[str, Any] = {"process_index": part, "process_count": parts}
        shard |= {"workers": config.train.workers, "sampling": config.train.sampling}
        size = config.train.batch_size
        self._batches = TrainBatches(self._dataset, self._splits.train, size, config.seed, **shard)
        same = parallel if parallel.size == Parallel.count(config.train.devices) else None
        self.predictor = Predictor(config, model, signals, same)
        self._shares_devices = same is not None
        self._step: tuple[int, Any] | None = None
        self._reading: tuple[int, Iterator[Batch]] | None = None
        self._log: StepLog | None = None

    def place(self, state: TrainState) -> Any:
        return self._parallel.to_devices(state)

    def fetch(self, placed: Any) -> TrainState:
        return self._parallel.to_host(placed)

    def whole(self, state: TrainState) -> TrainState:
        return state

    def own(self, state: TrainState) -> TrainState:
        return state

    def run(self, placed: Any, stretch: Stretch, rates: np.ndarray, recorder: Recorder) -> tuple[Any, int]:
        if stretch.start == stretch.end:
            return placed, stretch.end
        log = self._log = self._log or StepLog(recorder, self._parallel)
        train_step, step = self._step_of(stretch.stage), stretch.start
        for batch, lr in zip(self._batches_from(step, stretch.end, log), rates.tolist(), strict=True):
            moved = self._parallel.put_batch({name: batch[name] for name in ("image", "label", "position")})
            placed, metrics = train_step(placed, moved)
            step += 1
            log(step, metrics, batch["index"], lr)
            if self._signals.stop is not None:
                break
        log.flush()
        return placed, step

    def _step_of(self, stage: int) -> Any:
        if self._step is None or self._step[0] != stage:
            compiled = compile_stage(self._config, self._model, self.plans[stage], self._parallel, self._loss)
            self._step = (stage, announced(compiled, stage))
        return self._step[1]

    def _batches_from(self, start: int, end: int, log: StepLog) -> Iterator[Batch]:
        """Batches [start, end), from a reader that goes on reading ahead over the ends of epochs."""
        if self._reading is None or self._reading[0] != start:
            self._reading = (start, log.timed(self._batches.batches(start)))
        _, reader = self._reading
        for step in range(start, end):
            batch = next(reader)
            self._reading = (step + 1, reader)
            yield batch

    def evaluate(self, placed: Any, split: SplitName) -> dict[str, Any]:
        rows = getattr(self._splits, split)
        predict = self.predictor.on_devices if self._shares_devices else self.predictor
        variables = placed.variables() if self._shares_devices else self.fetch(placed).variables()
        probs, done = predict(variables, self._dataset, rows)
        return self.predictor.metrics(self._dataset.labels[done], probs)

    def input_wait(self) -> float | None:
        return self._log.input_wait() if self._log is not None else None
