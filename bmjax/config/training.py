"""The optimizer, the stages, the loop, cached features and tracking."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from bmjax.config.checks import check, check_part, check_parts, check_types
from bmjax.registry import label_of, unknown

BatchNormMode = Literal["auto", "train", "stats_frozen", "frozen"]

PARTS = ("backbone", "attention", "head")
OPTIMIZERS = ("adagrad", "adadelta", "adamax", "rmsprop", "sgd", "adam", "adamw")
LOSSES = ("cross_entropy",)
MONITORS = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps of one stage."""

    kind: Literal["constant", "cosine", "step", "plateau"] = "constant"
    warmup_epochs: float = 0.0
    """Linear warm-up from zero."""
    final: float = 0.0
    """cosine: the share of the peak rate reached at the end."""
    step_epochs: float = 10.0
    """step: epochs between two drops."""
    factor: float = 0.1
    """step and plateau: what the rate is multiplied by at a drop."""
    patience: int = 3
    """plateau: epochs of validation loss without improvement before a drop."""

    def __post_init__(self) -> None:
        check_types(self, "optim.schedule.")
        check(self.warmup_epochs >= 0, "optim.schedule.warmup_epochs", self.warmup_epochs, ">= 0")
        check(self.step_epochs > 0, "optim.schedule.step_epochs", self.step_epochs, "> 0")
        check(0 < self.factor <= 1, "optim.schedule.factor", self.factor, "in 0..1, 0 excluded")
        check(0 <= self.final <= 1, "optim.schedule.final", self.final, "in 0..1")
        check(self.patience >= 1, "optim.schedule.patience", self.patience, ">= 1")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Unset numbers (None) come from the preset."""

    name: str = "adamax"
    """One of the built-in ones (`bmjax list optimizers`); `optax:NAME`, any of optax; or one of yours, `module:name` or
    `path.py`: a function of (learning_rate, **options) that gives an optax.GradientTransformation."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of an optimizer of optax or yours."""
    preset: Literal["keras", "tuned"] = "tuned"
    """`keras`: Keras 3's defaults and its order of momentum under a schedule: each step's gradient enters the buffer
    times the rate of that step, so that a falling rate works through as the buffer forgets. `tuned` (ours): rates that
    put the optimizers on a comparable footing (adagrad 1e-2, adadelta 1, adamax 2e-3, rmsprop 3e-4, adam and adamw
    1e-3, sgd 1e-2 with Nesterov's momentum of 0.9), and optax's order: the buffer holds gradients, and the rate of the
    day multiplies all of it, so that a falling rate works at once. The two are the same while the rate is constant."""
    lr: float | None = None
    """Peak learning rate."""
    momentum: float | None = None
    """sgd and rmsprop."""
    nesterov: bool | None = None
    """sgd."""
    weight_decay: float = 0.0
    """Decoupled decay, times the learning rate; skips biases, norms and every one-dimensional leaf."""
    clip_norm: float | None = None
    """Clips the global norm of the gradient."""
    layer_decay: float = 1.0
    """Learning-rate multiplier by depth: each stage of the backbone below the last gets another factor."""
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        check_part(self, "name", "optim.name", OPTIMIZERS)
        check_types(self, "optim.")
        check(self.lr is None or self.lr > 0, "optim.lr", self.lr, "> 0 or none")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        check(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "> 0 or none")
        check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in 0..1, 0 excluded")


