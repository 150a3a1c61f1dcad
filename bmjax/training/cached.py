"""Trains attention and head on a frozen backbone's cached feature maps, an epoch a program.

Same batches, dropout, optimizer and selection as on images: on plain images both give the same numbers but for
rounding. Runs over seeds are trained by themselves, one after another or each by a thread (bmjax/analysis/compare);
`tools/bench/bench_heads.py --stack` asks whether `vmap` over them is faster.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config.base import Config
from bmjax.config.data import AugmentConfig
from bmjax.data.batches import batch_places
from bmjax.data.dataset import Dataset
from bmjax.data.splits import Splits
from bmjax.layers.dispatch import fits_loop, inside_loop
from bmjax.layers.initial import evaluated
from bmjax.model.classifier import at_last, pools_first
from bmjax.model.create import create
from bmjax.model.parameters import Tree
from bmjax.runs.folder import image_dtype, run_folder
from bmjax.runs.metrics import classification_metrics, load_metrics
from bmjax.runs.state import TrainState, create_state
from bmjax.training.features import FeatureMaps
from bmjax.training.losses import Loss
from bmjax.training.predict import SplitName, softmax
from bmjax.training.progress import Recorder
from bmjax.training.signals import Signals
from bmjax.training.stages import StagePlan, Stretch, plan_stages, stage_step
from bmjax.training.statistics import statistics_step
from bmjax.training.steps import at_precision
from bmjax.training.watch import Clock, Profile

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
        raise ValueError(
            f"config field 'features.cached' is True; expected False with {jax.process_count()} processes, for cached "
            "features are trained on by one (compare: --end-to-end)"
        )


class Programs:
    """What is compiled for one configuration, whatever its seed: runs over seeds share it.

    `pooled` says whether maps are pooled before attention, which is the same (see `pools_first`). `scans` says of each
    stage that has begun whether an epoch is one program; on CPUs some operations are too slow in one (see `fits_loop`),
    and the steps are programs then.
    """

    def __init__(self, config: Config, classes: int, shape: tuple[int, int, int], per_epoch: int, loss: Loss):
        self._config, self._classes = config, classes
        self.model = create(config.model, classes, config.train.dtype)
        # Many times less to compute, and to read.
        self.pooled = pools_first(self.model)
        self._shape = (1, 1, shape[-1]) if self.pooled else shape
        self.per_epoch, self._loss = per_epoch, loss
        template = jax.eval_shape(self._init, 0)
        self.plans = plan_stages(config, self.per_epoch, self.model, template["batch_stats"])
        self.init = functools.partial(evaluated, self._init)
        self.logits = jax.jit(at_precision(self._logits, config.train.precision))
        self._epochs: dict[int, Callable[..., tuple[TrainState, dict[str, jax.Array]]]] = {}
        self._statistics: dict[int, Callable[[Tree, dict[str, jax.Array]], Tree]] = {}
        self.scans: dict[int, bool] = {}
        self._first = threading.Lock()

    def _init(self, seed: int) -> dict[str, Tree]:
        """The variables of attention and head that training on images starts from with this seed."""
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

        return jax.lax.map(one, jnp.asarray(places)).reshape(-1, self._classes)[:n]

    def epoch(self, stage: int) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """epoch(state, maps [v n, h, w, c], labels [n], places int [steps, b]) -> (state, metrics [steps])."""
        if stage not in self._epochs:
            self._epochs[stage] = self._make_epoch(stage)
        return self._epochs[stage]

    def statistics(self, stage: int) -> Callable[[Tree, dict[str, jax.Array]], Tree]:
        """The compiled statistics step of a stage, see bmjax.training.statistics."""
        step = jax.jit(statistics_step(self._config, self.model, self.plans[stage]))
        return self._statistics.setdefault(stage, step)

    def _make_epoch(self, stage: int) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        step = stage_step(self._config, self.model, self.plans[stage], self._loss)

        def one(state: TrainState, maps: jax.Array, labels: jax.Array, places: jax.Array):
            # Which of its views an image shows is a function of seed and step, as augmentation is end to end.
            key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), _VIEW)
            views = jax.random.randint(key, places.shape, 0, len(maps) // len(labels))
            return step(state, {"feature_map": maps[views * len(labels) + places], "label": labels[places]})

        def scanned(state: TrainState, maps: jax.Array, labels: jax.Array, places: jax.Array):
            with inside_loop():
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
                        scans = fits_loop(jaxpr)
                        result = (epoch_program if scans else stepped)(state, maps, labels, places)
                        self.scans[stage] = scans
                        return result
            return (epoch_program if self.scans[stage] else stepped)(state, maps, labels, places)

        return epoch


class MapPredictor:
    """Probabilities of a dataset's rows from their cached maps, in evaluation mode; takes a Predictor's place."""

    def __init__(self, config: Config, programs: Programs, features: FeatureMaps):
        self._programs, self._features = programs, features
        self._metrics = load_metrics(config.train.metrics)

    def __call__(self, variables: Tree, dataset: Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities float32 [n, k], rows [n]); the variables of the backbone are not needed."""
        del dataset
        maps = self._features.on_device(rows, self._programs.pooled)
        return softmax(np.asarray(self._programs.logits(_without_backbone(variables), maps))), rows

    def metrics(self, labels: np.ndarray, probs: np.ndarray, *, intervals: bool = False) -> dict[str, Any]:
        """As Predictor.metrics."""
        return classification_metrics(labels, probs, self._metrics, intervals=intervals)


