"""train() and evaluate(): read top to bottom. What a run leaves on disk stands in bmjax/run.py."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from bmjax import optim
from bmjax.backbones import stage_of_layers
from bmjax.checkpoint import Checkpoints
from bmjax.config import BatchNormConfig, Config, StageConfig
from bmjax.data import Dataset, Splits
from bmjax.data.pipeline import TrainBatches, eval_batches, steps_per_epoch
from bmjax.losses import Loss, make_loss
from bmjax.metrics import classification_metrics
from bmjax.model import Classifier, create, part_of, resolve
from bmjax.parallel import Parallel
from bmjax.progress import Progress, StepLog, announced
from bmjax.run import (
    Run,
    Which,
    image_dtype,
    load_data,
    load_run,
    new_variables,
    open_run,
    record_opening,
    run_folder,
    save_predictions,
    save_results,
    saved_results,
)
from bmjax.state import Path as ParamPath
from bmjax.state import TrainState, Tree, create_state, split_params
from bmjax.steps import make_eval_step, make_train_step
from bmjax.tracking import Tracker, make_tracker, new_run_id

__all__ = ["Result", "evaluate", "load_run", "predict_probs", "train"]

log = logging.getLogger(__name__)
SplitName = Literal["train", "val", "test"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What train() leaves: the folder, the metrics by split, the steps done, the data, and what signal ended it."""

    run_dir: Path
    metrics: dict[str, dict[str, Any]]
    steps: int
    data: tuple[Dataset, Splits]
    interrupted: str | None = None


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage of training: its steps [start, end), its norms' modes, what trains, and its optimizer."""

    start: int
    end: int
    batch_norm: BatchNormConfig
    is_trainable: Callable[[ParamPath], bool]
    optimizer: optim.Optimizer

    def opt_state(self, params: Tree) -> Tree:
        """A fresh optimizer state."""
        return self.optimizer.tx.init(split_params(params, self.is_trainable)[0])


class Signals:
    """Within it, Ctrl-C and SIGTERM set `stop`, polled between steps and between evaluation batches; a second
    Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, _frame: object) -> None:
        if self.stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = signal.Signals(number)

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not in the main thread: signals stay as they are
            self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)


class Interrupted(Exception):
    """A signal came during an evaluation."""


def trains_in(stage: StageConfig, batch_stats: Tree) -> Callable[[ParamPath], bool]:
    """Whether the leaf of params at a path trains in this stage: its part does, and it is no frozen norm."""
    modes = stage.resolved_batch_norm()

    def is_norm(path: ParamPath) -> bool:
        node = batch_stats
        for name in path[:-1]:
            node = node.get(name, {})
        return "mean" in node

    def is_trainable(path: ParamPath) -> bool:
        part = part_of(path)
        return part in stage.train and not (getattr(modes, part) == "frozen" and is_norm(path))

    return is_trainable


def plan_stages(config: Config, per_epoch: int, model: Classifier, batch_stats: Tree) -> list[StagePlan]:
    """The stages with their steps and optimizers."""
    plans, start = [], 0

    def stage_of(path: ParamPath) -> str | None:
        return stage_of_layers(model.backbone)[path[1]] if part_of(path) == "backbone" else None

    for stage in config.stages:
        end = start + stage.epochs * per_epoch
        optimizer = optim.make_optimizer(
            config.optim,
            lr_scale=stage.lr_scale,
            total_steps=end - start,
            steps_per_epoch=per_epoch,
            stages=model.backbone.stages,
            stage_of=stage_of,
        )
        plans.append(StagePlan(start, end, stage.resolved_batch_norm(), trains_in(stage, batch_stats), optimizer))
        start = end
    return plans


class Predictor:
    """Probabilities of images in evaluation mode.

    Compiles once for whole batches, and once for each smaller size that `bucket` finds.
    """

    def __init__(self, config: Config, model: Classifier, signals: Signals | None = None):
        self._parallel = Parallel.create(config.train.parallel, config.train.devices)
        self.batch_size = math.ceil(config.train.eval_batch_size / self._parallel.size) * self._parallel.size
        self._signals = signals
        step = make_eval_step(model, image_dtype=image_dtype(config))
        self._step = self._parallel.compile_step(step, donate=False)

    def __call__(self, variables: Tree, dataset: Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities float32 [n, k], rows [n]): every image once, padding left out.

        Raises:
          Interrupted: a signal came between two batches.
        """
        on_devices = self._parallel.to_devices(variables)
        probs, done = [], []
        for batch in eval_batches(dataset, rows, self.bucket(len(rows))):
            if self._signals is not None and self._signals.stop is not None:
                raise Interrupted
            outputs = self._step(on_devices, self._parallel.put_batch({"image": batch["image"]}))
            real = batch["weight"] > 0
            logits = self._parallel.batch_to_host(outputs)["logits"][real].astype(np.float64)
            probs.append(np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)))
            done.append(batch["index"][real])
        return np.concatenate(probs).astype(np.float32), np.concatenate(done)

    def bucket(self, n: int) -> int:
        """Images in a batch where n are asked for. Where whole batches would be padding for the most part, it is the
        power of two (times devices) that holds n."""
        if 4 * n > self.batch_size:
            return self.batch_size
        return self._parallel.size * 2 ** (math.ceil(n / self._parallel.size) - 1).bit_length()

    def metrics(self, variables: Tree, dataset: Dataset, rows: np.ndarray) -> dict[str, Any]:
        probs, done = self(variables, dataset, rows)
        return classification_metrics(dataset.labels[done], probs)


