"""The training and the evaluation step: pure functions that do not know how many devices they run on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax.config.data import AugmentConfig
from bmjax.config.training import BatchNormConfig
from bmjax.data.augment.augment import augment, mix
from bmjax.layers.collectives import all_shards, all_sum, shard_devices, shard_numbers
from bmjax.layers.dispatch import inside_loop
from bmjax.layers.ops import at_least_float32
from bmjax.model.classifier import Classifier, stage_name, stages_of
from bmjax.model.parameters import Path, Tree, merge_params, split_params
from bmjax.runs.state import TrainState
from bmjax.training.losses import Loss, cross_entropy

P = ParamSpec("P")
R = TypeVar("R")
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
STAGES, SKETCH = 3, 128
"""Stages whose maps are sketched, and numbers of a sketch."""


# A name of the configuration -> jax's; "default" leaves jax's setting as it stands.
_PRECISIONS = {"highest": "highest", "bfloat16_3x": "high"}


def at_precision(function: Callable[P, R], precision: str) -> Callable[P, R]:
    """The function, its float32 products and convolutions traced at `train.precision`, gradients included."""
    if precision == "default":
        return function

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision(_PRECISIONS[precision]):
            return function(*args, **kwargs)

    return traced


def micro_batches(batch: Batch, accumulate: int) -> Batch:
    """[b, ...] -> [accumulate, b/accumulate, ...]; strided, so that each micro-batch spans all devices."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)


def sum_over_shards(function: Callable[[Batch, jax.Array], Tree], batch: Batch, key: jax.Array, shards: int) -> Tree:
    """The sum of function(part, key) over so many parts of the batch, one after another and added in their order.

    A device computes some of the parts, each by itself, so the bits of the sum do not depend on how many devices there
    are, as long as each has two parts or more (a loop of one is compiled as none).
    """
    here = shards // shard_devices()
    parts = jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), batch)
    with inside_loop():
        results = jax.lax.map(
            lambda part: function(part[0], jax.random.fold_in(key, part[1])), (parts, shard_numbers(here))
        )
    everyone = all_shards(results)
    first, others = (jax.tree.map(lambda x, at=at: x[at], everyone) for at in (0, slice(1, None)))
    return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, x), None), first, others)[0]


def _over_parts(
    body: Callable[..., tuple[tuple, None]],
    carry: Any,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
    shards: int | None,
) -> Any:
    """The carry (gradients, running statistics, loss, correct) after a batch, at once or in parts."""
    if shards:
        sums = sum_over_shards(lambda part, key: body(carry, (part, key))[0], batch, key, shards)
        return (sums[0], jax.tree.map(lambda x: x / shards, sums[1]), *sums[2:])
    if accumulate == 1:
        return body(carry, (batch, key))[0]
    return jax.lax.scan(body, carry, (micro_batches(batch, accumulate), jax.random.split(key, accumulate)))[0]


