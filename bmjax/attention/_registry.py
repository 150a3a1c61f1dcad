"""Finds attention variants by name."""

from __future__ import annotations

import collections
import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from bmjax import registry
from bmjax.attention._placing import Chain

_FOLDER = "bmjax.attention"


def _is_module(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def list_attention() -> list[str]:
    """Names that `create_attention` knows, sorted."""
    return registry.module_names(_FOLDER)


def sown_maps(variables: dict[str, Any]) -> dict[str, jax.Array]:
    """The maps in what `apply` with mutable intermediates left: path of the module that sowed, by slashes -> its map.

    A module's own path is empty; of one that was called more than once the last map counts.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables.get("intermediates", {}))
    return {"/".join(path[:-1]): maps[-1] for path, maps in flat.items() if path[-1] == "map"}


def create_attention(name: str, **options: Any) -> nn.Module:
    """An attention module by its file's name, a `.py` file's path, or `package.module:Class`; options are its fields.

    Several joined by `+` are a `Chain`; options are then dicts by part: `("se+simam", se={"ratio": 8})`. A part is
    called as its variant, class or file, and `se_2` where that comes a second time. Lists among the options (from JSON)
    become tuples, for modules must be hashable.

    Raises:
      ValueError: a name or an option is not known, or a path is not that of one Flax module.
      FileNotFoundError: there is no such `.py` file.
    """
    if "+" in name:
        return _chain(name, options)
    if registry.is_own(name):
        cls = registry.load_own("attention", name, _is_module, "a Flax module")
    elif name in list_attention():
        cls = registry.load_own("attention", f"{_FOLDER}.{name}", _is_module, "a Flax module")
    else:
        raise registry.unknown("attention", name, list_attention())
    fields = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]
    for option in options:
        if option not in fields:
            raise registry.unknown(f"option of attention {name!r}", option, fields)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _chain(names: str, options: dict[str, Any]) -> Chain:
    variants, seen = dict[str, str](), collections.Counter[str]()
    for variant in names.split("+"):
        part = registry.label_of(variant)
        seen[part] += 1
        variants[f"{part}_{seen[part]}" if seen[part] > 1 else part] = variant
    for part, fields in options.items():
        if part not in variants:
            raise registry.unknown(f"part of attention {names!r} in its options", part, variants)
        if not isinstance(fields, dict):
            raise ValueError(f"option {part!r} of attention {names!r} is {fields!r}; expected a dict of its fields")
    return Chain(
        tuple((part, create_attention(variant, **options.get(part, {}))) for part, variant in variants.items())
    )
