"""The backbones: one file a family, whose `VARIANTS` says what it offers.

A backbone is a Flax module, called `(x, *, train, mode, tap)`; it names its stages in `stages` and calls
`tap(stage, x) -> x` on each stage's output, so that attention can go after any of them.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax import registry


def _families() -> dict[str, ModuleType]:
    return {name: module for module in registry.modules(__name__).values() for name in module.VARIANTS}


def list_backbones() -> list[str]:
    """Names that `create_backbone` knows, sorted."""
    return sorted(_families())


def family_of(name: str) -> ModuleType:
    """The module of bmjax/backbones that a backbone is of.

    Raises:
      ValueError: the name is not known.
    """
    families = _families()
    if name not in families:
        raise registry.unknown("backbone", name, families)
    return families[name]


def create_backbone(name: str, **options: Any) -> nn.Module:
    """A backbone by name; options are fields of its module.

    Raises:
      ValueError: the name is not known.
      TypeError: an option is not a field of the module.
    """
    # JSON has no tuples, and a module's fields must hash.
    fixed = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return family_of(name).VARIANTS[name](**fixed)


@functools.lru_cache(maxsize=8)
def stage_of_layers(backbone: nn.Module) -> dict[str, str]:
    """The stage of each layer with parameters: the first that is reached after it; of a top's, the last stage."""
    stages: dict[str, str] = {}

    def trace() -> None:
        def run(module: Any, x: jax.Array) -> None:
            def tap(stage: str, x: jax.Array) -> jax.Array:
                stages.update(dict.fromkeys(module.variables["params"].keys() - stages.keys(), stage))
                return x

            module(x, tap=tap)
            stages.update(dict.fromkeys(module.variables["params"].keys() - stages.keys(), module.stages[-1]))

        nn.init(run, backbone)(jax.random.key(0), jnp.zeros((1, 128, 128, 3)))

    jax.eval_shape(trace)
    return stages