@dataclasses.dataclass(frozen=True)
class BatchNormConfig:
    """Batch-norm mode of each part.

    `train`: batch statistics, running ones updated. `stats_frozen`: stored statistics, not updated; scale and
    bias still train. `frozen`: stored statistics, nothing trains. `auto` (in a stage only): `train` where the part
    trains, else `frozen`, as in Keras.
    """

    backbone: BatchNormMode = "train"
    attention: BatchNormMode = "train"
    head: BatchNormMode = "train"

    def __post_init__(self) -> None:
        check_types(self, "stages.batch_norm.")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stretch of training: which parts train, for how long, at what share of the rate."""

    epochs: int = 10
    train: tuple[Literal["backbone", "attention", "head"], ...] = PARTS  # type: ignore[assignment]
    """Parts whose parameters train; only these are differentiated."""
    lr_scale: float = 1.0
    """Multiplies the optimizer's peak learning rate in this stage."""
    batch_norm: BatchNormConfig = BatchNormConfig(backbone="auto", attention="auto", head="auto")

    def resolved_batch_norm(self) -> BatchNormConfig:
        """The modes with `auto` decided: `train` where the part trains, else `frozen`."""

        def mode(part: str) -> BatchNormMode:
            chosen: BatchNormMode = getattr(self.batch_norm, part)
            if chosen != "auto":
                return chosen
            return "train" if part in self.train else "frozen"

        return BatchNormConfig(mode("backbone"), mode("attention"), mode("head"))

    def __post_init__(self) -> None:
        check_types(self, "stages.")
        check(self.epochs >= 1, "stages.epochs", self.epochs, "at least 1")
        check(len(self.train) > 0, "stages.train", self.train, "at least one part")
        check(self.lr_scale > 0, "stages.lr_scale", self.lr_scale, "> 0")


