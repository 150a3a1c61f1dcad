"""Trains attention and head on cached feature maps: what loop.train does with a frozen backbone, an epoch a program.

Same batches, dropout, optimizer and selection as end to end: on plain images both give the same numbers but for
rounding. Runs over seeds are trained by themselves, one after another or each by a thread (bmjax/compare.py);
`tools/bench_heads.py --stack` asks whether `vmap` over them is faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax import convolution, loop
from bmjax.checkpoint import save_one
from bmjax.config import AugmentConfig, Config
from bmjax.data import Dataset, Splits, load_dataset, split_dataset
from bmjax.data.pipeline import batch_places, steps_per_epoch
from bmjax.features import FeatureMaps
from bmjax.loop import Result, Signals, SplitName
from bmjax.losses import make_loss
from bmjax.model import at_last, create, pools_first, resolve
from bmjax.progress import Progress, log_step
from bmjax.run import Run, image_dtype, open_run, record_split, recorded_split, run_folder, saved_results
from bmjax.state import TrainState, Tree, create_state
from bmjax.tracking import make_tracker, new_run_id

log = logging.getLogger(__name__)
_OFF = AugmentConfig(flip=False, right_angles=False)
_VIEW = 0x76696577  # folded into a step's key for the draw of views, apart from the keys that every step draws


def check(config: Config) -> None:
    """Fails where maps can't be cached, or training on them would not see what the configuration says.

    Raises:
      ValueError: names the field, its value and what was expected.
    """
    if not at_last(create(config.model, 2, config.train.dtype)):
        raise ValueError(f"config field 'model.attach' is {config.model.attach!r}; expected 'last' for cached features")
    for i, stage in enumerate(config.stages):
        if "backbone" in stage.train:
            raise ValueError(f"config field 'stages.{i}.train' is {stage.train!r}; cached features need it frozen")
        mode = stage.resolved_batch_norm().backbone
        if mode == "train":
            raise ValueError(f"config field 'stages.{i}.batch_norm.backbone' is {mode!r}; expected 'frozen' or 'auto'")
    if config.features.views == 0 and config.augment != _OFF:
        raise ValueError(
            f"config field 'augment' is {config.augment!r}, but with 'features.views' 0 training sees images as they "
            "are; expected everything off (--augment.flip false --augment.right_angles false), or views > 0"
        )
    if config.augment.mixes:
        field = "mixup" if config.augment.mixup else "cutmix"
        raise ValueError(
            f"config field 'augment.{field}' is {getattr(config.augment, field)}; expected 0 for cached features, for "
            "images are mixed with others of the step's batch"
        )
    if config.features.views and config.augment == _OFF:
        raise ValueError(
            f"config field 'features.views' is {config.features.views}; expected 0, for nothing is augmented"
        )
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes; cached features are trained on by one")


class MapPredictor(loop.Predictor):
    """Probabilities of a dataset's rows from their cached maps, in evaluation mode; takes a Predictor's place."""

    def __init__(self, programs: Programs, features: FeatureMaps):
        self._programs, self._features = programs, features

    def __call__(self, variables: Tree, dataset: Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities float32 [n, k], rows [n])."""
        del dataset
        maps = self._features.on_device(rows, self._programs.pooled)
        logits = np.asarray(self._programs.logits(variables, maps), np.float64)
        return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)).astype(np.float32), rows


