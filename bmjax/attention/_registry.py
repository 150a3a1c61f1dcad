"""Finds attention variants by name."""

from __future__ import annotations

import collections
import inspect
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from bmjax import registry
from bmjax.attention._placing import Chain
from bmjax.config.arguments import check_type
from bmjax.config.checks_options import ANY, AT_LEAST_0, ODD, Bound, OptionError, held_options

_FOLDER = "bmjax.attention"
# Variant -> field -> its bound, where that is not the usual one of `held_options`.
_BOUNDS: dict[str, dict[str, Bound]] = {
    "cbam": {"kernel_size": ODD},
    "eca": {"kernel_size": ODD, "beta": ANY},
    "gather_excite": {"extent": AT_LEAST_0},
    "mhsa": {"max_distance": AT_LEAST_0},
    "triplet": {"kernel_size": ODD},
}


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


def create_attention(name: str, /, **options: Any) -> nn.Module:
    """An attention module by its file's name, a `.py` file's path, or `package.module:Class`; options are its fields.

    Several joined by `+` are a `Chain`; options are then dicts by part: `("se+simam", se={"ratio": 8})`. A part is
    called as its variant, class or file, and `se_2` where that comes a second time. Lists among the options (from JSON)
    become tuples, for modules must be hashable. Options are held to the fields' types, those of a variant here also to
    their bounds.

    Raises:
      TypeError: the name is no text, or a field of a module of the user's has neither a default nor a value.
      ValueError: a name or an option is not known, an option's value is not one of its field, or a path is not that of
        one Flax module.
      FileNotFoundError: there is no such `.py` file.
    """
    check_type("name", name, str, "text: a variant's name, 'path.py' or 'module:Class'")
    if "+" in name:
        return _chain(name, options)
    own = registry.is_own(name)
    if not own and name not in list_attention():
        raise registry.unknown("attention", name, list_attention())
    cls = registry.load_own("attention", name if own else f"{_FOLDER}.{name}", _is_module, "a Flax module")
    return cls(**held_options(f"attention {name!r}", cls, options, None if own else _BOUNDS.get(name, {})))


def _chain(names: str, options: dict[str, Any]) -> Chain:
    variants, seen = dict[str, str](), collections.Counter[str]()
    for variant in names.split("+"):
        part = registry.label_of(variant)
        seen[part] += 1
        variants[f"{part}_{seen[part]}" if seen[part] > 1 else part] = variant
    for part, fields in options.items():
        if part not in variants:
            raise OptionError(str(registry.unknown(f"part of attention {names!r} in its options", part, variants)))
        if not isinstance(fields, dict):
            raise OptionError(f"option {part!r} of attention {names!r} is {fields!r}; expected a dict of its fields")
    return Chain(
        tuple((part, create_attention(variant, **options.get(part, {}))) for part, variant in variants.items())
    )
