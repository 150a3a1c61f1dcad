"""Keras as the judge: its own model of a backbone, on the JAX backend, holding the weights in question."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bmjax.backbones import create_backbone
from bmjax.weights.catalog import RECORDS

Tree = Any


def why_not(backbone: str, source: str) -> str | None:
    """Why Keras can't judge these weights, or None where it can."""
    if source != "keras":
        return f"the weights are for {source}'s structure, which Keras hasn't"
    os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        import keras
    except ImportError as e:
        return f"Keras can't be imported ({e})"
    if keras.backend.backend() != "jax":
        return f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax"
    return None if builder(backbone) else f"keras.applications has no {backbone}"


def builder(backbone: str) -> Callable[..., Any] | None:
    """The function of keras.applications that builds a backbone, or None."""
    import keras

    # `resnet50` is ResNet50; `mobilenet_v2_035` is MobileNetV2 with an option. Members without a record are ours.
    names = {name.lower(): name for name in dir(keras.applications) if name[0].isupper()}
    found = [name for name in names if backbone.replace("_", "").startswith(name)]
    if not found or backbone not in {record.backbone for record in RECORDS}:
        return None
    name = max(found, key=len)
    make, alpha = getattr(keras.applications, names[name]), getattr(create_backbone(backbone), "alpha", None)
    return make if alpha is None else functools.partial(make, alpha=alpha)


def build(backbone: str, size: int, classes: int | None) -> Any:
    """Keras's model for images of `size` pixels, with logits of `classes` or, where None, features; random weights."""
    import keras

    make = builder(backbone)
    assert make is not None
    keras.backend.clear_session()  # the names that Keras makes up are then ours
    top = {} if classes is None else {"classes": classes, "classifier_activation": None}
    with jax.numpy_rank_promotion("allow"):
        return make(include_top=classes is not None, weights=None, input_shape=(size, size, 3), **top)


def output(model: Any, inputs: np.ndarray, weights: Path | dict[str, Tree]) -> np.ndarray:
    """What the model gives for preprocessed images [b, h, w, 3].

    `weights`: a file of Keras's, which Keras reads itself, or our {"params", "batch_stats"}.
    """
    with jax.numpy_rank_promotion("allow"):
        if isinstance(weights, Path):
            model.load_weights(weights)
        else:
            _assign(model, weights)
        return np.asarray(jax.jit(functools.partial(model, training=False))(_before_preprocessing(model, inputs)))


def _assign(model: Any, variables: dict[str, Tree]) -> None:
    leaves = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()}
    for layer in model.layers:
        if type(layer).__name__ == "Normalization":
            continue
        for variable in layer.weights:
            name, kind = layer.name, variable.path.rsplit("/", 1)[-1]
            if type(layer).__name__ == "SeparableConv2D":
                part, _, kind = kind.rpartition("_")
                name = f"{name}_{part}"
            leaf = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}.get(kind, kind)
            value = leaves.pop(f"{'batch_stats' if leaf in ('mean', 'var') else 'params'}/{name}/{leaf}")
            depthwise = type(layer).__name__ == "DepthwiseConv2D" or (name.endswith("_depthwise") and value.ndim == 4)
            variable.assign(value.transpose(0, 1, 3, 2) if depthwise and kind == "kernel" else value)
    assert not leaves, sorted(leaves)


def _before_preprocessing(model: Any, inputs: np.ndarray) -> np.ndarray:
    """Images that a model with preprocessing within (EfficientNet) turns into `inputs`."""
    for layer in model.layers:
        if type(layer).__name__ == "Normalization":
            mean, variance = np.asarray(layer.mean), np.asarray(layer.variance)
            return 255 * (inputs * np.sqrt(variance) + mean)
    return inputs
