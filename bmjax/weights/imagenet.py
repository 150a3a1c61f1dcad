"""ImageNet's classes, and what a network with top says of an image."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bmjax.data.images.decode import open_rgb
from bmjax.weights.load import load
from bmjax.weights.network import classes_of, network
from bmjax.weights.preprocess import preprocess
from bmjax.weights.record import WeightRecord

Tree = Any

CROP = 0.875
"""Side of the centre crop over the shorter side of the resized image."""


@functools.cache
def class_names() -> tuple[tuple[str, str], ...]:
    """(synset, WordNet's words) of the 1000 classes, in the order of the networks' outputs."""
    text = (importlib.resources.files("bmjax.weights") / "imagenet_classes.txt").read_text("utf-8")
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return tuple((synset, words) for synset, words in lines)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The usual view of an ImageNet evaluation: shorter side to size / 0.875 (bilinear), the centre of size x size.

    uint8 RGB 0..255 [size, size, 3].
    """
    scale = round(size / CROP) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)), np.uint8)


def classify(backbone: str, weights: str, paths: Sequence[str | Path]) -> tuple[np.ndarray, WeightRecord]:
    """Probabilities [n, 1000] of image files, float32, by the weights' own top, input size and preprocessing.

    Raises:
      FileNotFoundError, ValueError, ConnectionError: as `bmjax.weights.load`; ValueError too where an image can't be
        read or the top isn't ImageNet's.
    """
    record, variables = load(backbone, weights, include_top=True)
    if (classes := classes_of(variables)) != 1000:
        raise ValueError(f"{weights}: {classes} classes; expected ImageNet's 1000")

    @jax.jit
    def probabilities(variables: dict[str, Tree], images: jax.Array) -> jax.Array:
        return jax.nn.softmax(network(record).apply(variables, preprocess(images, record.preprocess)))

    rows = []
    for path in paths:
        try:
            image = centre_crop(open_rgb(path), record.input_size)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
        rows.append(np.asarray(probabilities(variables, jnp.asarray(image[None], jnp.float32)))[0])
    return np.stack(rows), record
