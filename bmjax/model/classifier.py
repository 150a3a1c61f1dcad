"""The classifier: backbone -> attention -> global average pooling -> head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax import registry
from bmjax.attention import Chain, IdentityGate, commutes_with_pooling
from bmjax.config.model import HeadConfig
from bmjax.config.training import BatchNormConfig
from bmjax.layers.modules import BatchNorm, Dropout
from bmjax.layers.ops import at_least_float32, global_average
from bmjax.weights.preprocess import preprocess

ALL_TRAIN = BatchNormConfig()


class Head(nn.Module):
    """The study's head: its batch-norm, dropout and dense layers in `config.order`, then the logits."""

    num_classes: int
    config: HeadConfig = HeadConfig()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mode: Any = "train") -> jax.Array:
        """[b, c] -> logits [b, k]. `mode` is that of the batch-norm; dropout follows `train` alone."""
        widths, norms, dense = iter(self.config.widths), 0, 0
        for layer in self.config.order:
            if layer == "batch_norm":
                norms += 1
                x = BatchNorm(name="batch_norm" if norms == 1 else f"batch_norm{norms}")(x, train=train, mode=mode)
            elif layer == "dropout":
                x = Dropout(self.config.dropout)(x, train=train)
            else:
                dense += 1
                x = nn.relu(nn.Dense(next(widths), dtype=x.dtype, name=f"dense{dense}")(x))
        return nn.Dense(self.num_classes, dtype=x.dtype, name="logits")(x)


class Classifier(nn.Module):
    """backbone -> attention -> global average pooling -> head, from pixels to logits.

    Top-level parameters: `backbone`; `attention`, or `attention_<stage>` each where there are several; with a gate also
    `attention_gate`, or `attention_<stage>_gate`; `head`.
    """

    backbone: nn.Module
    attention: tuple[tuple[str, nn.Module], ...]
    """Pairs of a backbone's stage and the module that goes after it."""
    head: nn.Module
    preprocess: str = "raw"
    """Mode of bmjax.weights.preprocess."""
    attention_gate: bool = False
    """Whether attention starts as the identity: see `IdentityGate`."""
    dtype: Any = jnp.float32
    """Compute type of backbone and attention; pooling and head compute in at least float32."""

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        batch_norm: BatchNormConfig = ALL_TRAIN,
        start: Literal["images", "feature_map"] = "images",
        output: Literal["logits", "features", "feature_map"] = "logits",
    ) -> jax.Array:
        """RGB images [b, h, w, 3], uint8 or floating 0..255 -> logits [b, k], float32 (float64 in a float64 model).

        `train` switches on dropout and, in parts whose mode is `train`, norms by the batch (then `batch_stats` must be
        mutable). `output` stops earlier: see `features` and `feature_map`. With `start` at the feature map, `images`
        is what `feature_map` gives, and the backbone is neither run nor needed among the variables.
        """
        last = stages_of(self.backbone)[-1]
        kept: list[jax.Array] = []
        names = {stage: f"attention_{stage}" if len(self.attention) > 1 else "attention" for stage, _ in self.attention}
        modules = {stage: module.clone(parent=self, name=names[stage]) for stage, module in self.attention}

        reached: list[str] = []

        def tap(stage: str, x: jax.Array) -> jax.Array:
            reached.append(stage)
            if stage == last:
                kept.append(x)
            if stage in modules:
                # A variant knows `train` alone, so any mode but `train` is evaluation to it.
                with nn.intercept_methods(_held_to_shape):
                    y = modules[stage](x, train=train and batch_norm.attention == "train")
                x = IdentityGate(name=f"{names[stage]}_gate", parent=self)(x, y) if self.attention_gate else y
            # Both do nothing unless their collection is asked for; bmjax.analysis.explain asks.
            x = x if self.is_initializing() else self.perturb(stage_name(stage), x)
            self.sow("intermediates", stage_name(stage), x)
            return x

        if start == "feature_map":
            x = tap(last, images.astype(self.dtype))
        else:
            x = preprocess(images.astype(at_least_float32(self.dtype)), self.preprocess).astype(self.dtype)
            x = self.backbone(x, train=train, mode=batch_norm.backbone, tap=tap)
            _check_taps(self.backbone, reached, x, images.shape[1:3])
        if output == "feature_map":
            return kept[0]
        x = global_average(x)
        if output == "features":
            return x
        # A head of the user's own knows `train` alone, as attention does.
        modes = {"mode": batch_norm.head} if isinstance(self.head, Head) else {}
        trains = train if modes else train and batch_norm.head == "train"
        logits = self.head(x, train=trains, **modes)
        return logits.astype(at_least_float32(logits.dtype))

    def features(self, images: jax.Array, train: bool = False, batch_norm: BatchNormConfig = ALL_TRAIN) -> jax.Array:
        """Images as in `__call__` -> features after attention and pooling [b, c]. By `apply(method="features")`."""
        return self(images, train=train, batch_norm=batch_norm, output="features")

    def feature_map(self, images: jax.Array, train: bool = False, batch_norm: BatchNormConfig = ALL_TRAIN) -> jax.Array:
        """Images as in `__call__` -> the last stage's output [b, h, w, c], before attention there."""
        return self(images, train=train, batch_norm=batch_norm, output="feature_map")


def stage_name(stage: str) -> str:
    """What a stage's result is sown as, and may be perturbed as: in the collections intermediates and perturbations."""
    return f"stage_{stage}"


def _held_to_shape(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Calls a method of a module; holds what attention, and each of a chain, gives to the shape it was given."""
    y, module = call(*args, **kwargs), context.module
    if context.method_name != "__call__" or not isinstance(module.parent, (Classifier, Chain)):
        return y
    given, found = args[0].shape, getattr(y, "shape", None)
    if found != given:
        try:
            name = registry.name_of("attention", type(module))
        except ValueError:  # a class within a function
            name = type(module).__name__
        what = f"a {type(y).__name__}" if found is None else list(found)
        raise ValueError(f"attention {name!r} gives {what}; expected an array of x's shape, {list(given)}")
    return y


def _check_taps(backbone: nn.Module, reached: list[str], x: jax.Array, size: tuple[int, ...]) -> None:
    """Attention stands where a backbone calls `tap`: one that leaves a stage out would train without it, silently."""
    stages, kind = stages_of(backbone), type(backbone).__name__
    if tuple(reached) != stages:
        raise ValueError(
            f"backbone {kind} calls tap for {', '.join(reached) or 'no stage'}; expected once for each of its stages, "
            f"in order: {', '.join(stages)}"
        )
    if x.ndim != 4:
        raise ValueError(f"backbone {kind} gives {list(x.shape)}; expected a feature map [b, h, w, c]")
    if 0 in x.shape[1:3]:
        raise ValueError(
            f"images of {size[0]}x{size[1]} pixels are too small for the backbone {kind}: it leaves {x.shape[1]}x"
            f"{x.shape[2]} places of them; expected larger ones"
        )


def stages_of(backbone: nn.Module) -> tuple[str, ...]:
    return tuple(backbone.stages)


def at_last(model: Classifier) -> bool:
    """Whether all attention stands after the backbone's last stage, so that its feature map is free of attention."""
    return all(stage == stages_of(model.backbone)[-1] for stage, _ in model.attention)


def pools_first(model: Classifier) -> bool:
    """Whether logits are the same for feature maps and for their means over places, [b, 1, 1, c]: all attention stands
    last and commutes with pooling. In bfloat16 means would be rounded too early."""
    commutes = all(commutes_with_pooling(module) for _, module in model.attention)
    return at_last(model) and commutes and model.dtype != jnp.bfloat16
