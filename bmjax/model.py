"""The classifier: backbone -> attention -> global average pooling -> head."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from bmjax import registry
from bmjax.attention import Chain, IdentityGate, commutes_with_pooling, create_attention
from bmjax.backbones import create_backbone, family_of
from bmjax.config import BatchNormConfig, HeadConfig, ModelConfig
from bmjax.data.preprocess import preprocess
from bmjax.layers import BatchNorm, Dropout, at_least_float32, global_average

Tree = Any
Part = Literal["backbone", "attention", "head"]
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
    head: Head
    preprocess: str = "raw"
    """Mode of bmjax.data.preprocess."""
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
        last = _stages(self.backbone)[-1]
        kept: list[jax.Array] = []
        names = {stage: f"attention_{stage}" if len(self.attention) > 1 else "attention" for stage, _ in self.attention}
        modules = {stage: module.clone(parent=self, name=names[stage]) for stage, module in self.attention}

        def tap(stage: str, x: jax.Array) -> jax.Array:
            if stage == last:
                kept.append(x)
            if stage in modules:
                # A variant knows `train` alone, so any mode but `train` is evaluation to it.
                y = modules[stage](x, train=train and batch_norm.attention == "train")
                x = IdentityGate(name=f"{names[stage]}_gate", parent=self)(x, y) if self.attention_gate else y
            return x

        if start == "feature_map":
            x = tap(last, images.astype(self.dtype))
        else:
            x = preprocess(images.astype(at_least_float32(self.dtype)), self.preprocess).astype(self.dtype)
            x = self.backbone(x, train=train, mode=batch_norm.backbone, tap=tap)
        if output == "feature_map":
            return kept[0]
        x = global_average(x)
        if output == "features":
            return x
        return self.head(x, train=train, mode=batch_norm.head)

    def features(self, images: jax.Array, train: bool = False, batch_norm: BatchNormConfig = ALL_TRAIN) -> jax.Array:
        """Images as in `__call__` -> features after attention and pooling [b, c]. By `apply(method="features")`."""
        return self(images, train=train, batch_norm=batch_norm, output="features")

    def feature_map(self, images: jax.Array, train: bool = False, batch_norm: BatchNormConfig = ALL_TRAIN) -> jax.Array:
        """Images as in `__call__` -> the last stage's output [b, h, w, c], before attention there."""
        return self(images, train=train, batch_norm=batch_norm, output="feature_map")


def _stages(backbone: nn.Module) -> tuple[str, ...]:
    return tuple(backbone.stages)


def at_last(model: Classifier) -> bool:
    """Whether all attention stands after the backbone's last stage, so that its feature map is free of attention."""
    return all(stage == _stages(model.backbone)[-1] for stage, _ in model.attention)


def pools_first(model: Classifier) -> bool:
    """Whether logits are the same for feature maps and for their means over places, [b, 1, 1, c]: all attention stands
    last and commutes with pooling. In bfloat16 means would be rounded too early."""
    commutes = all(commutes_with_pooling(module) for _, module in model.attention)
    return at_last(model) and commutes and model.dtype != jnp.bfloat16


def resolve(config: ModelConfig) -> ModelConfig:
    """`config` with what the weights decide filled in, so that the model can be made without their file from then on.

    Raises:
      FileNotFoundError, ValueError: as `bmjax.weights.find_record`.
    """
    if config.preprocess is not None:
        return config
    if config.weights is None:
        return dataclasses.replace(config, preprocess=family_of(config.backbone).PREPROCESS)
    from bmjax import weights

    record = weights.find_record(config.backbone, config.weights)
    options = record.architecture | config.backbone_options
    return dataclasses.replace(config, backbone_options=options, preprocess=record.preprocess)


def _with_dtype(module: nn.Module, options: dict[str, Any], dtype: Any) -> nn.Module:
    """The module, or the parts of a chain, with the field `dtype` as given where there is one and no option sets it."""
    if isinstance(module, Chain):
        return Chain(tuple((name, _with_dtype(part, options.get(name, {}), dtype)) for name, part in module.variants))
    typed = any(f.name == "dtype" for f in dataclasses.fields(module)) and "dtype" not in options
    return module.clone(dtype=dtype) if typed else module


