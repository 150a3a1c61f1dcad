"""A Flax module under examination: what the checks of its contract need of it, computed once.

One program that holds both modes and their gradients is compiled for each kind of input, and serves most checks.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.attention import sown_maps
from bmjax.layers.initial import evaluated
from bmjax.layers.ops import at_least_float32

Tree = Any
BATCH = 4
MODES = {"evaluation": False, "training": True}
HUGE = 1e4


class Subject:
    """A module under examination, and what several checks need of it, computed once; here an attention variant.

    `make` makes the module with its default options.
    """

    word, unit = "features", "places"
    size: tuple[int, ...] = (5, 7)
    """Odd and not square; further ones are the contract's."""
    channels = 64
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float64")
    constants: tuple[float, ...] = (0.0, 1.0, -300.0, 1e4)
    huge = HUGE
    tolerance = 1e-5
    """Of two ways to compute the same in float32."""

    def __init__(self, make: Callable[[], nn.Module]):
        self.make = make
        self.traces = 0

    @functools.cached_property
    def module(self) -> nn.Module:
        return self.make()

    @functools.cached_property
    def initial(self) -> Tree:
        variables = dict(evaluated(lambda x: self.module.init(init_keys(), x), self.features()))
        variables.pop("intermediates", None)
        return variables

    @functools.cached_property
    def variables(self) -> Tree:
        """Random ones, statistics too, so that nothing hides behind a zero."""
        r = np.random.default_rng(1)
        # A variance must stay positive.
        return jax.tree.map(lambda v: v + jnp.asarray(0.1 * np.abs(r.standard_normal(v.shape)), v.dtype), self.initial)

    def shape(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The shape of an input: [BATCH, h, w, channels]."""
        return (BATCH, *(self.size if size is None else size), self.channels)

    def features(self, size: tuple[int, ...] | None = None, dtype: str = "float32", seed: int = 0) -> jax.Array:
        """Random input, standard normal."""
        values = np.random.default_rng(seed).standard_normal(self.shape(size))
        return jnp.asarray(values, jnp.dtype(dtype))

    def described(self, size: tuple[int, ...], dtype: str) -> str:
        """An input in words."""
        places = f" of {'x'.join(map(str, size))} {self.unit}" if size else ""
        return f"{dtype} {self.word}{places}"

    def finite_at(self) -> list[tuple[tuple[int, ...], str]]:
        """Sizes and types at which results must be finite."""
        return [(self.size, dtype) for dtype in self.dtypes if dtype != "float64"]

    def apply(self, variables: Tree, x: jax.Array, train: bool, dropout: int = 1) -> dict[str, Any]:
        """{"y", "maps", "stats"}; `dropout` seeds the dropout's key."""
        mutable = [*(k for k in self.initial if k != "params"), "intermediates"]
        rngs = {"dropout": jax.random.key(dropout)}
        y, new = self.module.apply(variables, x, train=train, rngs=rngs, mutable=mutable, **self.keywords(x))
        return {"y": y, "maps": sown_maps(dict(new)), "stats": dict(new).get("batch_stats", {})}

    def keywords(self, x: jax.Array) -> dict[str, Any]:
        """Further arguments of the module's call."""
        del x
        return {}

    def abstract(self, size: tuple[int, ...], dtype: str, train: bool) -> dict[str, Any]:
        """As `apply`, shapes and types alone: nothing is compiled."""
        x = jax.ShapeDtypeStruct(self.shape(size), jnp.dtype(dtype))
        variables = as_dtype(self.initial, "float64") if dtype == "float64" else self.initial
        return jax.eval_shape(functools.partial(self.apply, train=train), variables, x)

    @functools.cached_property
    def program(self) -> Programs:
        """(variables, x) -> {mode: {"y", "maps", "stats", "gradients", "input gradient"}}; compiles for each type."""

        def both(variables: Tree, x: jax.Array) -> dict[str, Any]:
            self.traces += 1
            return {mode: self.with_gradients(variables, x, train) for mode, train in MODES.items()}

        return Programs(both)

    def with_gradients(self, variables: Tree, x: jax.Array, train: bool) -> dict[str, Any]:
        """What `apply` gives, and the gradients of a sum of it without symmetry, by params and x."""
        rest = {k: v for k, v in variables.items() if k != "params"}

        def loss(params: Tree, x: jax.Array) -> tuple[jax.Array, Any]:
            out = self.apply(rest | {"params": params}, x, train)
            y = out["y"].astype(at_least_float32(out["y"].dtype))
            # Weights without a pattern of any axis, so that no sum over places or channels cancels.
            return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), out

        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (gradients, of_input), out = grad(variables.get("params", {}), x)
        return out | {"gradients": gradients, "input gradient": of_input}

    @functools.cached_property
    def usual(self) -> dict[str, Any]:
        """The program's results for random float32 input. What further checks will ask of it is compiled meanwhile."""
        for size, dtype in self.finite_at():
            with contextlib.suppress(Exception):  # the check that is about it says so
                self.program.begin(self.variables, self.features(size, dtype))
        return self.program(self.variables, self.features())

    @functools.cached_property
    def eager(self) -> dict[str, Any]:
        """Results by mode without jit."""
        return {mode: self.apply(self.variables, self.features(), train) for mode, train in MODES.items()}


class Programs:
    """A function of arrays, compiled for each kind of them as jit does it, but several at a time: tracing is done by
    the caller's thread, compiling by others."""

    def __init__(self, fn: Callable[..., Any]):
        self._jitted = jax.jit(fn)
        self._compiled: dict[Any, concurrent.futures.Future[Any]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def begin(self, *arguments: Tree) -> concurrent.futures.Future[Any]:
        """Has the program for such arguments compiled, if it is not."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple(jax.typeof(leaf) for leaf in leaves)
        if key not in self._compiled:
            self._compiled[key] = self._pool.submit(self._jitted.lower(*arguments).compile)
        return self._compiled[key]

    def __call__(self, *arguments: Tree) -> Any:
        return self.begin(*arguments).result()(*arguments)


def init_keys() -> dict[str, jax.Array]:
    return {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def as_dtype(tree: Tree, dtype: str) -> Tree:
    """A tree of floating arrays, or of their shapes, in another type."""

    def cast(v: Any) -> Any:
        if isinstance(v, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(v.shape, jnp.dtype(dtype))
        return jnp.asarray(v, dtype)

    return jax.tree.map(cast, tree)
