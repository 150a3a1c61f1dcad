"""Makes a classifier and its variables from a configuration."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from bmjax import registry, weights
from bmjax.attention import Chain, create_attention
from bmjax.backbones import create_backbone, default_preprocess, is_module_class
from bmjax.config.arguments import check_choice, check_type, check_whole
from bmjax.config.checks import check
from bmjax.config.checks_options import OptionError
from bmjax.config.model import HeadConfig, ModelConfig
from bmjax.layers.dispatch import prepare
from bmjax.layers.initial import evaluated
from bmjax.model.classifier import Classifier, Head, stages_of
from bmjax.model.parameters import Tree


def resolve(config: ModelConfig) -> ModelConfig:
    """`config` with what the weights decide filled in, so that the model can be made without their file from then on.

    Raises:
      FileNotFoundError, ValueError: as `bmjax.weights.find_record`.
    """
    if config.preprocess is not None:
        return config
    if config.weights is None:
        return dataclasses.replace(config, preprocess=default_preprocess(config.backbone))
    _check_weights(config)
    record = weights.find_record(config.backbone, config.weights)
    options = record.architecture | config.backbone_options
    return dataclasses.replace(config, backbone_options=options, preprocess=record.preprocess)


def _check_weights(config: ModelConfig) -> None:
    if registry.is_own(config.backbone) and config.weights is not None:
        raise ValueError(
            f"config field 'model.weights' is {config.weights!r}; expected none for the backbone {config.backbone!r}, "
            "which no weights file is known for"
        )


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
      ValueError: a name, option or stage is not known, an option's value is not one of its field, a stage is given
        twice, or there are no classes.
      TypeError: an argument is of another type.
    """
    check_type("config", config, ModelConfig, "a bmjax.config.ModelConfig; that of a Config is its field model")
    num_classes = check_whole("num_classes", num_classes, 1)
    check_choice("dtype", dtype, ("float32", "bfloat16", "float64"))
    config = resolve(config)
    _check_weights(config)
    backbone = _backbone(config, dtype)
    stages = stages_of(backbone)
    attach = tuple(stages[-1] if stage == "last" else stage for stage in config.attach)
    for stage in attach:
        if stage not in stages:
            raise registry.unknown(f"stage of {config.backbone} in model.attach", stage, (*stages, "last"))
    if len(set(attach)) != len(attach):
        raise ValueError(f"config field 'model.attach' is {config.attach!r}; expected each stage once")
    attention = []
    for stage in attach:
        module = _attention(config)
        attention.append((stage, _with_dtype(module, config.attention_options, jnp.dtype(dtype))))
    return Classifier(
        backbone=backbone,
        attention=tuple(attention),
        head=create_head(config.head, num_classes),
        preprocess=config.preprocess or "raw",
        attention_gate=config.attention_gate,
        dtype=jnp.dtype(dtype),
    )


def _backbone(config: ModelConfig, dtype: str) -> nn.Module:
    options = config.backbone_options
    check("dtype" not in options, "model.backbone_options", options, "no dtype: the field train.dtype is that")
    try:
        return create_backbone(config.backbone, dtype=jnp.dtype(dtype), **options)
    except (OptionError, TypeError) as e:
        raise ValueError(f"config field 'model.backbone_options': {e}") from e


def _attention(config: ModelConfig) -> nn.Module:
    try:
        module = create_attention(config.attention, **config.attention_options)
    except (OptionError, TypeError) as e:
        raise ValueError(f"config field 'model.attention_options': {e}") from e
    parts = [part for _, part in module.variants] if isinstance(module, Chain) else [module]
    for name, part in zip(config.attention.split("+"), parts, strict=True):
        if fault := _fault_of(type(part)):
            raise ValueError(
                f"attention {name!r} {fault}; expected __call__(self, x, *, train=False), giving an array of x's shape"
            )
    return module


def _fault_of(attention: type[nn.Module]) -> str | None:
    """What keeps a class from being called as attention is; None where nothing does."""
    if not any("__call__" in vars(base) for base in attention.__mro__):
        return "has no __call__"
    if registry.missing_keywords(attention.__call__, ["train"]):
        return "takes no train in __call__"
    try:
        inspect.signature(attention.__call__).bind(None, None, train=False)
    except TypeError as e:
        return f"can't be called with x and train: {e}"
    return None


def create_head(config: HeadConfig, num_classes: int) -> nn.Module:
    """The study's head, or one of the user's own, made by (num_classes, **options).

    Raises:
      ValueError: there is none of that name, or it can't be made so.
    """
    if not registry.is_own(config.name):
        return Head(num_classes, config)
    cls = registry.load_own("head", config.name, is_module_class, "a Flax module")
    if registry.missing_keywords(cls.__call__, ["train"]):
        raise ValueError(
            f"head {config.name!r} takes no train in __call__; expected __call__(self, x, *, train=False), "
            "features [b, c] to logits [b, k]"
        )
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
    try:
        return cls(num_classes, **options)
    except TypeError as e:
        raise ValueError(f"head {config.name!r} can't be made with (num_classes, **{options!r}): {e}") from e


def init(model: Classifier, key: jax.Array, image_size: int, config: ModelConfig | None = None) -> dict[str, Tree]:
    """Variables {"params", "batch_stats"}, nested dicts of float32.

    Random from `key`; where `config` names weights, the backbone's are those, every leaf matched or an error.

    Raises:
      TypeError, ValueError: an argument is of another type, or the images are too small for the backbone.
    """
    check_type("model", model, Classifier, "a bmjax.Classifier, as bmjax.create gives")
    check_type("key", key, jax.Array, "a key, as jax.random.key(0)")
    image_size = check_whole("image_size", image_size, 1)
    check_type("config", config, (ModelConfig, type(None)), "a bmjax.config.ModelConfig or None")

    loads = config is not None and config.weights is not None
    given: dict[str, Tree] = {}

    def random_variables(key: jax.Array) -> dict[str, Tree]:
        variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)), train=False)
        found: dict[str, Tree] = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
        if not loads:
            return found
        given.update({name: jax.eval_shape(lambda x: x, tree["backbone"]) for name, tree in found.items()})
        # Of what the weights give nothing is drawn.
        return {name: {k: v for k, v in tree.items() if k != "backbone"} for name, tree in found.items()}

    if isinstance(key, Tracer):
        variables = random_variables(key)
    else:
        prepare()
        variables = evaluated(random_variables, key)
    if config is None or config.weights is None:
        return variables
    settings = resolve(config)
    loaded = weights.load_into(
        given,
        config.backbone,
        config.weights,
        options=settings.backbone_options,
        preprocess=settings.preprocess,
    )
    return {name: tree | {"backbone": loaded[name]} for name, tree in variables.items()}
