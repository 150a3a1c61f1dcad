"""The stages of training: their steps, what trains in each, the optimizer, and the stretches that a loop runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bmjax.backbones import stage_of_parameters
from bmjax.config.base import Config
from bmjax.config.training import BatchNormConfig, StageConfig
from bmjax.layers.remat import recomputing
from bmjax.model.classifier import Classifier
from bmjax.model.parameters import Path as ParamPath
from bmjax.model.parameters import Tree, part_of, split_params
from bmjax.runs.folder import image_dtype
from bmjax.training import optim
from bmjax.training.losses import Loss
from bmjax.training.parallel import Parallel
from bmjax.training.steps import at_precision, make_train_step


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
        if part_of(path) != "backbone":
            return None
        return stage_of_parameters(model.backbone, config.data.image_size)[path[1:]]

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


class Stretch(NamedTuple):
    """Steps [start, end) of one stage, after which an epoch may end."""

    stage: int
    start: int
    end: int
    ends_epoch: bool


def stretches(
    plans: Sequence[StagePlan], per_epoch: int, step: int, epochs_evaluated: int, every: int | None = None
) -> Iterator[Stretch]:
    """What is left to do from `step` on: an epoch each, or shorter ones that end at multiples of `every` too.

    The first is empty where a run was stopped between an epoch's last step and its evaluation.
    """

    def stage_at(step: int) -> int:
        return next(i for i, plan in enumerate(plans) if step < plan.end)

    if step and step % per_epoch == 0 and epochs_evaluated < step // per_epoch:
        yield Stretch(stage_at(step - 1), step, step, True)
    while step < plans[-1].end:
        epoch_end = (step // per_epoch + 1) * per_epoch
        end = min(epoch_end, (step // every + 1) * every) if every else epoch_end
        yield Stretch(stage_at(step), step, end, end == epoch_end)
        step = end


def stage_step(config: Config, model: Classifier, plan: StagePlan, loss: Loss) -> Callable:
    """The train step of a stage, not compiled; see `make_train_step`."""
    step = make_train_step(
        model,
        plan.optimizer.tx,
        plan.is_trainable,
        batch_norm=plan.batch_norm,
        augmentation=config.augment,
        loss=loss,
        accumulate=config.train.accumulate,
        logical_shards=config.train.logical_shards,
        ema_decay=config.train.ema_decay,
        image_dtype=image_dtype(config),
    )
    return at_precision(_recomputing(step, config.train.remat), config.train.precision)


def _recomputing(step: Callable, stages: Sequence[str]) -> Callable:
    """The step, traced with these stages of the backbone computed again on the way back."""
    if not stages:
        return step

    @functools.wraps(step)
    def traced(*args: Any) -> Any:
        with recomputing(stages):
            return step(*args)

    return traced


def compile_stage(config: Config, model: Classifier, plan: StagePlan, parallel: Parallel, loss: Loss) -> Callable:
    """The train step of a stage: (state, batch) -> (state, metrics); compiled when first called."""
    return parallel.compile_step(stage_step(config, model, plan, loss))