def mesh_axes(text: str) -> dict[str, int]:
    """The sizes of the axes `data` and `model` of a mesh as `train.mesh` writes it; `data` -1 stands for the rest.

    Raises:
      ValueError: it is not of that form.
    """
    axes = {"data": -1, "model": 1}
    parts = [part.partition("=") for part in text.replace(" ", "").split(",")]
    names = [name for name, _, _ in parts]
    least = {"data": -1, "model": 1}
    for name, _, size in parts:
        whole = size.removeprefix("-").isdecimal()
        ok = name in axes and names.count(name) == 1 and whole and int(size) >= least[name] and int(size) != 0
        check(ok, "train.mesh", text, "data=N, or data=N,model=M (data=-1: as many as there are)")
        axes[name] = int(size)
    return axes


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    batch_size: int = 32
    """Global batch size, over all devices and hosts."""
    eval_batch_size: int = 64
    accumulate: int = 1
    """Micro-batches per update; divides batch_size. Batch-norm sees micro-batches."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type; parameters stay float32 (float64 is for proofs and needs JAX_ENABLE_X64)."""
    precision: Literal["default", "highest", "bfloat16_3x"] = "default"
    """Of products and convolutions in float32. `default`: the device's own, which on GPUs is TF32 (10 bits of
    mantissa), on TPUs bfloat16, on CPUs float32. `highest`: float32 everywhere, several times slower on GPUs and TPUs.
    `bfloat16_3x`: on TPUs three products of bfloat16, near float32; on GPUs it is TF32. Other types do not care."""
    parallel: Literal["jit", "pmap"] = "jit"
    devices: int | None = None
    """Number of devices, over all hosts; none: all."""
    mesh: str = "data=-1"
    """How the devices are laid out: `data=4` divides each batch over four, `data=4,model=2` divides kernels over two
    devices besides, by their output channels; `data=-1`: as many as there are, as far as the batch divides."""
    shard_params: bool = False
    """Divide parameters, moving average and optimizer state over `data` too, so that a device holds its part alone and
    gathers the others when it needs them: less memory, more traffic. Arrays of at least 1,024 values, each along its
    longest side that divides; the others stay whole."""
    logical_shards: int | None = None
    """Compute each batch in so many parts, whatever the number of devices, and add up their gradients in a fixed order:
    the same bits on any number of devices that leaves each two parts or more, of one kind of device and version.
    Batch-norm then sees a part (a ghost batch) alone; each device holds the gradient of all its parts. None: off."""
    remat: tuple[str, ...] = ()
    """Stages of the backbone whose feature maps are computed again on the way back instead of being kept, as in
    `--train.remat conv2 conv3`; `all`: each. Less memory, about a third more work, the same numbers."""
    loss: str = "cross_entropy"
    """`cross_entropy`, as the fields below say; or one of yours, `module:name` or `path.py`: make(counts [k],
    **options) gives loss(logits [b, k], labels int [b]) -> [b]."""
    loss_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of a loss of yours."""
    metrics: tuple[str, ...] = ()
    """Figures of yours, computed wherever the built-in ones are: `module:name` or `path.py` of a function of
    (labels int [n], probs [n, k]) that gives a number."""
    label_smoothing: float = 0.0
    sampling: Literal["uniform", "balanced"] = "uniform"
    """`balanced`: every class is drawn equally often, each of its images once before one comes again. An epoch has as
    many steps as ever."""
    class_weights: Literal["none", "balanced", "effective"] = "none"
    """`balanced`: each class's loss weighs n / (k * n_class). `effective`: by its effective number of images."""
    effective_beta: float = 0.999
    """For class_weights `effective`: 0 weighs classes alike, near 1 as `balanced` does."""
    logit_adjustment: float = 0.0
    """tau: adds tau * log(share of the class) to the logits in training; 1 aims at balanced accuracy, 0 is off."""
    focal_gamma: float = 0.0
    """Focal loss: each image's loss times (1 - p)^gamma, p the probability of its class; 0 is off."""
    ema_decay: float | None = None
    """Exponential moving average of parameters and statistics together; evaluated and kept if set."""
    checkpoint_epochs: int = 1
    """Epochs between `last` checkpoints."""
    checkpoint_steps: int | None = None
    """Also every so many steps."""
    checkpoint_minutes: float | None = 15.0
    """Also after so many minutes without one, between two steps, on one host; none: never."""
    keep_last: bool = True
    """Keep `checkpoints/last` of a finished run. False: once its results are there, `best` alone stays; with cached
    features the last `last` is not even written. For sweeps and comparisons of many runs: less disk, less time."""
    profile: str | None = None
    """`10:15` writes a trace of the steps from 10 to 15 into the run's folder (`profile/`), for XProf, TensorBoard or
    Perfetto; with cached features of the whole stretches that hold them. none: no trace."""
    train_eval_epochs: int = 1
    """Epochs between evaluations of the train split in eval mode; 0: only at the end. Each costs a forward pass of the
    whole train split, about a third of an epoch's time."""
    recompute_statistics: Literal["auto", "always", "never"] = "auto"
    """Whether batch-norm's running statistics are recomputed after each epoch, before it is evaluated, by one pass over
    the training images as evaluation sees them. `auto`: where the norms of a part go by the batch for fewer than 299
    steps in all, after which the running ones would still hold over 5 % of what they began with."""
    monitor: str = "accuracy"
    """Validation figure that picks the best checkpoint and drives early stopping: a built-in one (accuracy, macro_f1,
    balanced_accuracy, loss, ece) or one of `metrics`, by its short name. The largest is the best; the smallest after a
    minus sign, as in `-loss` (and of `loss` and `ece` in any case)."""
    early_stop_epochs: int | None = None
    """Stop after so many epochs without improvement of `monitor`; none: never."""
    final_test: bool = False
    """Open the test split once, at the end, with the best checkpoint."""
    workers: int = 2
    """Threads that read ahead."""

    @property
    def monitor_falls(self) -> bool:
        """Whether the smallest of the monitored figure is the best."""
        return self.monitor.startswith("-") or self.monitor in ("loss", "ece")

    def __post_init__(self) -> None:
        check_part(self, "loss", "train.loss", LOSSES)
        check_parts(self, "metrics", "train.metrics")
        check_types(self, "train.")
        check(self.batch_size >= 1, "train.batch_size", self.batch_size, ">= 1")
        check(self.eval_batch_size >= 1, "train.eval_batch_size", self.eval_batch_size, ">= 1")
        ok = self.accumulate >= 1 and self.batch_size % self.accumulate == 0
        check(ok, "train.accumulate", self.accumulate, f"a divisor of batch_size ({self.batch_size})")
        check(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "in 0..1, 1 excluded")
        check(0 <= self.effective_beta < 1, "train.effective_beta", self.effective_beta, "in 0..1, 1 excluded")
        check(self.logit_adjustment >= 0, "train.logit_adjustment", self.logit_adjustment, ">= 0")
        check(self.focal_gamma >= 0, "train.focal_gamma", self.focal_gamma, ">= 0")
        corrections = {
            "sampling": self.sampling != "uniform",
            "class_weights": self.class_weights != "none",
            "logit_adjustment": self.logit_adjustment > 0,
        }
        several = [name for name, is_set in corrections.items() if is_set]
        expected = "one correction of class frequencies; two would correct twice"
        check(len(several) < 2, "train", " and ".join(several), expected)
        own = self.loss != "cross_entropy"
        check(own or not self.loss_options, "train.loss_options", self.loss_options, "{} for cross_entropy")
        used = self.label_smoothing or self.focal_gamma or self.class_weights != "none" or self.logit_adjustment
        check(not (own and used), "train.loss", self.loss, "cross_entropy, for its own fields are set beside it")
        monitored = self.monitor.removeprefix("-")
        known = (*MONITORS, *map(label_of, self.metrics))
        if monitored not in known:
            raise ValueError(f"config field 'train.monitor' is {self.monitor!r}: {unknown('figure', monitored, known)}")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "train.ema_decay", self.ema_decay, "in 0..1 or none")
        check(self.checkpoint_epochs >= 1, "train.checkpoint_epochs", self.checkpoint_epochs, ">= 1")
        check(
            self.checkpoint_steps is None or self.checkpoint_steps >= 1,
            "train.checkpoint_steps",
            self.checkpoint_steps,
            ">= 1",
        )
        steps = [int(n) if n.isdecimal() else -1 for n in (self.profile or "0:1").split(":")]
        check(len(steps) == 2 and 0 <= steps[0] < steps[1], "train.profile", self.profile, "START:END, as 10:15")
        minutes = self.checkpoint_minutes
        check(minutes is None or minutes > 0, "train.checkpoint_minutes", minutes, "> 0 or none")
        check(self.train_eval_epochs >= 0, "train.train_eval_epochs", self.train_eval_epochs, ">= 0")
        check(self.devices is None or self.devices >= 1, "train.devices", self.devices, ">= 1 or none")
        check(
            self.early_stop_epochs is None or self.early_stop_epochs >= 1,
            "train.early_stop_epochs",
            self.early_stop_epochs,
            ">= 1",
        )
        mesh_axes(self.mesh)
        divided = self.shard_params or mesh_axes(self.mesh)["model"] > 1
        check(
            not divided or self.parallel == "jit", "train.parallel", self.parallel, "'jit' for a state that is divided"
        )
        if (shards := self.logical_shards) is not None:
            ok = shards >= 2 and self.batch_size % shards == 0
            check(ok, "train.logical_shards", shards, f"a divisor of batch_size ({self.batch_size}), at least 2")
            whole = self.accumulate == 1 and self.parallel == "jit" and not divided
            expected = "none with accumulate, pmap, shard_params or an axis 'model'"
            check(whole, "train.logical_shards", shards, expected)
        check(self.workers >= 1, "train.workers", self.workers, ">= 1")


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Training on a frozen backbone's feature maps, computed once and kept on disk."""

    cached: bool = False
    """Train attention and head on the cached maps; the backbone must be frozen in every stage."""
    views: int = 0
    """Augmented views of each training image, of which each step draws one; 0: the image as it is."""
    seed: int = 0
    """Seed of the views, apart from the run's seed, so that runs over seeds share them."""

    def __post_init__(self) -> None:
        check_types(self, "features.")
        check(self.views >= 0, "features.views", self.views, ">= 0")
        check(0 <= self.seed < 2**31, "features.seed", self.seed, "0..2**31-1")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases; the JSONL record on disk is always kept."""

    wandb: Literal["off", "auto", "online", "offline"] = "off"
    """`auto`: online with a key and a network, else offline with a word on how to sync."""
    entity: str = ""
    """The user or team that the run is logged for; empty: the key's own."""
    project: str = "bmjax"
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    notes: str = ""
    """Shown with the run; any text."""

    def __post_init__(self) -> None:
        check_types(self, "tracking.")
