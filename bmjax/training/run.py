"""Trains a configuration: everything is checked, then written, then trained."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.config.arguments import check_type
from bmjax.config.base import Config
from bmjax.data.augment.augment import load_extra
from bmjax.data.batches import steps_per_epoch
from bmjax.data.dataset import Dataset
from bmjax.data.load import load_dataset
from bmjax.data.splits import Splits, split_dataset
from bmjax.model.classifier import Classifier
from bmjax.model.create import create, resolve
from bmjax.runs import folder, identity
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.folder import Run
from bmjax.runs.metrics import load_metrics, try_metrics
from bmjax.runs.state import Progress, TrainState, create_state
from bmjax.runs.tracking import make_tracker, new_run_id
from bmjax.training import hosts, optim
from bmjax.training.cached import MapEngine, Programs
from bmjax.training.cached import check as check_cached
from bmjax.training.checks import (
    check_files,
    check_splits,
    check_stages,
    check_statistics,
    try_augmentations,
    try_head,
)
from bmjax.training.ended import ended_at, reported, wanted
from bmjax.training.features import FeatureMaps
from bmjax.training.keeper import Keeper
from bmjax.training.loop import Engine, ImageEngine, fit
from bmjax.training.losses import Loss, make_loss
from bmjax.training.parallel import Parallel
from bmjax.training.predict import evaluate_run, track_results
from bmjax.training.progress import Callback, Recorder
from bmjax.training.signals import Interrupted, Pause, Signals
from bmjax.training.stages import plan_stages

log = logging.getLogger(__name__)
Finish = Callable[[Path, Dataset, Splits], Sequence[Path]]
"""finish(run_dir, dataset, splits) -> pages of HTML for the trackers to show; before they take the run's files."""
# An epoch on cached maps may take a tenth of a second; writing a checkpoint after each would take longer.
_MAPS_CHECKPOINT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What train() leaves: the folder, the metrics by split, the steps done, the data (None where a signal came before
    they were read), and what signal ended it."""

    run_dir: Path
    metrics: dict[str, dict[str, Any]]
    steps: int
    data: tuple[Dataset, Splits] | None
    interrupted: str | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What runs on cached features share: data, maps and, of one configuration but for the seed, programs."""

    dataset: Dataset
    splits: Splits
    features: FeatureMaps
    programs: Programs
    fold: int = 0
    """That of the splits."""


