"""Strict merge: a bijection between the leaves of two trees, or an error that names the first that differs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import traverse_util

Tree = Any


def merge(target: Tree, source: Tree, origin: str) -> Tree:
    """The source's arrays in the target's structure and dtypes. `origin` names the source in errors.

    Raises:
      ValueError: a leaf is on one side only, or two shapes differ; names the leaf and the shapes.
    """
    wanted: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(target))
    given: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(source))
    for path, leaf in wanted.items():
        name = "/".join(path)
        if path not in given:
            raise ValueError(f"{origin}: leaf {name!r} is missing; expected shape {tuple(leaf.shape)}")
        if tuple(given[path].shape) != tuple(leaf.shape):
            found, expected = tuple(given[path].shape), tuple(leaf.shape)
            raise ValueError(f"{origin}: leaf {name!r} has shape {found}; expected {expected}")
    for path, leaf in given.items():
        if path not in wanted:
            name = "/".join(path)
            raise ValueError(f"{origin}: leaf {name!r} of shape {tuple(leaf.shape)} is left over; the network has none")
    return traverse_util.unflatten_dict({path: jnp.asarray(given[path], leaf.dtype) for path, leaf in wanted.items()})
