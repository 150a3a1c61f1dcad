"""The loop: stretches of steps, and what happens when an epoch ends. It reads top to bottom.

An engine runs a stretch: on images step by step (`ImageEngine`), on a frozen backbone's feature maps an epoch a program
(bmjax/training/cached.py). Selection, plateau, early stopping and checkpoints are the same for both, and stand here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from bmjax.config.base import Config
from bmjax.data.batches import TrainBatches, read_ahead
from bmjax.data.dataset import Dataset
from bmjax.data.splits import Splits
from bmjax.model.classifier import Classifier
from bmjax.model.parameters import Tree
from bmjax.registry import label_of
from bmjax.runs.folder import run_folder
from bmjax.runs.state import Progress, TrainState
from bmjax.training import hosts, optim, statistics
from bmjax.training.keeper import Keeper, Safe
from bmjax.training.losses import Loss
from bmjax.training.parallel import Parallel
from bmjax.training.predict import Predictor, SplitName
from bmjax.training.progress import Batch, Recorder, StepLog
from bmjax.training.signals import Interrupted, Signals
from bmjax.training.stages import StagePlan, Stretch, compile_stage, stretches
from bmjax.training.statistics import statistics_step
from bmjax.training.watch import Profile, WatchedStep, memory, peak_flops

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs the steps of a run. A state is `placed` where the engine wants it, and `fetched` to the host."""

    plans: Sequence[StagePlan]
    per_epoch: int
    predictor: Any
    validates: bool
    """Whether there is a validation split."""

    def place(self, state: TrainState) -> Any: ...
    def fetch(self, placed: Any) -> TrainState: ...
    def run(
        self, placed: Any, stretch: Stretch, rates: np.ndarray, recorder: Recorder, pause: Callable[[], bool]
    ) -> tuple[Any, int]:
        """Runs a stretch, or up to where a signal or `pause` stopped it: (the state, the step reached)."""
        ...

    def under_way(self, recorder: Recorder) -> Any | None:
        """After an error within `run`: the state that agrees with what is recorded; None where there is none."""
        ...

    def statistics(self, variables: Tree, stage: int) -> Iterable[Tree]:
        """The statistics of each batch of an epoch, on the host; see bmjax.training.statistics."""
        ...

    def evaluate(self, placed: Any, split: SplitName) -> dict[str, Any]: ...
    def figures(self) -> dict[str, float]:
        """What the steps since the last call cost, for an epoch's record; see bmjax/training/watch.py."""
        ...

    def whole(self, state: TrainState) -> TrainState:
        """A fetched state with every parameter of the network, as a checkpoint holds it."""
        ...

    def own(self, state: TrainState) -> TrainState:
        """The inverse of `whole`."""
        ...


def fit(
    config: Config, engine: Engine, state: TrainState, recorder: Recorder, keeper: Keeper, signals: Signals
) -> tuple[int, bool]:
    """Trains from `state` to the end of the last stage, an early stop or a signal: (the step reached, whether whole).

    Whatever ends it, the last checkpoint holds the state it ended with; after an error that of the last step recorded.
    """
    progress, plans = recorder.progress, engine.plans
    placed, step, fetched = engine.place(state), int(state.step), None
    total, every = plans[-1].end, config.train.checkpoint_steps
    recorder.event("start", step, {}, lambda: state.variables())
    safe = Safe(engine, keeper, recorder)
    with contextlib.suppress(Interrupted), safe:  # the resume evaluates the epoch first
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
            placed, step = safe.run(placed, stretch, rates, signals)
            if step < stretch.end:
                break
            is_best = False
            if stretch.ends_epoch:
                placed, is_best = end_epoch(config, engine, placed, step, recorder, plan)
            due = not stretch.ends_epoch or progress.epochs_evaluated % config.train.checkpoint_epochs == 0
            # Clocks of several hosts differ, and all save at the same step.
            due = hosts.told((due and keeper.is_due()) or keeper.is_late())
            if is_best or due:
                fetched = engine.fetch(placed)
                if is_best:
                    keeper.best(fetched, progress)
                if due:
                    keeper.last(fetched, progress)
    fetched = fetched or engine.fetch(placed)
    whole = progress.stopped_early or (step == total and progress.epochs_evaluated * engine.per_epoch == total)
    keeper.end(fetched, progress, whole)
    recorder.event("end", step, {}, fetched.variables)
    return step, whole