def train(
    config: Config,
    *,
    resume: bool = False,
    data: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains, validates each epoch and keeps the best and the last checkpoint; on images, or on a frozen backbone's
    cached feature maps where `features.cached` is set.

    Without `run_dir`, a name whose folder holds a run gets the next free number, and that is said. With `resume` the
    run in the folder goes on from its last checkpoint, bit for bit as if never stopped; where there is none yet, it
    starts; a finished run is left as it is, but for where its data are. `data` takes the place of what `config.data`
    names, see `Dataset.from_arrays`. `callbacks` see each step and epoch, see `bmjax.training.progress.Event`.

    Nothing is written before all is checked.

    Raises:
      FileExistsError: `run_dir` holds a run and `resume` is not set.
      BlockingIOError: another process trains in the folder.
      ValueError, FileNotFoundError: a field is wrong, or the run to resume has another configuration or other data.
      TypeError: an argument is of another type.
      FloatingPointError: the loss is not finite; names the step and the images of the batch.
    """
    check_type("config", config, Config, "a bmjax.Config")
    check_type("resume", resume, bool, "True or False")
    check_type("data", data, (Dataset, type(None)), "a bmjax.Dataset, as Dataset.from_arrays gives, or None")
    check_type("callbacks", callbacks, (list, tuple), "a list of functions of an event; one alone is [function]")
    return train_run(config, resume=resume, data=data, callbacks=callbacks)


def train_run(
    config: Config,
    *,
    resume: bool = False,
    data: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    prepared: Prepared | None = None,
    signals: Signals | None = None,
    files: Sequence[Path] = (),
    finish: Finish | None = None,
) -> Result:
    """As `train`. `prepared` and `signals` are those of a caller that trains several runs; `files` are further ones of
    the user's to record, as the experiment's; `finish` writes what else belongs into the folder of a finished run."""
    for i, callback in enumerate(callbacks):
        if not callable(callback):
            check_type(f"callbacks[{i}]", callback, (), "a function of an event, as on_event of an experiment")
    if not config.run_dir and not resume:
        free = dataclasses.replace(config, name=hosts.told(folder.free_name(config).name))
        if free.name != config.name:
            log.warning("%s holds a run already; this one is named %r", folder.run_folder(config), free.name)
        config = free
    with contextlib.nullcontext(signals) if signals else hosts.signals() as watched, contextlib.ExitStack() as lock:
        try:
            with hosts.together("the run was checked"):
                config = complete(config, data)
                run_dir = folder.run_folder(config)
                folder.check_folder(run_dir, config, resume)
                if resume:
                    identity.check_unchanged(config, run_dir)
            plan = hosts.first_alone(lambda: _plan(config, run_dir, data, prepared, watched))
            watched.check()
        except Interrupted as e:
            stop = e.args[0]
            run_dir = folder.run_folder(config)
            log.warning("%s: stopped by %s before the first step; nothing is written", run_dir, stop.name)
            return Result(run_dir, {}, 0, None, interrupted=stop.name)
        ended = hosts.told(ended_at(run_dir, plan.engine)) if resume else None
        if ended and (found := hosts.told(reported(config, run_dir, plan.splits))) is not None:
            folder.write_config(run_dir, config)  # its data may have moved
            if hosts.leads():
                folder.remove_leftovers(run_dir)
            return Result(run_dir, found, ended[0], (plan.dataset, plan.splits))
        with watched.gently():
            one = _One(resume, callbacks, watched, files, finish, quiet=signals is not None or not hosts.leads())
            with hosts.together("the run's folder was opened"):
                if hosts.leads():
                    lock.enter_context(folder.owned(run_dir))
                    folder.check_folder(run_dir, config, resume)  # another process may have begun a run since
            return _train(config, run_dir, plan, one, ended)


def complete(config: Config, data: Dataset | None = None) -> Config:
    """The configuration with what the weights and the data given decide filled in; from here on it is only passed on.

    Raises:
      ValueError, FileNotFoundError: the model can't be made.
    """
    if data is not None:
        size = data.images.shape[1]
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="arrays", image_size=size))
    config = dataclasses.replace(config, model=resolve(config.model))
    create(config.model, 2, config.train.dtype)
    load_metrics(config.train.metrics)
    load_extra(config.augment)
    optim.resolve(config.optim)
    check_files(config)
    if config.train.dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(
            "config field 'train.dtype' is 'float64', and jax computes in float32 here; expected JAX_ENABLE_X64=1, or "
            "jax.config.update('jax_enable_x64', True)"
        )
    check_stages(config)
    check_statistics(config)
    if config.features.cached:
        check_cached(config)
    return config


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a run is made of: its data, engine and first state, before anything is written."""

    dataset: Dataset
    splits: Splits
    model: Classifier
    engine: Engine
    start: Any
    """Gives the state at step 0; with False, without the weights' file."""


def _plan(config: Config, run_dir: Path, data: Dataset | None, prepared: Prepared | None, signals: Signals) -> _Plan:
    if prepared is not None:
        dataset, splits = prepared.dataset, prepared.splits
        recorded = folder.recorded_split(run_dir, dataset)
        if recorded is not None and not recorded.equals(splits):
            raise ValueError(
                f"{run_dir / 'split.csv'}: the run began with another split than the configuration now gives; "
                "expected the same (a record can be given back as data.manifest)"
            )
    else:
        dataset, splits = folder.load_data(run_dir, config, data)
    check_splits(config, splits)
    try_metrics(config.train.metrics, len(dataset.classes))
    try_augmentations(config)
    try_head(config, len(dataset.classes))
    per_epoch = steps_per_epoch(len(splits.train), config.train.batch_size)
    if config.features.cached:
        prepared = prepared or prepare(config, (dataset, splits))
        maps = MapEngine(config, prepared.programs, prepared.features, (dataset, splits), signals)
        return _Plan(dataset, splits, prepared.programs.model, maps, lambda pretrained: maps.start())
    loss = loss_of(config, dataset, splits)
    model = create(config.model, len(dataset.classes), config.train.dtype)
    size = config.train.batch_size // config.train.accumulate
    parallel = Parallel.of(config.train, size)
    shapes = jax.eval_shape(lambda: folder.new_variables(config, model, pretrained=False))
    plans = plan_stages(config, per_epoch, model, shapes["batch_stats"])
    shared: dict[str, Any] = {"loss": loss, "per_epoch": per_epoch, "parallel": parallel, "signals": signals}
    images = ImageEngine(config, model, plans, (dataset, splits), **shared)

    def start(pretrained: bool) -> TrainState:
        variables = folder.new_variables(config, model, pretrained=pretrained)
        first, ema = plans[0], config.train.ema_decay is not None
        return create_state(variables, first.optimizer.tx, first.is_trainable, seed=config.seed, ema=ema)

    return _Plan(dataset, splits, model, images, start)


def loss_of(config: Config, dataset: Dataset, splits: Splits) -> Loss:
    """The configured loss, by the classes' counts in the training split."""
    return make_loss(config.train, np.bincount(dataset.labels[splits.train], minlength=len(dataset.classes)))


def prepare(config: Config, data: tuple[Dataset, Splits] | None = None, shared: Prepared | None = None) -> Prepared:
    """What runs on cached features need; maps, and data where they are not given, are taken from `shared`, if given."""
    check_cached(config)
    if shared is not None:
        dataset, splits, features = shared.dataset, shared.splits, shared.features
    else:
        dataset, splits = data or _new_data(config)
        features = FeatureMaps(config, dataset)
    per_epoch = steps_per_epoch(len(splits.train), config.train.batch_size)
    loss = loss_of(config, dataset, splits)
    programs = Programs(config, len(dataset.classes), features.shape, per_epoch, loss)
    return Prepared(dataset, splits, features, programs, config.data.fold)


def _new_data(config: Config) -> tuple[Dataset, Splits]:
    dataset = load_dataset(config.data)
    return dataset, split_dataset(dataset, config.data)


@dataclasses.dataclass(frozen=True)
class _One:
    """How one run is trained, whatever it is; `quiet` where it is one of several."""

    resume: bool
    callbacks: Sequence[Callback]
    signals: Signals
    files: Sequence[Path]
    finish: Finish | None
    quiet: bool


def _train(config: Config, run_dir: Path, plan: _Plan, one: _One, ended: tuple[int, int] | None) -> Result:
    """Trains what is left to train, and reports. `ended`: the steps and the best one, where only that is missing."""
    engine, dataset, splits, signals = plan.engine, plan.dataset, plan.splits, one.signals
    resumes = one.resume and hosts.told(Checkpoints(run_dir / "checkpoints/last").latest() is not None)
    # A checkpoint holds every array, so a resume needs the weights' file no longer.
    state = plan.start(not resumes and ended is None)
    with hosts.together("the run was recorded"):
        run_id = _record(config, run_dir, dataset, splits, one.files) if hosts.leads() else ""
    cached, several = config.features.cached, hosts.several()
    minutes = config.train.checkpoint_minutes
    # Without a split to report on nothing says that the run is finished but its last checkpoint.
    best_alone = not config.train.keep_last and bool(wanted(config, splits))
    keeper = Keeper(
        run_dir,
        engine,
        least_seconds=_MAPS_CHECKPOINT_SECONDS if cached else 0.0,
        # Clocks of several hosts differ, and all must save at the same step.
        most_seconds=math.inf if minutes is None or several else 60 * minutes,
        # Orbax's processes meet by the number of a save, which two saves at a time would confuse.
        one_at_a_time=cached or several,
        keeps_best=cached,  # a head, which a checkpoint holds with the whole network
        ends_with_best=cached and best_alone,
    )
    progress = Progress(run_id=run_id)
    if resumes:
        first = state
        progress, state = keeper.newest(
            lambda p: first.replace(opt_state=engine.plans[p.stage].opt_state(first.params))
        )
        log.info("%s: resumed at step %d", run_dir, int(state.step))
    total = engine.plans[-1].end
    log.info("%d images to train on, %d steps an epoch, %d steps", len(splits.train), engine.per_epoch, total)
    tracker = make_tracker(
        *(config.tracking, run_dir, progress.run_id, dataclasses.asdict(config), jax.process_index()),
        resumed_at=ended[0] if ended else int(state.step),
    )
    recorder = Recorder(progress, tracker, dataset, one.callbacks, total=total, quiet=one.quiet)
    with contextlib.closing(tracker), hosts.closing(keeper), contextlib.closing(recorder):
        if ended and not resumes:
            (step, progress.best_step), whole = ended, True
        else:
            step, whole = fit(config, engine, state, recorder, keeper, signals)
        results: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(Interrupted):
            if whole:
                results = _results(config, run_dir, plan, keeper, progress, state)
        if not whole or len(results) < len(wanted(config, splits)):
            assert signals.stop is not None
            level = logging.DEBUG if signals.stop is Pause.PAUSE else logging.WARNING
            log.log(level, "%s: stopped by %s at step %d; resume with --resume", run_dir, signals.stop.name, step)
            return Result(run_dir, {}, step, (dataset, splits), interrupted=signals.stop.name)
        if results and hosts.leads():
            pages = one.finish(run_dir, dataset, splits) if one.finish else ()
            track_results(run_dir, tracker, dataset, results, pages)
    if best_alone and hosts.leads():
        shutil.rmtree(run_dir / "checkpoints/last", ignore_errors=True)
    return Result(run_dir, results, step, (dataset, splits))


def _record(config: Config, run_dir: Path, dataset: Dataset, splits: Splits, files: Sequence[Path]) -> str:
    """Writes what the run is, now that all is checked; returns its id."""
    folder.write_config(run_dir, config)
    folder.record_split(run_dir, dataset, splits)
    return identity.record(run_dir, new_run_id(), config, files)


def _results(
    config: Config, run_dir: Path, plan: _Plan, keeper: Keeper, progress: Progress, state: TrainState
) -> dict[str, dict[str, Any]]:
    """The metrics of each split by the best checkpoint.

    The test split is opened once: a run that was finished before and is resumed keeps what it found.
    """
    whole = plan.engine.whole(state)
    template = {"params": whole.params, "batch_stats": whole.batch_stats}
    step, variables = keeper.best_variables(progress.best_step, template, config.train.ema_decay is not None)
    trained = Run(run_dir, config, plan.model, variables, plan.dataset.classes, step)
    results = {}
    for split in wanted(config, plan.splits):
        known = hosts.told(folder.saved_results(run_dir).get("test") if split == "test" else None)
        if known is None or known["step"] != step:
            known = evaluate_run(trained, split, "best", plan.engine.predictor, plan.dataset, plan.splits)
        results[split] = known
    return results
