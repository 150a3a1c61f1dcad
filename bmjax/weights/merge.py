"""Strict merge: a bijection between the leaves of two trees, or an error that names the first that differs."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import traverse_util

Tree = Any


def merge(target: Tree, source: Tree, origin: str) -> Tree:
    """The source's arrays in the target's structure and dtypes, on the host. `origin` names the source in errors.

    Raises:
      ValueError: a leaf is on one side only, or two shapes differ; names the first such leaf and both shapes.
    """
    wanted: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(target))
    given: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(source))
    extra = [path for path in given if path not in wanted]
    for path, leaf in wanted.items():
        name, expected = "/".join(path), tuple(leaf.shape)
        if path not in given:
            message = f"{origin}: leaf {name!r} is missing; expected shape {expected}"
            if extra:
                message += (
                    f". What has no counterpart begins with {'/'.join(extra[0])!r} of shape {given[extra[0]].shape}"
                )
            raise ValueError(message)
        if tuple(given[path].shape) != expected:
            raise ValueError(f"{origin}: leaf {name!r} has shape {tuple(given[path].shape)}; expected {expected}")
    for path in extra:
        name, shape = "/".join(path), tuple(given[path].shape)
        raise ValueError(f"{origin}: leaf {name!r} of shape {shape} is left over; the network has none of that name")
    return traverse_util.unflatten_dict({path: np.asarray(given[path], leaf.dtype) for path, leaf in wanted.items()})
