"""The backbones: one file a family, whose `VARIANTS` says what it offers.

A backbone is a Flax module, called `(x, *, train, mode, tap)`; it names its stages in `stages` and calls
`tap(stage, x) -> x` on each stage's output, so that attention can go after any of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import flax.linen as nn

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
    return family_of(name).VARIANTS[name](**options)