def create(config: ModelConfig, num_classes: int, dtype: str = "float32") -> Classifier:
    """The classifier that `config` describes; its preprocessing is that of the backbone's weights.

    Raises:
      FileNotFoundError: the weights are a path and no file is there.
      ValueError: a name, option or stage is not known, a stage is given twice, or there are no classes.
      TypeError: a name in `backbone_options` is no field of the backbone.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")
    config = resolve(config)
    backbone = create_backbone(config.backbone, dtype=jnp.dtype(dtype), **config.backbone_options)
    stages = _stages(backbone)
    attach = tuple(stages[-1] if stage == "last" else stage for stage in config.attach)
    for stage in attach:
        if stage not in stages:
            raise registry.unknown(f"stage of {config.backbone} in model.attach", stage, (*stages, "last"))
    if len(set(attach)) != len(attach):
        raise ValueError(f"config field 'model.attach' is {config.attach!r}; expected each stage once")
    attention = []
    for stage in attach:
        module = create_attention(config.attention, **config.attention_options)
        attention.append((stage, _with_dtype(module, config.attention_options, jnp.dtype(dtype))))
    return Classifier(
        backbone=backbone,
        attention=tuple(attention),
        head=Head(num_classes, config.head),
        preprocess=config.preprocess or "raw",
        attention_gate=config.attention_gate,
        dtype=jnp.dtype(dtype),
    )


def init(model: Classifier, key: jax.Array, image_size: int, config: ModelConfig | None = None) -> dict[str, Tree]:
    """Variables {"params", "batch_stats"}, nested dicts of float32.

    Random from `key`; where `config` names weights, the backbone's are those, every leaf matched or an error.
    """

    def random_variables(key: jax.Array) -> dict[str, Tree]:
        variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)), train=False)
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    variables = jax.jit(random_variables)(key)
    if config is not None and config.weights is not None:
        from bmjax import weights

        settings = resolve(config)
        backbone = {name: tree["backbone"] for name, tree in variables.items()}
        loaded = weights.load_into(
            backbone,
            config.backbone,
            config.weights,
            options=settings.backbone_options,
            preprocess=settings.preprocess,
        )
        variables = {name: tree | {"backbone": loaded[name]} for name, tree in variables.items()}
    return variables


def part_of(path: tuple[str, ...]) -> Part:
    """The part that a leaf of params or batch_stats belongs to, by its path.

    Raises:
      ValueError: the path begins with no part of a Classifier.
    """
    top = path[0] if path else ""
    if top == "backbone":
        return "backbone"
    if top == "head":
        return "head"
    if top == "attention" or top.startswith("attention_"):
        return "attention"
    raise ValueError(f"path {path!r} begins with no part of the model; expected backbone, attention or head")


def count_parameters(tree: Tree) -> int:
    """Numbers in a tree of arrays. Of {"params", "batch_stats"} it is what Keras counts, statistics included."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


class ParameterRow(NamedTuple):
    """One leaf of the variables."""

    collection: str
    """params or batch_stats"""
    part: Part
    path: str
    """Joined by slashes."""
    shape: tuple[int, ...]
    count: int
    is_norm: bool
    """Whether it belongs to a batch-norm."""


def parameter_table(variables: dict[str, Tree]) -> list[ParameterRow]:
    """A row per leaf of {"params", "batch_stats"} (arrays or their shapes), in the order of the tree."""
    flat: dict[str, dict[tuple[str, ...], Any]] = {
        name: traverse_util.flatten_dict(variables.get(name, {})) for name in ("params", "batch_stats")
    }
    norms = {path[:-1] for path in flat["batch_stats"]}
    return [
        ParameterRow(name, part_of(path), "/".join(path), tuple(leaf.shape), leaf.size, path[:-1] in norms)
        for name, leaves in flat.items()
        for path, leaf in leaves.items()
    ]
