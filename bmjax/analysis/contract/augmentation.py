"""The contract of an augmentation: f(image [h, w, 3], key) -> image, pure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.analysis.contract.verdict import Contract, not_finite, say, unequal

SIZE = 32
KEYS = 16


class Subject:
    """An augmentation under examination."""

    def __init__(self, part: Callable[[jax.Array, jax.Array], Any]):
        self.part = part

    def image(self, dtype: Any = jnp.float32, size: int = SIZE, seed: int = 0) -> jax.Array:
        """Random levels 0..255, [size, size, 3], that differ from place to place."""
        return jnp.asarray(np.random.default_rng(seed).uniform(0, 255, (size, size, 3)), dtype)

    @functools.cached_property
    def keys(self) -> jax.Array:
        return jax.random.split(jax.random.key(0), KEYS)

    @functools.cached_property
    def batch(self) -> Any:
        """(images [n, h, w, 3], keys [n]) -> images, as the training step calls it."""
        return jax.jit(jax.vmap(self.part))

    @functools.cached_property
    def usual(self) -> np.ndarray:
        """One image by all keys [KEYS, h, w, 3]."""
        return np.asarray(self.batch(self.repeated(), self.keys))

    def repeated(self, dtype: Any = jnp.float32) -> jax.Array:
        """One image KEYS times."""
        return jnp.broadcast_to(self.image(dtype), (KEYS, SIZE, SIZE, 3))


def call(s: Subject) -> str | None:
    """Takes an image [h, w, 3] and a key, under vmap and jit, and gives an image of that shape, at any size."""
    for size in (SIZE, 48):
        images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        found = jax.eval_shape(jax.vmap(s.part), images, s.keys[:2])
        shape = getattr(found, "shape", None)
        if shape != (2, size, size, 3):
            seen = f"an image {[size, size, 3]} became {list(shape[1:]) if shape else type(found).__name__}"
            return say(seen, "the same shape", "Pad or resize after a crop; it takes one image, not a batch.")
    return None


def dtype(s: Subject) -> str | None:
    """Returns the type it was given: float32, and float64 in a float64 run."""
    for name in ("float32", "float64"):
        with jax.enable_x64(name == "float64"):
            image = jax.ShapeDtypeStruct((SIZE, SIZE, 3), jnp.dtype(name))
            got = jax.eval_shape(s.part, image, s.keys[0]).dtype
        if got != jnp.dtype(name):
            return say(f"a {name} image became {got}", name, "Cast what is drawn: .astype(image.dtype).")
    return None


def in_range(s: Subject) -> str | None:
    """Values stay finite and within 0..255, of random, black, white and grey images."""
    cases = {"random": s.repeated()} | {f"all {v}": jnp.full((KEYS, SIZE, SIZE, 3), float(v)) for v in (0, 128, 255)}
    for what, images in cases.items():
        found = s.batch(images, s.keys)
        if not_finite(found) is not None:
            return say(f"{what}: a value is not finite", "finite numbers", "Look for a division by a range of zero.")
        low, high = float(found.min()), float(found.max())
        if low < -1e-2 or high > 255 + 1e-2:
            hint = "End with jnp.clip(image, 0, 255); images are levels 0..255, not 0..1."
            return say(f"{what}: values from {low:.4g} to {high:.4g}", "0 to 255", hint)
    return None


def pure(s: Subject) -> str | None:
    """The same image and key give the same result, with and without jit and vmap, within 0.01 of 255."""
    first, again = (np.asarray(s.part(s.image(), s.keys[0])) for _ in range(2))
    if differs := unequal({"image": again}, {"image": first}):
        hint = "Draw with jax.random and the key alone; NumPy's random numbers and outer variables change or freeze."
        return say(f"two calls with one key differ in {differs}", "the same image", hint)
    if np.abs(s.usual[0] - first).max() > 1e-2:
        seen = f"under jit and vmap it differs by up to {np.abs(s.usual[0] - first).max():.3g}"
        hint = "Look for random numbers that are not from the key, and for Python code on the values of arrays."
        return say(seen, "the same image", hint)
    return None


def by_key(s: Subject) -> str | None:
    """Depends on the key."""
    if all(np.array_equal(s.usual[0], image) for image in s.usual[1:]):
        hint = "Is the key used? What changes every image alike is no augmentation; it belongs to the data."
        return say(f"{KEYS} keys gave the same image", "different ones", hint)
    return None


def changes(s: Subject) -> str | None:
    """Depends on the image, and uses all of it that it is given."""
    other = np.asarray(s.batch(jnp.broadcast_to(s.image(seed=1), s.usual.shape), s.keys))
    if np.array_equal(other, s.usual):
        return say("another image gave the same result", "another one", "Is the image used?")
    return None


def float64(s: Subject) -> str | None:
    """Draws the same numbers in a float64 run: runs on many devices are proven equal in it."""
    with jax.enable_x64(True):
        wide = np.asarray(jax.jit(jax.vmap(s.part))(s.repeated(jnp.float64), jnp.array(s.keys)))
    share = float((np.abs(wide - s.usual) > 0.5).mean())
    if share > 0.01:
        hint = "Draw in float32 whatever the run: jax.random.uniform(key, shape, jnp.float32), and bernoulli of "
        hint += "jnp.float32(p); then .astype(image.dtype)."
        return say(f"{100 * share:.3g} % of values differ from those in float32", "at most 1 %", hint)
    return None


CONTRACT = Contract("augmentation", Subject, (call, dtype, in_range, pure, by_key, changes, float64), basis=("call",))
