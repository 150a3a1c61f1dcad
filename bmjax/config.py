"""The configuration of a run: frozen dataclasses that round-trip to JSON.

An experiment file returns a `Config`; the command line overrides any field by its dotted name. Values are
checked by `from_json` and by `Config.__post_init__`, before any device work. Fields that hold "a part" name a
top-level group of parameters: ``backbone``, ``attention`` or ``head``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

BatchNormMode = Literal["auto", "train", "stats_frozen", "frozen"]
PARTS = ("backbone", "attention", "head")


def _check(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"config field {field!r} is {value!r}; expected {expected}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the cells come from and how they are split."""

    source: Literal["synthetic", "folder", "table", "archive", "tfds", "huggingface"] = "synthetic"
    """What `root` is. `folder`: one folder of images per class. `table`: a CSV or parquet file of path, label, and
    where known split and group. `archive`: a zip or tar of such a folder. `tfds`: what `bmjax data build` made.
    `huggingface`: what `datasets` saved to disk. `synthetic`: nothing; cells are rendered."""
    root: str = ""
    """The folder or file with the images (all sources but `synthetic`)."""
    image_size: int = 224
    """Images are resized to image_size x image_size pixels once, when the cache is built."""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of train, validation and test."""
    split_seed: int = 0
    """Seed of the split, apart from the run's seed, so that runs over seeds share one split."""
    split_by: Literal["image", "group", "block"] = "image"
    """What stays on one side: copies of an `image`; a `group` of the source (patient, slide); a `block` of images of
    one class with neighbouring file numbers, which often are of one slide. Copies stay together in each."""
    block_size: int = 100
    """File numbers to a block."""
    stratify: bool = False
    """Each class has its exact shares, where by default it has them up to chance. Added files then move a few others
    unless `manifest` holds them."""
    folds: int = 0
    """Cross-validation: the number of folds, of which `fold` is the test split and `split`'s first two shares divide
    the rest; 0: none. Repeats are further values of `split_seed`."""
    fold: int = 0
    """The fold that is the test split, from 0."""
    duplicates: str = ""
    """A CSV of path and group: images of one group are near duplicates and stay on one side."""
    manifest: str = ""
    """The split.csv of an earlier run: what it names keeps its side; only other images are assigned."""
    stain: Literal["none", "reinhard", "macenko"] = "none"
    """Normalisation of every image's stain, when it is read."""
    stain_reference: tuple[float, ...] = ()
    """What to normalise to, 6 numbers for `reinhard` or 8 for `macenko`, as `bmjax data stain FOLDER` prints them;
    empty: those of the marrow collection."""
    strict: bool = False
    """An unreadable image is an error instead of a line in the summary."""
    cache_dir: str = ""
    """Folder of the decoded-image cache; empty: the user's cache folder (BMJAX_CACHE or ~/.cache/bmjax)."""
    synthetic_per_class: int = 100
    """Cells rendered per class (source `synthetic`)."""

    def __post_init__(self) -> None:
        _check(self.image_size >= 16, "data.image_size", self.image_size, "at least 16 pixels")
        ok = len(self.split) == 3 and all(s > 0 for s in self.split)
        _check(
            ok and math.isclose(sum(self.split), 1.0, abs_tol=1e-6), "data.split", self.split, "three shares > 0, sum 1"
        )
        _check(self.block_size >= 1, "data.block_size", self.block_size, "at least 1")
        _check(self.folds == 0 or self.folds >= 2, "data.folds", self.folds, "0 or at least 2")
        _check(0 <= self.fold < max(self.folds, 1), "data.fold", self.fold, f"0 to {max(self.folds, 1) - 1}")
        numbers = {"none": 0, "reinhard": 6, "macenko": 8}[self.stain]
        expected = f"{numbers} numbers for stain {self.stain!r}, or none"
        ok = len(self.stain_reference) in (0, numbers)
        _check(ok, "data.stain_reference", self.stain_reference, expected)
        _check(self.synthetic_per_class >= 2, "data.synthetic_per_class", self.synthetic_per_class, "at least 2")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images, on the device; zero or False switches one off."""

    flip: bool = True
    """Mirror left-right and up-down, each with probability one half."""
    right_angles: bool = True
    """Rotate by 0, 90, 180 or 270 degrees, equally likely."""
    rotate: float = 0.0
    """Free rotation, uniform in +- this many degrees."""
    shift: float = 0.0
    """Shift, uniform in +- this share of the side."""
    zoom: float = 0.0
    """Zoom factor, uniform in 1 +- this."""
    brightness: float = 0.0
    """Added brightness, uniform in +- this share of 255."""
    contrast: float = 0.0
    """Contrast factor about the image mean, uniform in 1 +- this."""
    hue: float = 0.0
    """Hue rotation, uniform in +- this share of the full circle."""
    hed: float = 0.0
    """Stain jitter: the amounts of haematoxylin, eosin and DAB times 1 +- this, plus +- this optical
    density."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Random operations, before all others. `randaugment`: `policy_operations` of them at `policy_magnitude`;
    `trivialaugment`: one, at any strength."""
    policy_operations: int = 2
    """randaugment: operations in a row."""
    policy_magnitude: int = 9
    """randaugment: strength, 0..30."""
    erase: float = 0.0
    """Random erasing: the probability that a rectangle is filled with noise."""
    mixup: float = 0.0
    """alpha of mixup: images and labels are mixed with others' of the batch, shares drawn from Beta(alpha, alpha)."""
    cutmix: float = 0.0
    """alpha of cutmix, as mixup's; with both, each image is mixed by one of them, half and half."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of the batch."""
        return bool(self.mixup or self.cutmix)

    def __post_init__(self) -> None:
        for name in ("rotate", "shift", "zoom", "brightness", "contrast", "hue", "hed", "erase", "mixup", "cutmix"):
            _check(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "a number >= 0")
        _check(self.erase <= 1, "augment.erase", self.erase, "a probability, 0..1")
        _check(self.policy_operations >= 1, "augment.policy_operations", self.policy_operations, "at least 1")
        _check(0 <= self.policy_magnitude <= 30, "augment.policy_magnitude", self.policy_magnitude, "0..30")
        _check(self.zoom < 1, "augment.zoom", self.zoom, "a number < 1")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The classification head after pooling; the study names its layers, not their sizes or order: ours."""

    order: tuple[Literal["batch_norm", "dropout", "dense"], ...] = ("batch_norm", "dropout", "dense")
    """Layers before the final dense layer, in order; each `dense` takes the next of `widths`, with ReLU."""
    widths: tuple[int, ...] = (256,)
    """Widths of the hidden dense layers."""
    dropout: float = 0.5
    """Dropout rate, 0..1."""

    def __post_init__(self) -> None:
        n_dense = self.order.count("dense")
        _check(n_dense == len(self.widths), "model.head.widths", self.widths, f"{n_dense} widths, one a dense in order")
        _check(all(w > 0 for w in self.widths), "model.head.widths", self.widths, "widths > 0")
        _check(0 <= self.dropout < 1, "model.head.dropout", self.dropout, "a rate in 0..1, 1 excluded")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Classifier = backbone -> attention -> global average pooling -> head."""

    backbone: str = "densenet121"
    """Name of a backbone (`bmjax list`)."""
    weights: str | None = "imagenet"
    """`imagenet`: Keras's published file; `imagenet-timm`: timm's; a record's name (`bmjax weights list`); a path: that
    file; none: random."""
    backbone_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the backbone's module. A run fills in those that its weights' record decides, and `preprocess`."""
    preprocess: str | None = None
    """Mode of bmjax.data.preprocess; none: the weights' or, without weights, the family's."""
    attention: str = "soft"
    """Name of a variant in bmjax/attention, path of a `.py`, or `module:Class`; `se+simam`: in a row. The study's is
    unknown: `soft` is ours."""
    attention_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the attention module, by name; of several, by part: {"se": {"ratio": 8}}, the second se's as "se_2"."""
    attention_gate: bool = False
    """Attention f begins as the identity: x + gamma * (f(x) - x), gamma [c] learnt from zero."""
    attach: tuple[str, ...] = ("last",)
    """Stages of the backbone after which attention goes; `last` is the last stage."""
    head: HeadConfig = HeadConfig()


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
        _check(self.warmup_epochs >= 0, "optim.schedule.warmup_epochs", self.warmup_epochs, ">= 0")
        _check(self.step_epochs > 0, "optim.schedule.step_epochs", self.step_epochs, "> 0")
        _check(0 < self.factor <= 1, "optim.schedule.factor", self.factor, "in 0..1, 0 excluded")
        _check(0 <= self.final <= 1, "optim.schedule.final", self.final, "in 0..1")
        _check(self.patience >= 1, "optim.schedule.patience", self.patience, ">= 1")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Unset numbers (None) come from the preset."""

    name: Literal["adagrad", "adadelta", "adamax", "rmsprop", "sgd", "adam", "adamw"] = "adamax"
    preset: Literal["keras", "tuned"] = "tuned"
    """`keras`: Keras 3's defaults. `tuned`: rates that put the optimizers on a comparable footing (ours)."""
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
        _check(self.lr is None or self.lr > 0, "optim.lr", self.lr, "> 0 or none")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        _check(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "> 0 or none")
        _check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in 0..1, 0 excluded")


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
        _check(self.epochs >= 1, "stages.epochs", self.epochs, "at least 1")
        _check(len(self.train) > 0, "stages.train", self.train, "at least one part")
        _check(self.lr_scale > 0, "stages.lr_scale", self.lr_scale, "> 0")


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
    parallel: Literal["jit", "pmap"] = "jit"
    devices: int | None = None
    """Number of devices; none: all."""
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
    train_eval_epochs: int = 1
    """Epochs between evaluations of the train split in eval mode; 0: only at the end."""
    monitor: Literal["accuracy", "macro_f1", "loss"] = "accuracy"
    """Validation figure that picks the best checkpoint and drives early stopping."""
    early_stop_epochs: int | None = None
    """Stop after so many epochs without improvement of `monitor`; none: never."""
    final_test: bool = False
    """Open the test split once, at the end, with the best checkpoint."""
    workers: int = 2
    """Threads that read ahead."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "train.batch_size", self.batch_size, ">= 1")
        _check(self.eval_batch_size >= 1, "train.eval_batch_size", self.eval_batch_size, ">= 1")
        ok = self.accumulate >= 1 and self.batch_size % self.accumulate == 0
        _check(ok, "train.accumulate", self.accumulate, f"a divisor of batch_size ({self.batch_size})")
        _check(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "in 0..1, 1 excluded")
        _check(0 <= self.effective_beta < 1, "train.effective_beta", self.effective_beta, "in 0..1, 1 excluded")
        _check(self.logit_adjustment >= 0, "train.logit_adjustment", self.logit_adjustment, ">= 0")
        _check(self.focal_gamma >= 0, "train.focal_gamma", self.focal_gamma, ">= 0")
        corrections = {
            "sampling": self.sampling != "uniform",
            "class_weights": self.class_weights != "none",
            "logit_adjustment": self.logit_adjustment > 0,
        }
        several = [name for name, is_set in corrections.items() if is_set]
        expected = "one correction of class frequencies; two would correct twice"
        _check(len(several) < 2, "train", " and ".join(several), expected)
        _check(self.ema_decay is None or 0 < self.ema_decay < 1, "train.ema_decay", self.ema_decay, "in 0..1 or none")
        _check(self.checkpoint_epochs >= 1, "train.checkpoint_epochs", self.checkpoint_epochs, ">= 1")
        _check(
            self.checkpoint_steps is None or self.checkpoint_steps >= 1,
            "train.checkpoint_steps",
            self.checkpoint_steps,
            ">= 1",
        )
        _check(self.train_eval_epochs >= 0, "train.train_eval_epochs", self.train_eval_epochs, ">= 0")
        _check(self.devices is None or self.devices >= 1, "train.devices", self.devices, ">= 1 or none")
        _check(
            self.early_stop_epochs is None or self.early_stop_epochs >= 1,
            "train.early_stop_epochs",
            self.early_stop_epochs,
            ">= 1",
        )
        _check(self.workers >= 1, "train.workers", self.workers, ">= 1")


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
        _check(self.views >= 0, "features.views", self.views, ">= 0")
        _check(0 <= self.seed < 2**31, "features.seed", self.seed, "0..2**31-1")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases; the JSONL record on disk is always kept."""

    wandb: Literal["off", "auto", "online", "offline"] = "off"
    """`auto`: online with a key and a network, else offline with a word on how to sync."""
    project: str = "bmjax"
    group: str = ""
    tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    name: str = "run"
    seed: int = 0
    run_dir: str = ""
    """Folder of the run; empty: runs/<name>."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = OptimConfig()
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    train: TrainConfig = TrainConfig()
    features: FeaturesConfig = FeaturesConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        _check(len(self.stages) > 0, "stages", self.stages, "at least one stage")
        _check(0 <= self.seed < 2**31, "seed", self.seed, "0..2**31-1")


def to_json(config: Config) -> str:
    """Writes every field; `from_json` gives an equal Config."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Reads `to_json`'s text.

    Raises:
      ValueError: a field is unknown or its value has the wrong type; the message names field and value.
    """
    import pydantic

    def forbid_extra(cls: type) -> None:
        cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[attr-defined]

    for cls in (DataConfig, AugmentConfig, HeadConfig, ModelConfig, ScheduleConfig, OptimConfig, BatchNormConfig):
        forbid_extra(cls)
    for cls in (StageConfig, TrainConfig, FeaturesConfig, TrackingConfig, Config):
        forbid_extra(cls)
    # pydantic.ValidationError is a ValueError and names the dotted field, the value and what was expected.
    return pydantic.TypeAdapter(Config).validate_json(text)
