"""Images given as arrays: held to the form that every image here has, each wrong one refused with its remedy."""

from __future__ import annotations

from typing import Any

import numpy as np

_FORM = "uint8 0..255 RGB [n, h, w, 3]"


def check_images(images: Any, *, what: str = "images") -> np.ndarray:
    """Images uint8 [n, h, w, 3] as an array; one that is such already is given back, not copied. n may be 0.

    Raises:
      TypeError: no array, nor a list of arrays of one shape.
      ValueError: another type, range or shape; names it and the remedy.
    """
    if isinstance(images, np.ma.MaskedArray):
        raise TypeError(f"{what} are a masked array; expected {_FORM}: {what}.filled(255) fills the gaps with white")
    if isinstance(images, (list, tuple)) and not images:
        return np.zeros((0, 1, 1, 3), np.uint8)
    try:
        array = images if isinstance(images, np.ndarray) else np.asarray(images)
    except Exception as e:  # of arrays of several shapes, and of whatever else there is
        sizes = "a list of arrays that are not all of one shape; resize them, or give each alone"
        kind = sizes if isinstance(images, (list, tuple)) else type(images).__name__
        raise TypeError(f"{what} are {kind}; expected {_FORM}") from e
    if array.dtype.kind not in "biufc":
        remedy = "; files are read by bmjax.data.read_files, or by `bmjax predict`" if array.dtype.kind in "US" else ""
        raise TypeError(f"{what} are {type(images).__name__} of {array.dtype}; expected {_FORM}{remedy}")
    if array.dtype != np.uint8:
        raise ValueError(f"{what} are {array.dtype}; expected uint8, 0..255: {_type_remedy(array, what)}")
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"{what} have shape {list(array.shape)}; expected [n, h, w, 3]{_shape_remedy(array, what)}")
    if len(array) and 0 in array.shape:
        raise ValueError(f"{what} have shape {list(array.shape)}; expected [n, h, w, 3] with h and w at least 1")
    return array


def _type_remedy(array: np.ndarray, what: str) -> str:
    """How values of another type become bytes; a cast alone would turn floats 0..1 into black."""
    if array.dtype.kind == "b":
        return f"255 * {what}.astype(np.uint8) shows True as white"
    if array.dtype.kind == "c" or not array.size:
        return f"{what}.astype(np.uint8) of values 0..255"
    least, most = float(array.min()), float(array.max())
    if not (np.isfinite(least) and np.isfinite(most)):
        return "some values are not finite"
    if least < 0 or most > 255:
        return f"the values are from {least:g} to {most:g}; give the pixels as they are: the network normalises"
    if array.dtype.kind == "f":
        scale = "255 * " if most <= 1 else ""
        return f"np.round({scale}{what}).astype(np.uint8), as the values are from {least:g} to {most:g}"
    return f"{what}.astype(np.uint8)"


def _shape_remedy(array: np.ndarray, what: str) -> str:
    shape = array.shape
    if array.ndim == 3 and shape[-1] == 3:
        return f": one image is {what}[None]"
    if array.ndim == 4 and shape[1] == 3:
        return f", the channels last: np.moveaxis({what}, 1, -1)"
    if array.ndim == 4 and shape[-1] == 1:
        return f": grey images become RGB by np.repeat({what}, 3, axis=-1)"
    if array.ndim == 4 and shape[-1] == 4:
        return f": without transparency they are {what}[..., :3]"
    if array.ndim == 3:
        return f": grey images become RGB by np.repeat({what}[..., None], 3, axis=-1)"
    return ""
