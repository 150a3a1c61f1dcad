"""An attention variant under examination: what the checks of its contract need of it, computed once.

One program that holds both modes and their gradients is compiled for each kind of input, and serves most checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.attention import sown_maps
from bmjax.layers.ops import at_least_float32

Tree = Any
BATCH, SIZE, CHANNELS = 4, (5, 7), 64
SIZES = ((1, 1), (1, 5), (8, 8))
"""Further heights and widths; SIZE itself is odd and not square."""
MODES = {"evaluation": False, "training": True}


class Subject:
    """A variant under examination, and what several checks need of it, computed once.

    `make` makes the module with its default options.
    """

    def __init__(self, make: Callable[[], nn.Module]):
        self.make = make
        self.traces = 0

    @functools.cached_property
    def module(self) -> nn.Module:
        return self.make()

    @functools.cached_property
    def initial(self) -> Tree:
        variables = dict(jax.jit(lambda x: self.module.init(init_keys(), x))(self.features()))
        variables.pop("intermediates", None)
        return variables

    @functools.cached_property
    def variables(self) -> Tree:
        """Random ones, statistics too, so that nothing hides behind a zero."""
        r = np.random.default_rng(1)
        # A variance must stay positive.
        return jax.tree.map(lambda v: v + jnp.asarray(0.1 * np.abs(r.standard_normal(v.shape)), v.dtype), self.initial)

    def features(self, size: tuple[int, int] = SIZE, dtype: str = "float32", seed: int = 0) -> jax.Array:
        """Random features [BATCH, h, w, CHANNELS], standard normal."""
        values = np.random.default_rng(seed).standard_normal((BATCH, *size, CHANNELS))
        return jnp.asarray(values, jnp.dtype(dtype))

    def apply(self, variables: Tree, x: jax.Array, train: bool, dropout: int = 1) -> dict[str, Any]:
        """{"y", "maps", "stats"}; `dropout` seeds the dropout's key."""
        mutable = [*(k for k in self.initial if k != "params"), "intermediates"]
        rngs = {"dropout": jax.random.key(dropout)}
        y, new = self.module.apply(variables, x, train=train, rngs=rngs, mutable=mutable)
        return {"y": y, "maps": sown_maps(dict(new)), "stats": dict(new).get("batch_stats", {})}

    def abstract(self, size: tuple[int, int], dtype: str, train: bool) -> dict[str, Any]:
        """As `apply`, shapes and types alone: nothing is compiled."""
        x = jax.ShapeDtypeStruct((BATCH, *size, CHANNELS), jnp.dtype(dtype))
        variables = as_dtype(self.initial, "float64") if dtype == "float64" else self.initial
        return jax.eval_shape(functools.partial(self.apply, train=train), variables, x)

    @functools.cached_property
    def program(self) -> Callable[[Tree, jax.Array], dict[str, Any]]:
        """(variables, x) -> {mode: {"y", "maps", "stats", "gradients", "input gradient"}}; compiles for each type."""

        def both(variables: Tree, x: jax.Array) -> dict[str, Any]:
            self.traces += 1
            rest = {k: v for k, v in variables.items() if k != "params"}
            found = {}
            for mode, train in MODES.items():

                def loss(params: Tree, x: jax.Array, train: bool = train) -> tuple[jax.Array, Any]:
                    out = self.apply(rest | {"params": params}, x, train)
                    y = out["y"].astype(at_least_float32(out["y"].dtype))
                    # Weights without a pattern of any axis, so that no sum over places or channels cancels.
                    return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), out

                grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
                (gradients, of_input), out = grad(variables.get("params", {}), x)
                found[mode] = out | {"gradients": gradients, "input gradient": of_input}
            return found

        return jax.jit(both)

    @functools.cached_property
    def usual(self) -> dict[str, Any]:
        """The program's results for random float32 features."""
        return self.program(self.variables, self.features())

    @functools.cached_property
    def eager(self) -> dict[str, Any]:
        """Results by mode without jit."""
        return {mode: self.apply(self.variables, self.features(), train) for mode, train in MODES.items()}


def init_keys() -> dict[str, jax.Array]:
    return {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def as_dtype(tree: Tree, dtype: str) -> Tree:
    """A tree of floating arrays, or of their shapes, in another type."""

    def cast(v: Any) -> Any:
        if isinstance(v, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(v.shape, jnp.dtype(dtype))
        return jnp.asarray(v, dtype)

    return jax.tree.map(cast, tree)
