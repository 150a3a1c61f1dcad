"""The contract of an optimizer: f(learning_rate, **options) -> optax.GradientTransformation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax.analysis.contract.verdict import Contract, Tree, leaves, say, unequal

STEPS = 50
LR = 1e-3


class Subject:
    """An optimizer under examination; `part` makes it from a learning rate."""

    def __init__(self, part: Callable[[float], Any]):
        self.part = part

    @functools.cached_property
    def tx(self) -> Any:
        return self.part(LR)

    def params(self, dtype: Any = jnp.float32, seed: int = 0) -> Tree:
        """Parameters as a classifier has them: dicts in dicts, of kernels and biases; some of one number."""
        r = np.random.default_rng(seed)
        shapes = {
            "backbone": {"block": {"conv": {"kernel": (3, 3, 2, 4)}, "norm": {"scale": (4,), "bias": (4,)}}},
            "head": {"logits": {"kernel": (4, 3), "bias": (3,)}, "temperature": ()},
        }
        return jax.tree.map(
            lambda shape: jnp.asarray(r.standard_normal(shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )

    @functools.cached_property
    def target(self) -> Tree:
        return self.params(seed=1)

    def distance(self, params: Tree) -> jax.Array:
        """The quadratic: half the squared distance to `target`."""
        parts = jax.tree.map(lambda p, t: 0.5 * jnp.square(p - t).sum(), params, self.target)
        return sum(jax.tree.leaves(parts), jnp.zeros(()))

    @functools.cached_property
    def step(self) -> Any:
        """(params, state) -> the same after an update down the quadratic; compiled."""

        def one(params: Tree, state: Tree) -> tuple[Tree, Tree]:
            updates, state = self.tx.update(jax.grad(self.distance)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(one)

    def after(self, steps: int, params: Tree, state: Tree) -> tuple[Tree, Tree]:
        for _ in range(steps):
            params, state = self.step(params, state)
        return params, state


def made(s: Subject) -> str | None:
    """Made by f(learning_rate): an optax.GradientTransformation."""
    if isinstance(s.tx, optax.GradientTransformation):
        return None
    return say(f"f({LR}) gave {s.tx!r}", "an optax.GradientTransformation", "See optax.chain, and `optax.adam` itself.")


def call(s: Subject) -> str | None:
    """init(params) and update(gradients, state, params) work on nested dicts, and updates are like the parameters."""
    params = s.params()
    updates, _ = jax.eval_shape(lambda p: s.tx.update(p, s.tx.init(p), p), params)
    hint = "update() is given gradients, state and params, and nothing else: no value, no function."
    if jax.tree.structure(updates) != jax.tree.structure(params):
        return say("updates have another structure than the parameters", "the same tree", hint)
    for (path, u), (_, p) in zip(leaves(updates), leaves(params), strict=True):
        if u.shape != p.shape or u.dtype != p.dtype:
            return say(f"the update of {path} is {u.dtype}{list(u.shape)}", f"{p.dtype}{list(p.shape)}", hint)
    return None


def state(s: Subject) -> str | None:
    """The state is a tree of arrays, of the same shapes and types before and after an update."""
    first = s.tx.init(s.params())
    for path, leaf in leaves(first):
        if not hasattr(leaf, "dtype"):
            hint = "Use jnp.zeros((), jnp.int32) for a count: a checkpoint holds arrays."
            return say(f"{path} of the state is {leaf!r}", "an array", hint)
    after = jax.eval_shape(lambda p: s.tx.update(p, s.tx.init(p), p)[1], s.params())
    kinds = [[(path, v.shape, jnp.dtype(v.dtype)) for path, v in leaves(tree)] for tree in (first, after)]
    for before, now in zip(*kinds, strict=False):
        if before != now:
            return say(
                f"{now[0]} became {now[2]}{list(now[1])}", f"{before[2]}{list(before[1])}", "Each step compiles."
            )
    if len(kinds[0]) != len(kinds[1]):
        seen = f"an update took the state from {len(kinds[0])} arrays to {len(kinds[1])}"
        return say(seen, "the same number", "What is kept is made by init().")
    return None


def zero_gradient(s: Subject) -> str | None:
    """A gradient of zero gives a finite update and state: dead units and frozen norms have one."""
    params = s.params()
    zero = jax.tree.map(jnp.zeros_like, params)
    found = s.tx.init(params)
    for _ in range(2):
        updates, found = jax.jit(s.tx.update)(zero, found, params)
        for path, leaf in leaves({"update": updates, "state": found}):
            if np.isnan(np.asarray(leaf, np.float64)).any():  # a best value so far may be infinite
                return say(f"{path} is not a number", "numbers", "Add an epsilon to the root or quotient.")
    return None


def descends(s: Subject) -> str | None:
    """Lowers a quadratic in 50 steps at learning rate 1e-3."""
    params = s.params()
    before = float(s.distance(params))
    end, _ = s.after(STEPS, params, s.tx.init(params))
    after = float(s.distance(end))
    if not after < before:
        hint = "Look at the sign: an update is added, so it points down, -learning_rate * gradient."
        return say(f"{STEPS} steps took it from {before:.6g} to {after:.6g}", "a smaller value", hint)
    return None


def rate(s: Subject) -> str | None:
    """The learning rate decides the size of an update."""
    params = s.params()
    gradient = jax.grad(s.distance)(params)
    small, large = (optax.tree.norm(tx.update(gradient, tx.init(params), params)[0]) for tx in (s.tx, s.part(10 * LR)))
    if not large > small:
        hint = "Pass learning_rate on: optim.lr and lr_scale would change nothing."
        return say(f"10 times the rate took an update from {small:.3g} to {large:.3g}", "a larger one", hint)
    return None


def resumes(s: Subject) -> str | None:
    """A state that went to disk and back, as NumPy arrays, goes on to the bit."""
    params = s.params()
    half = s.after(3, params, s.tx.init(params))
    whole, _ = s.after(3, *half)
    flat, tree = jax.tree.flatten(half)
    read = jax.tree.unflatten(tree, [np.array(v) for v in flat])
    again, _ = s.after(3, *read)
    if differs := unequal({"params": again}, {"params": whole}):
        hint = "What an update depends on is in the state: look for a variable outside that each call changes."
        return say(f"resumed after 3 of 6 steps it differs in {differs}", "the same parameters", hint)
    return None


def eager_is_jit(s: Subject) -> str | None:
    """Gives the same with and without jit, within 1e-5."""
    params = s.params()
    gradient = jax.grad(s.distance)(params)
    eager = s.tx.update(gradient, s.tx.init(params), params)[0]
    jitted = jax.jit(s.tx.update)(gradient, s.tx.init(params), params)[0]
    if differs := unequal({"update": jitted}, {"update": eager}, 1e-5):
        hint = "Look for Python code that acts on the kind of array, or a global that is read while tracing."
        return say(f"with jit differs from without in {differs}", "at most 1e-05", hint)
    return None


def float64(s: Subject) -> str | None:
    """Updates of float64 parameters are float64: runs on many devices are proven equal in it."""
    with jax.enable_x64(True):
        updates = jax.eval_shape(lambda p: s.tx.update(p, s.tx.init(p), p)[0], s.params(jnp.float64))
        for path, u in leaves(updates):
            if u.dtype != jnp.float64:
                return say(f"the update of {path} is {u.dtype}", "float64", "Make arrays as jnp.zeros_like(p).")
    return None


CONTRACT = Contract(
    "optimizer",
    Subject,
    (made, call, state, zero_gradient, descends, rate, resumes, eager_is_jit, float64),
    basis=("made", "call", "state"),
)
