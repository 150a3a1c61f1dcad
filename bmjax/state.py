"""Everything a resume needs, in one pytree, and the split of parameters into trainable and frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

Tree = Any
Path = tuple[str, ...]


class TrainState(flax.struct.PyTreeNode):
    """State between two updates; `step` counts completed updates.

    `key` holds the raw data of the run's PRNG key and never changes: every draw folds the step into it. `ema` is
    {"params", "batch_stats"} or None. `opt_state` covers the trainable parameters of the current stage only.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    ema: Tree
    key: jax.Array

    def variables(self) -> dict[str, Tree]:
        """What evaluation uses: the moving average where there is one."""
        return self.ema if self.ema is not None else {"params": self.params, "batch_stats": self.batch_stats}


def split_params(params: Tree, is_trainable: Callable[[Path], bool]) -> tuple[Tree, Tree]:
    """(trainable, frozen) as nested dicts without empty branches; `merge_params` is the inverse."""
    flat = traverse_util.flatten_dict(params)
    trainable = {path: leaf for path, leaf in flat.items() if is_trainable(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(frozen)


def merge_params(trainable: Tree, frozen: Tree) -> Tree:
    """The whole tree of two that `split_params` made."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen))


def create_state(
    variables: dict[str, Tree],
    tx: optax.GradientTransformation,
    is_trainable: Callable[[Path], bool],
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """State at step 0. `variables` is {"params", "batch_stats"}."""
    both = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=both["params"],
        batch_stats=both["batch_stats"],
        opt_state=tx.init(split_params(both["params"], is_trainable)[0]),
        ema=jax.tree.map(jnp.copy, both) if ema else None,
        key=jax.random.key_data(jax.random.key(seed)),
    )