def end_epoch(
    config: Config,
    state: TrainState,
    progress: Progress,
    tracker: Tracker,
    evaluate_split: Callable[[TrainState, SplitName], dict[str, Any]],
    optimizer: optim.Optimizer,
    *,
    is_last: bool,
    input_wait: float | None = None,
) -> tuple[TrainState, bool]:
    """Evaluates, logs, and decides: (state with the plateau's verdict, whether this is the best so far).

    `input_wait` is logged: the share of the epoch's time that was spent waiting for batches.
    """
    epoch, every = progress.epochs_evaluated + 1, config.train.train_eval_epochs
    val = evaluate_split(state, "val")
    # "Training success" is ambiguous: the running figure has dropout and augmentation, the other has neither.
    record = {"epoch": epoch, "train/loss": progress.loss_sum / max(progress.count, 1)}
    record["train/accuracy_running"] = progress.correct / max(progress.count, 1)
    if is_last or (every and epoch % every == 0):
        record["train/accuracy_eval_mode"] = evaluate_split(state, "train")["accuracy"]
    record |= {f"val/{name}": val[name] for name in ("loss", "accuracy", "macro_f1", "balanced_accuracy", "n")}
    if input_wait is not None:
        record["input_wait"] = input_wait
    state = state.replace(opt_state=optim.update_plateau(optimizer, state.opt_state, val["loss"]))
    score = -val["loss"] if config.train.monitor == "loss" else val[config.train.monitor]
    is_best = progress.best is None or score > progress.best
    if is_best:
        progress.best, progress.best_step, progress.epochs_since_best = score, int(state.step), 0
    else:
        progress.epochs_since_best += 1
    patience = config.train.early_stop_epochs
    progress.stopped_early = patience is not None and progress.epochs_since_best >= patience
    progress.epochs_evaluated, progress.loss_sum, progress.correct, progress.count = epoch, 0.0, 0, 0
    tracker.log(int(state.step), record, kind="epoch")
    log.info(" ".join(f"{k} {v:.4g}" for k, v in record.items()))
    return state, is_best


