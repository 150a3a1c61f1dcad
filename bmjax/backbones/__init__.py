"""The backbones: one file a family, whose `VARIANTS` says what it offers.

A backbone is a Flax module, called `(x, *, train, mode, tap)`; it names its stages in `stages` and calls
`tap(stage, x) -> x` on each stage's output, so that attention can go after any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax.linen as nn

from bmjax import registry


def _variants() -> dict[str, Callable[..., nn.Module]]:
    return {name: make for module in registry.modules(__name__).values() for name, make in module.VARIANTS.items()}


def family(name: str) -> ModuleType:
    """The module that offers a backbone.

    Raises:
      ValueError: the name is not known.
    """
    for module in registry.modules(__name__).values():
        if name in module.VARIANTS:
            return module
    raise registry.unknown("backbone", name, _variants())


def list_backbones() -> list[str]:
    """Names that `create_backbone` knows, sorted."""
    return sorted(_variants())


def create_backbone(name: str, **options: Any) -> nn.Module:
    """A backbone by name; options are fields of its module.

    Raises:
      ValueError: the name is not known.
      TypeError: an option is not a field of the module.
    """
    # JSON has no tuples, and a module's fields must hash.
    fixed = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return family(name).VARIANTS[name](**fixed)