def _without_backbone(variables: dict[str, Tree]) -> dict[str, Tree]:
    return {name: {k: v for k, v in tree.items() if k != "backbone"} for name, tree in variables.items()}


class MapEngine:
    """Trains on cached feature maps, an epoch a program, on one device: an engine of bmjax.training.loop."""

    def __init__(
        self, config: Config, programs: Programs, features: FeatureMaps, data: tuple[Dataset, Splits], signals: Signals
    ):
        self.plans: Sequence[StagePlan] = programs.plans
        self.per_epoch = programs.per_epoch
        self.predictor = MapPredictor(config, programs, features)
        self._config, self._programs, self._features = config, programs, features
        (self._dataset, self._splits), self._signals = data, signals
        self.validates = len(self._splits.val) > 0
        self._maps = features.views_on_device(self._splits.train, programs.pooled)
        profile = Profile(config.train.profile, run_folder(config) / "profile", self.plans[-1].end)
        self._clock, self._profile = Clock(), profile
        self._labels = jnp.asarray(self._dataset.labels[self._splits.train])

    def start(self) -> TrainState:
        """The state at step 0, of attention and head."""
        config, first = self._config, self.plans[0]
        variables, ema = self._programs.init(config.seed), config.train.ema_decay is not None
        return create_state(variables, first.optimizer.tx, first.is_trainable, seed=config.seed, ema=ema)

    def place(self, state: TrainState) -> TrainState:
        return jax.tree.map(jnp.asarray, state)

    def fetch(self, placed: TrainState) -> TrainState:
        return jax.tree.map(np.asarray, placed)

    def run(
        self,
        placed: TrainState,
        stretch: Stretch,
        rates: np.ndarray,
        recorder: Recorder,
        pause: Callable[[], bool] = lambda: False,
    ) -> tuple[TrainState, int]:
        """A stretch is one program, so a signal stops it before it begins, and nothing within it."""
        del pause
        if stretch.start == stretch.end or self._signals.stop is not None:
            return placed, stretch.start
        began, places = time.perf_counter(), self._draw(stretch.start, stretch.end)
        self._profile.before(stretch.start, stretch.end)
        with self._clock.on("compute"):
            placed, metrics = self._programs.epoch(stretch.stage)(placed, self._maps, self._labels, places)
            if stretch.end < self.plans[-1].end:
                self._draw(stretch.end, stretch.end + self.per_epoch)  # kept, while the device is busy with this one
            on_host = {name: np.asarray(values) for name, values in metrics.items()}
        self._profile.after(stretch.end, placed, last=stretch.end == self.plans[-1].end)
        rows, speed = self._splits.train[places], places.size / (time.perf_counter() - began)
        with self._clock.on("logging"):
            for i, lr in enumerate(rates.tolist()):
                values = {name: column[i].item() for name, column in on_host.items()}
                recorder.step(stretch.start + i + 1, values, rows[i], lr, speed)
        return placed, stretch.end

    def under_way(self, recorder: Recorder) -> None:
        """A stretch is short, and its steps have no states of their own."""

    def _draw(self, start: int, end: int) -> np.ndarray:
        """Places among the training rows of the batches [start, end)."""
        train = self._config.train
        of = self._dataset.labels[self._splits.train]
        return batch_places(of, train.batch_size, self._config.seed, start, end - start, train.sampling)

    def statistics(self, variables: Tree, stage: int) -> Iterator[Tree]:
        maps = self._features.on_device(self._splits.train, self._programs.pooled)
        for places in self._draw(0, self.per_epoch):
            measured = self._programs.statistics(stage)(variables, {"feature_map": maps[places]})
            yield jax.tree.map(np.asarray, measured)

    def evaluate(self, placed: TrainState, split: SplitName) -> dict[str, Any]:
        probs, done = self.predictor(placed.variables(), self._dataset, getattr(self._splits, split))
        return self.predictor.metrics(self._dataset.labels[done], probs)

    def figures(self) -> dict[str, float]:
        return self._clock.figures()

    def whole(self, state: TrainState) -> TrainState:
        """With the backbone, so that a checkpoint is that of any run."""

        def with_backbone(variables: dict[str, Tree] | None) -> Any:
            own = self._features.backbone
            return variables and {name: tree | own.get(name, {}) for name, tree in variables.items()}

        both = with_backbone({"params": state.params, "batch_stats": state.batch_stats})
        whole = state.replace(**both, ema=with_backbone(state.ema))
        return jax.tree.map(np.asarray, whole)

    def own(self, state: TrainState) -> TrainState:
        both = _without_backbone({"params": state.params, "batch_stats": state.batch_stats})
        return state.replace(**both, ema=state.ema and _without_backbone(state.ema))