def make_train_step(
    model: Classifier,
    tx: optax.GradientTransformation,
    is_trainable: Callable[[Path], bool],
    *,
    batch_norm: BatchNormConfig,
    augmentation: AugmentConfig,
    loss: Loss = cross_entropy,
    accumulate: int = 1,
    logical_shards: int | None = None,
    ema_decay: float | None = None,
    image_dtype: Any = jnp.float32,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """train_step(state, batch) -> (state after one update, {"loss", "correct", "count", "grad_norm"}).

    `batch` holds image uint8 [b, h, w, 3], label int32 [b], position int32 [b] (place in the global batch); or label
    and feature_map [b, h, w, c] instead, of a frozen backbone that `state` then lacks: nothing is augmented.
    Mixed images count as of the class that there is most of. Only the trainable part of the parameters is
    differentiated. The loss is the mean over the global batch. With `accumulate` norms by the batch see its
    micro-batches, one after another; with `logical_shards` each part by itself, and running statistics move by the
    mean of the parts' own moves.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split_params(state.params, is_trainable)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        count = all_sum(jnp.asarray(batch["label"].shape[0] * shard_devices(), image_dtype))

        def loss_fn(trainable: Tree, batch_stats: Tree, micro: Batch, key: jax.Array):
            augment_key, dropout_key = jax.random.split(key)
            labels, cached = micro["label"], "feature_map" in micro
            mixes = augmentation.mixes and not cached
            if cached:
                images = micro["feature_map"]
            else:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(augment_key, micro["position"])
                images = augment(micro["image"].astype(image_dtype), keys, augmentation)
            if mixes:
                images, others, share = mix(images, labels, keys, augmentation)
            logits, updates = model.apply(
                {"params": merge_params(trainable, frozen), "batch_stats": batch_stats},
                images,
                train=True,
                batch_norm=batch_norm,
                start="feature_map" if cached else "images",
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            losses = loss(logits, labels)
            if mixes:
                losses = share * losses + (1 - share) * loss(logits, others)
                # The label with the larger share counts as the right one.
                labels = jnp.where(share >= 0.5, labels, others)
            correct = (logits.argmax(-1) == labels).sum(dtype=jnp.int32)
            # Divided by the global count: the sum over devices and micro-batches is then the mean's gradient.
            return losses.sum() / count, (updates.get("batch_stats", batch_stats), correct)

        def body(carry: tuple, inputs: tuple[Batch, jax.Array]):
            grads, batch_stats, total, correct = carry
            micro, key = inputs
            (value, (batch_stats, hits)), new = jax.value_and_grad(loss_fn, has_aux=True)(
                trainable, batch_stats, micro, key
            )
            return (jax.tree.map(jnp.add, grads, new), batch_stats, total + value, correct + hits), None

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        carry = (zeros, state.batch_stats, jnp.zeros((), image_dtype), jnp.zeros((), jnp.int32))
        carry = _over_parts(body, carry, batch, step_key, accumulate, logical_shards)
        grads, batch_stats, total, correct = all_sum(carry[0]), carry[1], all_sum(carry[2]), all_sum(carry[3])
        updates, opt_state = tx.update(grads, state.opt_state, trainable)
        params = merge_params(optax.apply_updates(trainable, updates), frozen)
        ema = state.ema
        if ema_decay is not None:
            keep = float(ema_decay)
            new = {"params": params, "batch_stats": batch_stats}
            ema = jax.tree.map(lambda old, x: keep * old + (1 - keep) * x, ema, new)
        state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema)
        return state, {"loss": total, "correct": correct, "count": count, "grad_norm": _norm(grads)}

    return train_step


def _norm(tree: Tree) -> jax.Array:
    """The Euclidean norm of all leaves. The small ones, which are most, are taken together: fewer sums to compile."""
    leaves = jax.tree.leaves(tree)
    small = [x.ravel() for x in leaves if x.size <= 4096]
    whole = [x for x in leaves if x.size > 4096] + ([jnp.concatenate(small)] if small else [])
    return optax.tree.norm(whole)


def sketch(x: jax.Array, seed: int) -> jax.Array:
    """A map [b, h, w, c] -> [b, 128]: each channel's mean and deviation over places, by a random projection of a seed,
    which keeps distances within about a tenth (Johnson and Lindenstrauss 1984)."""
    x = x.astype(at_least_float32(x.dtype))
    moments = jnp.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=-1)
    # A RandomState's numbers are the same in every version of NumPy; a run's reference outlives one.
    matrix = np.random.RandomState(seed).standard_normal((moments.shape[-1], SKETCH)) / np.sqrt(SKETCH)
    return jnp.matmul(moments, matrix.astype(moments.dtype), precision="highest")


def _head(module: Classifier, x: jax.Array) -> jax.Array:
    return module.head(x, train=False)


def with_features(model: Classifier, variables: Tree, images: jax.Array) -> tuple[Metrics, Tree]:
    """({"logits" [b, k], "features" [b, c], those before the head, "maps" [b, s, 128], see `sketch`, of the last three
    stages}, what modules sowed), of images [b, h, w, 3] in evaluation mode."""
    ways: Any = {"output": "features", "mutable": ["intermediates"]}
    pooled, kept = cast("Any", model.apply(variables, images, train=False, **ways))
    logits: Any = model.apply(variables, pooled, method=_head)
    stages = [stage_name(stage) for stage in stages_of(model.backbone)[-STAGES:]]
    maps = [sketch(kept["intermediates"][name][0], seed) for seed, name in enumerate(stages)]
    outputs = {"logits": logits, "features": pooled, "maps": jnp.stack(maps, axis=1)}
    return {name: x.astype(at_least_float32(logits.dtype)) for name, x in outputs.items()}, dict(kept)


def make_eval_step(
    model: Classifier, *, image_dtype: Any = jnp.float32, features: bool = False
) -> Callable[[Tree, Batch], Metrics]:
    """eval_step(variables, batch) -> {"logits" [b, k]}, and with `features` the outputs of `with_features`; `batch`
    holds image uint8 [b, h, w, 3]."""

    def eval_step(variables: Tree, batch: Batch) -> Metrics:
        images = batch["image"].astype(image_dtype)
        if not features:
            logits: Any = model.apply(variables, images, train=False)
            return {"logits": logits}
        return with_features(model, variables, images)[0]

    return eval_step
