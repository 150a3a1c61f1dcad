"""What is checked before a run is made: its files, stages and splits, and parts of one's own by tracing them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from bmjax.config.base import Config
from bmjax.data.augment.augment import augment
from bmjax.data.splits import Splits
from bmjax.model.create import create
from bmjax.registry import is_own
from bmjax.runs.folder import image_dtype

log = logging.getLogger(__name__)


def check_files(config: Config) -> None:
    """Refuses files that are named and not there, before any image is read."""
    for name in ("manifest", "duplicates"):
        if (path := getattr(config.data, name)) and not Path(path).is_file():
            raise FileNotFoundError(f"config field 'data.{name}' is {path!r}; there is no such file")


def check_statistics(config: Config) -> None:
    """A batch-norm by the statistics of one image learns nothing; refuses it by name."""
    size = config.train.batch_size // (config.train.logical_shards or config.train.accumulate)
    modes = {dataclasses.astuple(stage.resolved_batch_norm()) for stage in config.stages}
    if size == 1 and any("train" in by_part for by_part in modes):
        field = "logical_shards" if config.train.logical_shards else "accumulate"
        raise ValueError(
            f"config field 'train.{field}' is {getattr(config.train, field)} and 'train.batch_size' is "
            f"{config.train.batch_size}: a batch-norm would see one image at a time and learn nothing; expected at "
            "least 2 images to a micro-batch, or stages.batch_norm with no part in mode 'train'"
        )


def check_stages(config: Config) -> None:
    """Refuses a stage that would train nothing."""
    for i, stage in enumerate(config.stages):
        if config.model.attention == "none" and set(stage.train) == {"attention"}:
            raise ValueError(
                f"config field 'stages.{i}.train' is {stage.train!r}, and model.attention is 'none': nothing would be "
                "trained; expected a part that there is"
            )


def check_splits(config: Config, splits: Splits) -> None:
    """Refuses what needs a split that holds no image; names the field."""
    if config.train.final_test and not len(splits.test):
        raise ValueError("config field 'train.final_test' is True, and the test split holds no image; expected False")
    if len(splits.val):
        return
    plateau, patience = config.optim.schedule.kind == "plateau", config.train.early_stop_epochs
    if plateau or patience is not None:
        field, value = ("optim.schedule.kind", "plateau") if plateau else ("train.early_stop_epochs", patience)
        raise ValueError(
            f"config field {field!r} is {value!r}, which goes by the validation split, and that holds no image"
        )
    log.info("no validation split: the last epoch is kept, and nothing is reported on the images trained on")


def try_head(config: Config, k: int) -> None:
    """Traces a network with a head of one's own: one that gives other than k logits is known before training."""
    if not is_own(config.model.head.name):
        return
    model, size = create(config.model, k, config.train.dtype), config.data.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), image_dtype(config))
    found: Any = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], images)
    if getattr(found, "shape", None) != (2, k):
        given = list(found.shape[1:]) if hasattr(found, "shape") else type(found).__name__
        raise ValueError(
            f"config field 'model.head.name' is {config.model.head.name!r}, whose head gives {given} for an image; "
            f"expected a logit for each of the {k} classes, [{k}]"
        )


def try_augmentations(config: Config) -> None:
    """Traces those of one's own, so that one that does not fit is known before anything is written."""
    if config.augment.extra:
        size = config.data.image_size
        images = jax.ShapeDtypeStruct((2, size, size, 3), image_dtype(config))
        jax.eval_shape(lambda x, keys: augment(x, keys, config.augment), images, jax.random.split(jax.random.key(0), 2))