def learning_rates(plan: StagePlan, engine: Engine, placed: Any, stretch: Stretch) -> np.ndarray:
    """The learning rate of each step of a stretch; only a plateau's depends on the state, which is read for it."""
    reads = plan.optimizer.schedule.kind == "plateau"
    opt_state = engine.fetch(placed).opt_state if reads else None
    return plan.optimizer.rates_at(opt_state)(np.arange(stretch.start, stretch.end) - plan.start)


def end_epoch(
    config: Config, engine: Engine, placed: Any, step: int, recorder: Recorder, plan: StagePlan
) -> tuple[Any, bool]:
    """Evaluates, records and decides: (the state with the plateau's verdict, whether it is the best so far)."""
    progress, costs, began = recorder.progress, engine.figures(), time.perf_counter()
    placed = recompute(config, engine, placed, progress.stage)
    epoch, every = progress.epochs_evaluated + 1, config.train.train_eval_epochs
    # "Training success" is ambiguous: the running figure has dropout and augmentation, the other has neither.
    record = {"epoch": epoch, "train/loss": progress.loss_sum / max(progress.count, 1)}
    record["train/accuracy_running"] = progress.correct / max(progress.count, 1)
    val = engine.evaluate(placed, "val") if engine.validates else None
    if val is not None and (step == engine.plans[-1].end or (every and epoch % every == 0)):
        record["train/accuracy_eval_mode"] = engine.evaluate(placed, "train")["accuracy"]
    record |= costs | {"seconds/evaluation": time.perf_counter() - began} | memory()
    if val is None:  # nothing to choose by: the last epoch is the best
        is_best, progress.best_step = True, step
    else:
        is_best = _select(config, progress, step, val, record)
        if plan.optimizer.schedule.kind == "plateau":
            fetched = engine.fetch(placed)
            fetched = fetched.replace(opt_state=optim.update_plateau(plan.optimizer, fetched.opt_state, val["loss"]))
            placed = engine.place(fetched)
    patience = config.train.early_stop_epochs
    progress.stopped_early = patience is not None and progress.epochs_since_best >= patience
    progress.epochs_evaluated, progress.loss_sum, progress.correct, progress.count = epoch, 0.0, 0, 0
    recorder.epoch(step, record, lambda: engine.fetch(placed).variables())
    progress.stopped_early = progress.stopped_early or recorder.stop
    recomputed = statistics.recomputes(config.train, engine.plans, placed.batch_stats)
    if val is not None and not recomputed and (progress.stopped_early or step == engine.plans[-1].end):
        running, evaluated = record["train/accuracy_running"], record.get("train/accuracy_eval_mode", val["accuracy"])
        if (lag := statistics.statistics_lag(engine.plans, step, running, evaluated)) is not None:
            log.warning("%s", lag)
    return placed, is_best