def train(config: Config, *, resume: bool = False) -> Result:
    """Trains, validates each epoch and keeps the best and the last checkpoint.

    With `resume` the run in the folder goes on from its last checkpoint, bit for bit as if never stopped; where
    there is none yet, it starts.

    Raises:
      FileExistsError: the folder holds a run and `resume` is not set.
      ValueError: a field is wrong, or the run to resume has another configuration or other data.
      FloatingPointError: the loss is not finite; names the step and the images of the batch.
    """
    if config.features.cached:
        raise ValueError("config field 'features.cached' is True; expected False here, or a call of bmjax.train")
    config = dataclasses.replace(config, model=resolve(config.model))
    run_dir = run_folder(config)
    model_check(config)
    open_run(run_dir, config, resume)
    dataset, splits = load_data(run_dir, config)
    batch_size, per_epoch = config.train.batch_size, steps_per_epoch(len(splits.train), config.train.batch_size)
    counts = np.bincount(dataset.labels[splits.train], minlength=len(dataset.classes))
    loss = make_loss(config.train, counts)

    # Model, stages, and the state: new, or the last checkpoint's.
    parallel = Parallel.create(config.train.parallel, config.train.devices, batch_size // config.train.accumulate)
    model = create(config.model, len(dataset.classes), config.train.dtype)
    last, best = Checkpoints(run_dir / "checkpoints/last"), Checkpoints(run_dir / "checkpoints/best", keep=1)
    newest = last.latest() if resume else None
    # A checkpoint holds every array, so a resume needs the weights' file no longer.
    variables = new_variables(config, model, pretrained=newest is None)
    plans = plan_stages(config, per_epoch, model, variables["batch_stats"])
    ema = config.train.ema_decay is not None
    state = create_state(variables, plans[0].optimizer.tx, plans[0].is_trainable, seed=config.seed, ema=ema)
    progress = Progress(run_id=new_run_id())
    if newest is not None:
        progress = Progress(**last.meta(newest))
        template = state.replace(opt_state=plans[progress.stage].opt_state(state.params))
        state = last.restore(newest, template)
        log.info("%s: resumed at step %d", run_dir, newest)
    step, total = int(state.step), plans[-1].end
    sizes = (len(splits.train), per_epoch, total, parallel.size)
    log.info("%d images to train on, %d steps an epoch, %d steps, %d device(s)", *sizes)

    shard: dict[str, Any] = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    shard |= {"workers": config.train.workers, "sampling": config.train.sampling}
    batches = TrainBatches(dataset, splits.train, batch_size, config.seed, **shard)
    tracker = make_tracker(config.tracking, run_dir, progress.run_id, dataclasses.asdict(config), jax.process_index())
    bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    step_log = StepLog(progress, tracker, parallel, dataset, bar)
    results: dict[str, dict[str, Any]] = {}
    with contextlib.closing(tracker), contextlib.closing(last), contextlib.closing(best), Signals() as signals:
        predictor = Predictor(config, model, signals)

        def evaluate_split(state: TrainState, split: SplitName) -> dict[str, Any]:
            return predictor.metrics(state.variables(), dataset, getattr(splits, split))

        def next_step() -> Callable:
            step = compile_stage(config, model, plans[progress.stage], parallel, loss)
            return announced(step, progress.stage)

        train_step = next_step()
        try:
            while True:
                # An epoch ends here, also where a resume starts between its last step and its evaluation.
                if step and step % per_epoch == 0 and progress.epochs_evaluated < step // per_epoch:
                    arguments = (config, state, progress, tracker, evaluate_split, plans[progress.stage].optimizer)
                    wait = step_log.input_wait()
                    state, is_best = end_epoch(*arguments, is_last=step == total, input_wait=wait)
                    if is_best:
                        best.save(state, dataclasses.asdict(progress))
                    if progress.epochs_evaluated % config.train.checkpoint_epochs == 0:
                        last.save(state, dataclasses.asdict(progress))
                if step == total or progress.stopped_early or signals.stop is not None:
                    break
                if step >= plans[progress.stage].end:  # other parameters train now: the optimizer starts anew
                    progress.stage += 1
                    state = state.replace(opt_state=plans[progress.stage].opt_state(state.params))
                    train_step = next_step()
                plan = plans[progress.stage]
                on_devices, lr_at = parallel.to_devices(state), plan.optimizer.lr_at(state.opt_state)
                epoch_end = (step // per_epoch + 1) * per_epoch
                for batch in step_log.timed(batches.batches(step)):
                    moved = parallel.put_batch({name: batch[name] for name in ("image", "label", "position")})
                    on_devices, metrics = train_step(on_devices, moved)
                    step_log(step + 1, metrics, batch["index"], lr_at(step - plan.start))
                    step += 1
                    if step == epoch_end or signals.stop is not None:
                        break
                    if config.train.checkpoint_steps and step % config.train.checkpoint_steps == 0:
                        step_log.flush()
                        last.save(parallel.to_host(on_devices), dataclasses.asdict(progress))
                step_log.flush()
                state = parallel.to_host(on_devices)
        except Interrupted:
            pass  # the state is that of the epoch's end, not yet evaluated; the resume evaluates it first
        bar.close()
        last.save(state, dataclasses.asdict(progress))
        last.wait()
        if signals.stop is not None:
            log.warning("%s: stopped by %s at step %d; resume with --resume", run_dir, signals.stop.name, step)
            return Result(run_dir, {}, step, (dataset, splits), interrupted=signals.stop.name)
        best.wait()
        trained, final = load_run(run_dir), Predictor(config, model)
        for split in ("train", "val", "test") if config.train.final_test else ("train", "val"):
            # The test split is opened once: a run that was finished before and is resumed keeps what it found.
            known = saved_results(run_dir).get("test") if split == "test" else None
            if known is None or known["step"] != progress.best_step:
                known = evaluate_run(trained, split, "best", final, dataset, splits)
            results[split] = known
        track_results(run_dir, tracker, dataset, results)
    return Result(run_dir, results, step, (dataset, splits))


def model_check(config: Config) -> None:
    """Fails on an unknown backbone, attention or stage before any data are read."""
    create(config.model, 2, config.train.dtype)


def compile_stage(config: Config, model: Classifier, plan: StagePlan, parallel: Parallel, loss: Loss) -> Callable:
    """The train step of a stage: (state, batch) -> (state, metrics); compiled when first called."""
    return parallel.compile_step(stage_step(config, model, plan, loss))


def stage_step(config: Config, model: Classifier, plan: StagePlan, loss: Loss) -> Callable:
    """The train step of a stage, not compiled; see `make_train_step`."""
    return make_train_step(
        model,
        plan.optimizer.tx,
        plan.is_trainable,
        batch_norm=plan.batch_norm,
        augmentation=config.augment,
        loss=loss,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
        image_dtype=image_dtype(config),
    )


def track_results(run_dir: Path, tracker: Tracker, dataset: Dataset, results: dict[str, dict[str, Any]]) -> None:
    """Summary, confusion matrix, mispredicted cells and the best checkpoint, of the last split evaluated."""
    split = list(results)[-1]
    with np.load(run_dir / f"predictions_{split}.npz") as saved:
        probs, labels, rows = saved["probs"], saved["labels"], saved["index"]
    tracker.summary({f"{s}/{k}": v for s, m in results.items() for k, v in m.items() if isinstance(v, (int, float))})
    tracker.confusion(labels, probs.argmax(-1), dataset.classes)
    wrong = np.flatnonzero(probs.argmax(-1) != labels)[:100]
    ids = [dataset.ids[i] for i in rows[wrong]]
    tracker.mispredicted(dataset.images[rows[wrong]], labels[wrong], probs[wrong], ids, dataset.classes)
    tracker.checkpoint_artifact(run_dir / "checkpoints/best", {f"{split}/accuracy": results[split]["accuracy"]})


def evaluate(
    run_dir: str | Path,
    split: SplitName = "val",
    which: Which = "best",
    *,
    data: tuple[Dataset, Splits] | None = None,
) -> dict[str, Any]:
    """Metrics of a split by a run's checkpoint; writes predictions_<split>.npz and results.json.

    Each opening of the test split is recorded in openings.jsonl.

    Raises:
      FileNotFoundError: the folder holds no run or no checkpoint.
      ValueError: the data are not those the run began with.
    """
    run = load_run(run_dir, which)
    dataset, splits = data or load_data(run.run_dir, run.config)
    return evaluate_run(run, split, which, Predictor(run.config, run.model), dataset, splits)


def evaluate_run(
    run: Run, split: SplitName, which: Which, predictor: Predictor, dataset: Dataset, splits: Splits
) -> dict[str, Any]:
    """As `evaluate`, of a run that is read already; one predictor serves several splits."""
    if split == "test" and (openings := record_opening(run.run_dir, run.step)) > 1:
        log.warning(
            "%s: the test split is opened for time %d; a choice made on it is no longer a test", run.run_dir, openings
        )
    probs, done = predictor(run.variables, dataset, getattr(splits, split))
    metrics = classification_metrics(dataset.labels[done], probs, intervals=True)
    metrics |= {"step": run.step, "checkpoint": which}
    if jax.process_index() == 0:
        save_predictions(run.run_dir, split, dataset, probs, done)
        save_results(run.run_dir, split, metrics)
    return metrics


def predict_probs(run: Run, images: np.ndarray, predictor: Predictor | None = None) -> np.ndarray:
    """Class probabilities float32 [n, k] of images uint8 [n, h, w, 3] at the run's image size.

    `predictor`: one made before, where this is called again and again; it compiles once.
    """
    n = len(images)
    unlabelled = Dataset(
        name="images",
        classes=run.classes,
        images=images,
        labels=np.zeros(n, np.int32),
        ids=tuple(map(str, range(n))),
        hashes=("",) * n,
        fingerprint="",
        skipped=(),
    )
    predictor = predictor or Predictor(run.config, run.model)
    return predictor(run.variables, unlabelled, np.arange(n))[0]