class Programs:
    """What is compiled for one configuration, whatever its seed: runs over seeds share it.

    `pooled` says whether maps are pooled before attention, which is the same (see `model.pools_first`). `scans` says
    of each stage that has begun whether an epoch is one program; on CPUs some convolutions are too slow in one (see
    `convolution.slow_in_loop`), and the steps are programs then.
    """

    def __init__(self, config: Config, dataset: Dataset, splits: Splits, shape: tuple[int, int, int]):
        self._config = config
        self.model = create(config.model, len(dataset.classes), config.train.dtype)
        # Many times less to compute, and to read.
        self.pooled = pools_first(self.model)
        self._shape = (1, 1, shape[-1]) if self.pooled else shape
        self.per_epoch = steps_per_epoch(len(splits.train), config.train.batch_size)
        counts = np.bincount(dataset.labels[splits.train], minlength=len(dataset.classes))
        self._loss = make_loss(config.train, counts)
        template = jax.eval_shape(self._init, 0)
        self.plans = loop.plan_stages(config, self.per_epoch, self.model, template["batch_stats"])
        self.init = jax.jit(self._init)
        self.logits = jax.jit(self._logits)
        self._epochs: dict[int, Callable[..., tuple[TrainState, dict[str, jax.Array]]]] = {}
        self.scans: dict[int, bool] = {}
        self._first = threading.Lock()

    def _init(self, seed: int) -> dict[str, Tree]:
        """The variables of attention and head that loop.train starts from with this seed."""
        zeros = jnp.zeros((1, *self._shape))
        variables = self.model.init(jax.random.key(seed), zeros, train=False, start="feature_map")
        variables = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
        return jax.tree.map(lambda x: x.astype(image_dtype(self._config)), variables)

    def _logits(self, variables: Tree, maps: jax.Array) -> jax.Array:
        """Logits [n, k] of maps [n, h, w, c], in batches of `eval_batch_size`."""
        n, size = len(maps), min(self._config.train.eval_batch_size, len(maps))
        places = np.minimum(np.arange(-(-n // size) * size), n - 1).reshape(-1, size)  # the last batch is padded

        def one(chosen: jax.Array) -> Any:
            return self.model.apply(variables, maps[chosen], train=False, start="feature_map")

        return jax.lax.map(one, jnp.asarray(places)).reshape(-1, self.model.head.num_classes)[:n]

    def epoch(self, stage: int) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """epoch(state, maps [v n, h, w, c], labels [n], places int [steps, b]) -> (state, metrics [steps])."""
        if stage not in self._epochs:
            self._epochs[stage] = self._make_epoch(stage)
        return self._epochs[stage]

    def _make_epoch(self, stage: int) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        step = loop.stage_step(self._config, self.model, self.plans[stage], self._loss)

        def one(state: TrainState, maps: jax.Array, labels: jax.Array, places: jax.Array):
            # Which of its views an image shows is a function of seed and step, as augmentation is end to end.
            key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), _VIEW)
            views = jax.random.randint(key, places.shape, 0, len(maps) // len(labels))
            return step(state, {"feature_map": maps[views * len(labels) + places], "label": labels[places]})

        def scanned(state: TrainState, maps: jax.Array, labels: jax.Array, places: jax.Array):
            with convolution.inside_loop():
                return jax.lax.scan(lambda state, chosen: one(state, maps, labels, chosen), state, places)

        def stepped(state: TrainState, maps: jax.Array, labels: jax.Array, places: np.ndarray):
            metrics = []
            for chosen in places:
                state, values = step_program(state, maps, labels, chosen)
                metrics.append(values)
            return state, {name: jnp.stack([values[name] for values in metrics]) for name in metrics[0]}

        epoch_program = jax.jit(scanned)
        step_program = jax.jit(one)

        def epoch(state: TrainState, maps: jax.Array, labels: jax.Array, places: np.ndarray):
            if stage not in self.scans:
                with self._first:  # a run of another seed beside this one waits instead of compiling the same
                    if stage not in self.scans:
                        jaxpr = epoch_program.trace(state, maps, labels, places).jaxpr
                        scans = not convolution.slow_in_loop(jaxpr)
                        result = (epoch_program if scans else stepped)(state, maps, labels, places)
                        self.scans[stage] = scans
                        return result
            return (epoch_program if self.scans[stage] else stepped)(state, maps, labels, places)

        return epoch


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What runs of one experiment share: data, maps and, of one configuration but for the seed, programs."""

    dataset: Dataset
    splits: Splits
    features: FeatureMaps
    programs: Programs


def prepare(config: Config, shared: Prepared | None = None) -> Prepared:
    """Loads the data and the backbone and sets up the programs; data and maps are taken from `shared`, if given."""
    check(config)
    if shared is None:
        dataset = load_dataset(config.data)
        splits, features = split_dataset(dataset, config.data), FeatureMaps(config, dataset)
    else:
        dataset, splits, features = shared.dataset, shared.splits, shared.features
    return Prepared(dataset, splits, features, Programs(config, dataset, splits, features.shape))


def train(config: Config, *, resume: bool = False) -> Result:
    """Trains a configuration: on cached features where `features.cached` is set, else as `loop.train`.

    Raises as `loop.train`, and:
      ValueError: cached features are asked for and don't fit the configuration, or the split to resume is another.
    """
    return train_on_features(config, resume=resume) if config.features.cached else loop.train(config, resume=resume)


def train_on_features(
    config: Config, *, resume: bool = False, prepared: Prepared | None = None, signals: Signals | None = None
) -> Result:
    """As `loop.train`, of a frozen backbone, on its cached feature maps and one device.

    The folder is that of any run; its best checkpoint holds the whole network. With `resume` a finished run is left
    as it is, and one that was cut off begins anew. `prepared`: see `prepare`. `signals`: those of the caller, where
    several runs train at once; else its own.
    """
    config = dataclasses.replace(config, model=resolve(config.model))
    run_dir = run_folder(config)
    check(config)
    open_run(run_dir, config, resume)
    shared = prepared or prepare(config)
    dataset, splits, features, programs = shared.dataset, shared.splits, shared.features, shared.programs
    if (recorded := recorded_split(run_dir, dataset)) is None:
        record_split(run_dir, dataset, splits)
    elif any(not np.array_equal(getattr(recorded, s), getattr(splits, s)) for s in ("train", "val", "test")):
        raise ValueError(
            f"{run_dir / 'split.csv'}: the run began with another split than the configuration now gives; "
            "expected the same (a record can be given back as data.manifest)"
        )
    wanted: tuple[SplitName, ...] = ("train", "val", "test") if config.train.final_test else ("train", "val")
    if wanted[-1] in (found := saved_results(run_dir)):
        return Result(run_dir, {s: found[s] for s in wanted}, found[wanted[-1]]["step"], (dataset, splits))
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)

    plans, per_epoch, variables = programs.plans, programs.per_epoch, programs.init(config.seed)
    ema = config.train.ema_decay is not None
    state = create_state(variables, plans[0].optimizer.tx, plans[0].is_trainable, seed=config.seed, ema=ema)
    best, progress, step = state, Progress(run_id=new_run_id()), 0
    maps, labels = features.views_on_device(splits.train, programs.pooled), jnp.asarray(dataset.labels[splits.train])
    predictor = MapPredictor(programs, features)

    def draw(step: int) -> np.ndarray:
        of = dataset.labels[splits.train]
        return batch_places(of, config.train.batch_size, config.seed, step, per_epoch, config.train.sampling)

    def evaluate_split(state: TrainState, split: SplitName) -> dict[str, Any]:
        return predictor.metrics(state.variables(), dataset, getattr(splits, split))

    tracker = make_tracker(config.tracking, run_dir, progress.run_id, dataclasses.asdict(config))
    with contextlib.closing(tracker), contextlib.nullcontext(signals) if signals else Signals() as signals:
        while step < plans[-1].end and not progress.stopped_early:
            if signals.stop is not None:
                log.warning("%s: stopped by %s; a resume begins this run anew", run_dir, signals.stop.name)
                return Result(run_dir, {}, step, (dataset, splits), interrupted=signals.stop.name)
            if step >= plans[progress.stage].end:  # other parameters train now: the optimizer starts anew
                progress.stage += 1
                state = state.replace(opt_state=plans[progress.stage].opt_state(state.params))
            plan = plans[progress.stage]
            places = draw(step)
            rates = plan.optimizer.rates_at(state.opt_state)(np.arange(step, step + per_epoch) - plan.start)
            began = time.perf_counter()
            state, metrics = programs.epoch(progress.stage)(state, maps, labels, places)
            if step + per_epoch < plans[-1].end:
                draw(step + per_epoch)  # the next epoch's, kept there, while the device is busy with this one
            on_host = {name: np.asarray(values) for name, values in metrics.items()}
            rows, speed = splits.train[places], places.size / (time.perf_counter() - began)
            for i, lr in enumerate(rates.tolist()):
                step += 1
                values = {name: column[i].item() for name, column in on_host.items()}
                log_step(step, values, rows[i], lr, speed, progress, tracker, dataset)
            state, is_best = loop.end_epoch(
                config, state, progress, tracker, evaluate_split, plan.optimizer, is_last=step == plans[-1].end
            )
            if is_best:
                best = state
        save_best(run_dir, best, features, progress)
        trained = Run(run_dir, config, programs.model, best.variables(), dataset.classes, progress.best_step)
        results = {s: loop.evaluate_run(trained, s, "best", predictor, dataset, splits) for s in wanted}
        loop.track_results(run_dir, tracker, dataset, results)
    return Result(run_dir, results, step, (dataset, splits))


def save_best(run_dir: Path, state: TrainState, features: FeatureMaps, progress: Progress) -> None:
    """Saves a state as the best checkpoint of a run, the backbone that it lacks included."""

    def whole(variables: dict[str, Tree] | None) -> Any:
        return variables and {name: tree | features.backbone[name] for name, tree in variables.items()}

    both = whole({"params": state.params, "batch_stats": state.batch_stats})
    full = state.replace(**both, ema=whole(state.ema))
    save_one(run_dir / "checkpoints/best", jax.tree.map(np.asarray, full), dataclasses.asdict(progress))