def _select(config: Config, progress: Progress, step: int, val: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the validation figures are the best so far; adds them to the record."""
    name = config.train.monitor.removeprefix("-")
    shown = ("loss", "accuracy", "macro_f1", "balanced_accuracy", "n", *map(label_of, config.train.metrics), name)
    record |= {f"val/{figure}": val[figure] for figure in shown}
    falls = config.train.monitor_falls
    score = -val[name] if falls else val[name]
    # A figure of one's own may be no number at first, as kappa where one class is predicted; any number is better.
    is_best = progress.best is None or math.isnan(progress.best) or score > progress.best
    if is_best:
        progress.best, progress.best_step, progress.epochs_since_best = score, step, 0
    else:
        progress.epochs_since_best += 1
    assert progress.best is not None
    record[f"val/best_{name}"] = -progress.best if falls else progress.best
    return is_best


def recompute(config: Config, engine: Engine, placed: Any, stage: int) -> Any:
    """The state with batch-norm's statistics recomputed, where the run does so and the stage lets them move."""
    batch_norm, batch_stats = engine.plans[stage].batch_norm, placed.batch_stats
    runs = statistics.recomputes(config.train, engine.plans, batch_stats)
    if not runs or not statistics.moves(batch_norm, batch_stats):
        return placed
    state = engine.fetch(placed)
    return engine.place(statistics.with_statistics(state, batch_norm, lambda v: engine.statistics(v, stage)))


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
        self.validates = len(self._splits.val) > 0
        part, parts = parallel.rows
        shard: dict[str, Any] = {"process_index": part, "process_count": parts}
        shard |= {"workers": config.train.workers, "sampling": config.train.sampling}
        size = config.train.batch_size
        self._batches = TrainBatches(self._dataset, self._splits.train, size, config.seed, **shard)
        same = parallel if parallel.size == Parallel.count(config.train.devices) else None
        self.predictor = Predictor(config, model, signals, same)
        self._shares_devices = same is not None
        self._step: tuple[int, WatchedStep] | None = None
        self._measure: tuple[int, Any] | None = None
        self._done = 0
        self._profile = Profile(config.train.profile, run_folder(config) / "profile", plans[-1].end)
        peak = peak_flops(parallel.devices[0].device_kind, config.train.dtype, config.train.precision)
        self._peak = None if peak is None else peak * parallel.size
        self._reading: tuple[int, Iterator[Batch]] | None = None
        self._log: StepLog | None = None
        self._under_way: tuple[Any, int] | None = None

    def place(self, state: TrainState) -> Any:
        return self._parallel.to_devices(state)

    def fetch(self, placed: Any) -> TrainState:
        return self._parallel.to_host(placed)

    def whole(self, state: TrainState) -> TrainState:
        return state

    def own(self, state: TrainState) -> TrainState:
        return state

    def run(
        self,
        placed: Any,
        stretch: Stretch,
        rates: np.ndarray,
        recorder: Recorder,
        pause: Callable[[], bool] = lambda: False,
    ) -> tuple[Any, int]:
        self._under_way = None
        if stretch.start == stretch.end:
            return placed, stretch.end
        log = self._log = self._log or StepLog(recorder, self._parallel)
        train_step, step = self._step_of(stretch.stage), stretch.start
        for batch, lr in zip(self._batches_from(step, stretch.end, log), rates.tolist(), strict=True):
            self._profile.before(step, step + 1)
            with log.clock.on("compute"):
                moved = self._parallel.put_batch({name: batch[name] for name in ("image", "label", "position")})
                placed, metrics = train_step(placed, moved)
            step += 1
            self._done += 1
            self._profile.after(step, placed, last=step == self.plans[-1].end or self._signals.stop is not None)
            self._under_way = placed, step
            log(step, metrics, batch["index"], lr)
            if self._signals.stop is not None or pause():
                break
        log.flush()
        return placed, step

    def under_way(self, recorder: Recorder) -> Any | None:
        if self._under_way is None or self._log is None:
            return None
        placed, step = self._under_way
        self._log.flush()
        return placed if recorder.recorded == step else None

    def _step_of(self, stage: int) -> Any:
        if self._step is None or self._step[0] != stage:
            compiled = compile_stage(self._config, self._model, self.plans[stage], self._parallel, self._loss)
            self._step = (stage, WatchedStep(compiled, stage, counts=self._peak is not None))
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

    def statistics(self, variables: Tree, stage: int) -> Iterator[Tree]:
        if self._measure is None or self._measure[0] != stage:
            measure = statistics_step(self._config, self._model, self.plans[stage])
            self._measure = (stage, self._parallel.compile_step(measure, donate=False))
        placed = self._parallel.to_devices(variables)
        # The batches of the first epoch, after any epoch: the same images as in training, and nothing to remember.
        for batch in read_ahead(self._batches.batch(k) for k in range(self.per_epoch)):
            self._signals.check()
            yield self._parallel.to_host(self._measure[1](placed, self._parallel.put_batch({"image": batch["image"]})))

    def evaluate(self, placed: Any, split: SplitName) -> dict[str, Any]:
        rows = getattr(self._splits, split)
        predict = self.predictor.on_devices if self._shares_devices else self.predictor
        variables = placed.variables() if self._shares_devices else self.fetch(placed).variables()
        probs, done = predict(variables, self._dataset, rows)
        return self.predictor.metrics(self._dataset.labels[done], probs)

    def figures(self) -> dict[str, float]:
        """With `mfu`, the share of the devices' peak in the time of the steps, where it is known, and `compiled_again`
        where a step was."""
        found = self._log.clock.figures() if self._log is not None else {}
        done, self._done = self._done, 0
        step = self._step[1] if self._step is not None else None
        seconds = sum(spent for name, spent in found.items() if name.startswith("seconds/"))
        if step is not None and step.flops and self._peak and seconds:
            found["mfu"] = done * step.flops / (seconds * self._peak)
        return found | ({"compiled_again": step.again} if step is not None and step.again else {})
