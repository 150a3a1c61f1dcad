"""What is strict about leaves: a bijection between those of two trees, values that make sense, or an error by name."""

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


def check_leaves(tree: Tree, origin: str) -> None:
    """Looks for values that no trained network has. `origin` names the tree in errors.

    Raises:
      ValueError: a leaf isn't finite, a variance is negative, or a kernel, scale or variance is constant where it can't
        be; names the first such leaf.
    """
    leaves: dict[str, np.ndarray] = traverse_util.flatten_dict(tree, sep="/")  # type: ignore[assignment]
    for name, leaf in leaves.items():
        what = name.rsplit("/", 1)[-1]
        finite = np.isfinite(leaf)
        if not finite.all():
            raise ValueError(f"{origin}: leaf {name!r} has {(~finite).sum()} values that aren't finite")
        if what == "var" and leaf.min() < 0:
            raise ValueError(f"{origin}: leaf {name!r} holds {leaf.min()}; expected variances of 0 or more")
        if what == "kernel" and leaf.size > 1 and leaf.min() == leaf.max():
            raise ValueError(f"{origin}: leaf {name!r} is {leaf.flat[0]} throughout; expected a trained kernel")
        if what in ("scale", "var") and not leaf.any():
            raise ValueError(f"{origin}: leaf {name!r} is zero throughout; the network would be blind")
