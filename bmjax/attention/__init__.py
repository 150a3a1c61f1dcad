"""Attention: one file is one variant, and the folder is the registry.

A file holds one public Flax module, `(x [b, h, w, c], *, train=False) -> [b, h, w, c]`, whose fields are its options.
It sows its map: `self.sow("intermediates", "map", m)`, m [b, h, w] over places or [b, c] over channels, 0..1. A field
`dtype`, where it has one, gets the compute type. Adding a file is all it takes: the contract tests find it.

One that only weighs channels, by what their means over places tell, may say `commutes_with_pooling = True`: pooled, its
result is then its result for pooled features, and training on cached features, which pools them first, is many times
faster.

Here are also the ways to place variants: `Chain`, one after another, and `IdentityGate`, from the identity on.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
from pathlib import PurePath
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from bmjax import registry
from bmjax.layers import at_least_float32, over_channels


class Chain(nn.Module):
    """Variants one after another, each with its parameters and its map under its name."""

    variants: tuple[tuple[str, nn.Module], ...]

    @property
    def commutes_with_pooling(self) -> bool:
        return all(commutes_with_pooling(module) for _, module in self.variants)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]."""
        for name, module in self.variants:
            x = module.clone(parent=self, name=name)(x, train=train)
        return x


class IdentityGate(nn.Module):
    """x + gamma * (y - x), gamma [c] from zero: attention y = f(x) begins as the identity, with a gradient to gamma.

    As in ReZero (Bachlechner et al. 2020, https://arxiv.org/abs/2003.04887), with a factor for each channel as in
    LayerScale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239). The first update moves gamma alone: f's own
    gradient is gamma times what it would be.
    """

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Two of [b, h, w, c] -> [b, h, w, c]."""
        gamma = self.param("gamma", nn.initializers.zeros_init(), x.shape[-1:], jnp.float32)
        # In bfloat16 the sum that is gamma's gradient would lose most of its digits.
        wide = at_least_float32(x.dtype)
        change = over_channels(gamma.astype(wide), x.ndim) * (y.astype(wide) - x.astype(wide))
        return (x.astype(wide) + change).astype(x.dtype)


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


def commutes_with_pooling(module: nn.Module) -> bool:
    """Whether a variant says that its result's mean over places is its result for the mean over places."""
    return getattr(module, "commutes_with_pooling", False)


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

    Several joined by `+` are a `Chain`; options are then dicts by part: `("se+simam", se={"ratio": 8})`. A part is
    called as its variant, class or file, and `se_2` where that comes a second time. Lists among the options (from JSON)
    become tuples, for modules must be hashable.

    Raises:
      ValueError: a name or an option is not known, or a path is not that of a Flax module.
      FileNotFoundError: there is no such `.py` file.
    """
    if "+" in name:
        return _chain(name, options)
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


def _chain(names: str, options: dict[str, Any]) -> Chain:
    variants, seen = dict[str, str](), collections.Counter[str]()
    for variant in names.split("+"):
        part = PurePath(variant).stem if variant.endswith(".py") else variant.rpartition(":")[2]
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
