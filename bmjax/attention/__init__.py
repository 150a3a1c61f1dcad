"""Attention: one file is one variant, and the folder is the registry.

A file holds one public Flax module, `(x [b, h, w, c], *, train=False) -> [b, h, w, c]`, whose fields are its options.
It sows its map: `self.sow("intermediates", "map", m)`, m [b, h, w] over places or [b, c] over channels, 0..1. A field
`dtype`, where it has one, gets the compute type. Adding a file is all it takes: the contract tests find it.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from bmjax import registry


def _module_class(module: ModuleType) -> type[nn.Module]:
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise ValueError(f"{module.__name__} holds the public Flax modules: {names}; expected exactly one")
    return classes[0]


def list_attention() -> list[str]:
    """Names that `create_attention` knows, sorted."""
    return registry.module_names(__name__)


def sown_maps(variables: dict[str, Any]) -> dict[str, jax.Array]:
    """The maps in what `apply` with mutable intermediates left: path of the module that sowed, by slashes -> its map.

    A module's own path is empty; of one that was called more than once the last map counts.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables.get("intermediates", {}))
    return {"/".join(path[:-1]): maps[-1] for path, maps in flat.items() if path[-1] == "map"}


def create_attention(name: str, **options: Any) -> nn.Module:
    """An attention module by its file's name, a `.py` file's path, or `package.module:Class`; options are its fields.

    Lists among the options (from JSON) become tuples, for modules must be hashable.

    Raises:
      ValueError: the name or an option is not known, or the path is not that of a Flax module.
      FileNotFoundError: there is no such `.py` file.
    """
    if name.endswith(".py"):
        cls = _module_class(registry.import_file(name))
    elif ":" in name:
        cls = registry.import_object(name)
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
            raise ValueError(f"attention {name!r} is {cls!r}; expected a subclass of flax.linen.Module")
    elif name in list_attention():
        cls = _module_class(registry.modules(__name__)[name])
    else:
        raise registry.unknown("attention", name, list_attention())
    fields = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]
    for option in options:
        if option not in fields:
            raise registry.unknown(f"option of attention {name!r}", option, fields)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
