"""Pretrained weights: a catalog of files, readers, a strict merge, and the download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.backbones import create_backbone
from bmjax.registry import unknown
from bmjax.weights import catalog, download, keras_h5
from bmjax.weights.merge import merge

Tree = Any


def layer_order(backbone: str, include_top: bool = False) -> list[str]:
    """Names of a backbone's layers with parameters, in the order they run."""
    model = create_backbone(backbone, include_top=include_top)
    order: list[str] = []

    def trace() -> jax.Array:
        variables = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        order.extend(variables["params"])  # in order here; a tree that leaves jax comes back sorted
        return jnp.zeros(())

    jax.eval_shape(trace)
    return order


def load_into(variables: dict[str, Tree], backbone: str, weights: str, *, include_top: bool = False) -> dict[str, Tree]:
    """A backbone's {"params", "batch_stats"} with every array replaced by a weight file's.

    `weights` is "imagenet" (the catalog's file, downloaded if need be) or the path of a file.

    Raises:
      FileNotFoundError: no file at that path.
      ValueError: the file doesn't match the backbone leaf by leaf.
      ConnectionError: the file can't be downloaded.
    """
    if weights == "imagenet":
        path = download.fetch(catalog.find(backbone, include_top))
    else:
        path = Path(weights).expanduser()
        if not path.exists() and path.suffix == "":
            raise unknown("weights (a name, or the path of a file)", weights, ["imagenet", "none"])
    layers = keras_h5.read(path)
    source = keras_h5.to_variables(path, layers, layer_order(backbone, include_top))
    return merge(variables, source, origin=str(path))
