"""The parameters of a classifier: the part each is of, which train, and what they count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import traverse_util

Tree = Any

Path = tuple[str, ...]


def split_params(params: Tree, is_trainable: Callable[[Path], bool]) -> tuple[Tree, Tree]:
    """(trainable, frozen) as nested dicts without empty branches; `merge_params` is the inverse."""
    flat = traverse_util.flatten_dict(params)
    trainable = {path: leaf for path, leaf in flat.items() if is_trainable(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(frozen)


def merge_params(trainable: Tree, frozen: Tree) -> Tree:
    """The whole tree of two that `split_params` made."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen))


Part = Literal["backbone", "attention", "head"]


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
