"""Batch-norm's running statistics where steps are few: recomputed by one pass over the training images, or a warning.

After n steps a running statistic still holds momentum^n of what it began with. In evaluation a network that has trained
for few steps is then worse than it has become.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bmjax.config.base import Config
from bmjax.config.training import PARTS, BatchNormConfig, TrainConfig
from bmjax.layers.modules import Dropout
from bmjax.model.classifier import Classifier
from bmjax.model.parameters import Tree, part_of
from bmjax.runs.folder import image_dtype
from bmjax.runs.state import TrainState
from bmjax.training.stages import StagePlan
from bmjax.training.steps import Batch, at_precision, micro_batches

_MOMENTUM = 0.99
"""Of the batch-norms' running statistics."""
_LEAST_KEPT = 0.05
"""Share of the first statistics that does no harm any more."""
_GAP = 0.15
"""Accuracy that evaluation may fall behind training without a word."""
ENOUGH = math.ceil(math.log(_LEAST_KEPT) / math.log(_MOMENTUM))
"""Steps after which the running statistics hold less than that: 299."""


def steps_by_batch(plans: Sequence[StagePlan], part: str, step: int) -> int:
    """How many of the first `step` steps the norms of a part go by the batch."""
    by_batch = [plan for plan in plans if getattr(plan.batch_norm, part) == "train"]
    return sum(max(0, min(plan.end, step) - plan.start) for plan in by_batch)


def recomputes(train: TrainConfig, plans: Sequence[StagePlan], batch_stats: Tree) -> bool:
    """Whether a run recomputes its statistics after each epoch: as `train.recompute_statistics` says.

    `auto`: where the stages let the norms of some part go by the batch, but for fewer than `ENOUGH` steps.
    """
    if train.recompute_statistics != "auto":
        return train.recompute_statistics == "always"
    return any(0 < steps_by_batch(plans, part, plans[-1].end) < ENOUGH for part in _parts(batch_stats))


def moves(batch_norm: BatchNormConfig, batch_stats: Tree) -> bool:
    """Whether any part that has norms lets them go by the batch."""
    return any(getattr(batch_norm, part) == "train" for part in _parts(batch_stats))


def _parts(batch_stats: Tree) -> set[str]:
    return {part_of((name,)) for name in batch_stats}


