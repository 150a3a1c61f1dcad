"""From pixels to what a backbone was trained on. The weight's record names the mode, never the caller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.registry import unknown

CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)
IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)
MODES = ("caffe", "torch", "tf", "unit", "raw")


def _row(values: tuple[float, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.asarray(np.asarray(values), dtype).reshape(1, 1, 1, -1)


def preprocess(x: jax.Array, mode: str) -> jax.Array:
    """RGB 0..255 [b, h, w, 3], floating -> the input of a backbone, same shape and type.

    Modes, as `keras.applications.imagenet_utils.preprocess_input` computes them: `caffe` BGR minus the mean;
    `torch` 0..1, minus the mean, over the standard deviation; `tf` -1..1. `unit` 0..1; `raw` unchanged.

    Raises:
      ValueError: the mode is not known.
      TypeError: x is not floating.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"images to preprocess are {x.dtype}; expected a floating type, 0..255")
    if mode == "caffe":
        return x[..., ::-1] - _row(CAFFE_MEAN_BGR, x.dtype)
    if mode == "torch":
        return (x / 255 - _row(IMAGENET_MEAN_RGB, x.dtype)) / _row(IMAGENET_STD_RGB, x.dtype)
    if mode == "tf":
        return x / 127.5 - 1
    if mode == "unit":
        return x / 255
    if mode == "raw":
        return x
    raise unknown("preprocessing mode", mode, MODES)