def nothing_dropped(
    run: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    """Linen's interceptor: dropout is off."""
    if isinstance(context.module, (Dropout, nn.Dropout)) and context.method_name == "__call__":
        return args[0] if args else next(iter(kwargs.values()))
    return run(*args, **kwargs)


def _measured(
    run: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    """Linen's interceptor: dropout is off, and a running statistic forgets all but the batch."""
    module = context.module
    momentum = getattr(module, "momentum", None)
    if not isinstance(momentum, float):
        return nothing_dropped(run, args, kwargs, context)
    object.__setattr__(module, "momentum", 0.0)  # a module is frozen; what it was stands again at the end
    try:
        return run(*args, **kwargs)
    finally:
        object.__setattr__(module, "momentum", momentum)


def make_statistics_step(
    model: Classifier, batch_norm: BatchNormConfig, *, accumulate: int = 1, image_dtype: Any = jnp.float32
) -> Callable[[Tree, Batch], Tree]:
    """statistics_step(variables, batch) -> the batch_stats of each micro-batch, leaves [accumulate, c].

    `batch` holds image uint8 [b, h, w, 3], or feature_map [b, h, w, c] of a frozen backbone. Norms that train go by
    the micro-batch, as in a train step; nothing is augmented or dropped, as in evaluation.
    """

    def one(variables: Tree, micro: Batch) -> Tree:
        cached = "feature_map" in micro
        images = micro["feature_map"] if cached else micro["image"].astype(image_dtype)
        start: Any = "feature_map" if cached else "images"
        settings: dict[str, Any] = {"train": True, "batch_norm": batch_norm, "start": start, "mutable": ["batch_stats"]}
        with nn.intercept_methods(_measured):
            _, updates = model.apply(variables, images, rngs={"dropout": jax.random.key(0)}, **settings)
        return updates["batch_stats"]

    def statistics_step(variables: Tree, batch: Batch) -> Tree:
        if accumulate == 1:
            return jax.tree.map(lambda leaf: leaf[None], one(variables, batch))
        return jax.lax.map(lambda micro: one(variables, micro), micro_batches(batch, accumulate))

    return statistics_step


def statistics_step(config: Config, model: Classifier, plan: StagePlan) -> Callable[[Tree, Batch], Tree]:
    """The statistics step of a stage, not compiled."""
    step = make_statistics_step(
        model, plan.batch_norm, accumulate=config.train.accumulate, image_dtype=image_dtype(config)
    )
    return at_precision(step, config.train.precision)


def recomputed(batch_stats: Tree, each: Iterable[Tree], batch_norm: BatchNormConfig) -> Tree:
    """batch_stats with mean and variance of all batches together in the parts whose norms go by the batch.

    `each` are what `statistics_step` gave, on the host. The variance is that over all images: the batches' own, and
    that of their means (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm"). Sums are float64.
    """
    flat: dict[tuple[str, ...], Any] = {
        path: leaf
        for path, leaf in traverse_util.flatten_dict(batch_stats).items()
        if path[-1] in ("mean", "var") and getattr(batch_norm, part_of(path)) == "train"
    }
    norms = [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]
    sums: dict[tuple[str, ...], Any] = {}
    count = 0
    for tree in each:
        found = {path: np.asarray(leaf, np.float64) for path, leaf in traverse_util.flatten_dict(tree).items()}
        count += len(found[(*norms[0], "mean")]) if norms else 1
        for norm in norms:
            mean, var = found[(*norm, "mean")], found[(*norm, "var")]
            total, square = sums.get(norm, (0.0, 0.0))
            sums[norm] = total + mean.sum(0), square + (var + np.square(mean)).sum(0)
    new = dict(traverse_util.flatten_dict(batch_stats))
    for norm, (total, square) in sums.items():
        mean = total / count
        for leaf, value in (("mean", mean), ("var", np.maximum(square / count - np.square(mean), 0))):
            path = (*norm, leaf)
            new[path] = value.astype(flat[path].dtype)
    return traverse_util.unflatten_dict(new)


def with_statistics(
    state: TrainState, batch_norm: BatchNormConfig, measure: Callable[[Tree], Iterable[Tree]]
) -> TrainState:
    """A fetched state with its statistics recomputed; those of the moving average by a pass with its own parameters.

    `measure(variables)` gives the statistics of each batch. What it gives must depend on the parameters alone, so
    that a run which is stopped and resumed goes on bit for bit.
    """

    def new(variables: Tree) -> Tree:
        return recomputed(variables["batch_stats"], measure(variables), batch_norm)

    ema = state.ema
    if ema is not None:
        ema = {"params": ema["params"], "batch_stats": new(ema)}
    return state.replace(batch_stats=new({"params": state.params, "batch_stats": state.batch_stats}), ema=ema)


def statistics_lag(plans: Sequence[StagePlan], step: int, running: float, evaluated: float) -> str | None:
    """What to say where batch-norm's running statistics have seen too few steps, and evaluation suffers; else None.

    `running` is the accuracy in training, where norms go by the batch; `evaluated` that in evaluation mode.
    """
    steps = min(filter(None, (steps_by_batch(plans, part, step) for part in PARTS)), default=0)
    kept = _MOMENTUM**steps
    if not steps or kept < _LEAST_KEPT or running - evaluated < _GAP:
        return None
    return (
        f"accuracy is {running:.2f} in training and {evaluated:.2f} in evaluation: after {steps} steps batch-norm's "
        f"running statistics still hold {100 * kept:.0f} % of what they began with, so that the classifier is worse in "
        "evaluation than it has learned to be. Let them be recomputed by one pass after each epoch "
        f"(train.recompute_statistics always), train for {ENOUGH} steps or more (stages.epochs larger, or "
        "train.batch_size smaller), or leave the statistics of a pretrained backbone as they are "
        "(stages.batch_norm.backbone stats_frozen)"
    )
