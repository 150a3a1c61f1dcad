"""Where a classifier looked: attention maps as sown, Grad-CAM, Grad-CAM++, and maps that know nothing, to compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from bmjax.attention import sown_maps
from bmjax.model.classifier import Classifier, stage_name, stages_of
from bmjax.registry import unknown

Tree = Any
Maps = dict[str, np.ndarray]
_AT_ONCE = 32


def in_batches(fn: Callable[..., Any], *arrays: np.ndarray, size: int = _AT_ONCE) -> Any:
    """fn over rows [n, ...] of the arrays, at most `size` at once and always of one shape; its arrays [n, ...]."""
    n = len(arrays[0])
    size = math.ceil(n / math.ceil(n / size))  # as even as can be: padding costs as much as rows
    results = []
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)  # the last batch is padded with the last row
        results.append(jax.tree.map(lambda v: np.asarray(v)[: n - start], fn(*(a[rows] for a in arrays))))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _forward(model: Classifier, stage: str, variables: Tree, images: jax.Array) -> Any:
    """(logits [n, k], maps by path, what the stage hands on [n, h, w, c]).

    The last is what `Classifier` perturbs and sows, so after attention where the stage has it, whatever it is.
    """
    logits, new = model.apply(variables, images, train=False, mutable=["intermediates"])
    found: Any = new["intermediates"]
    return logits, sown_maps(dict(new)), found[stage_name(stage)][-1]


def grad_cam(activations: jax.Array, gradients: jax.Array) -> jax.Array:
    """relu(sum_c mean(g_c) a_c), [n, h, w, c] twice -> [n, h, w] (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391)."""
    return nn.relu(jnp.einsum("nhwc,nc->nhw", activations, gradients.mean((1, 2))))


def grad_cam_plus_plus(activations: jax.Array, gradients: jax.Array) -> jax.Array:
    """relu(sum_c w_c a_c), w_c = sum alpha relu(g_c), as `grad_cam` (Chattopadhay et al. 2018, https://arxiv.org/abs/1710.11063).

    alpha = g^2 / (2 g^2 + sum(a) g^3), equation 19 for the exponential of the logit; here divided by g^2, which
    underflows. Its factor, the exponential itself, is left out: it scales a whole map. Derived for activations of zero
    and more, as after a ReLU: of others the denominator may vanish, so that single places stand out without meaning.
    """
    below = 2 + activations.sum((1, 2), keepdims=True) * gradients
    alpha = jnp.where(below != 0, 1 / jnp.where(below != 0, below, 1), 0)
    return nn.relu(jnp.einsum("nhwc,nc->nhw", activations, (alpha * nn.relu(gradients)).sum((1, 2))))


class Explainer:
    """Maps of images by a classifier; compiles once for all its variables.

    Raises:
      ValueError: the backbone has no such stage.
    """

    def __init__(self, model: Classifier, stage: str = "last"):
        stages = stages_of(model.backbone)
        self.stage = stages[-1] if stage == "last" else stage
        if self.stage not in stages:
            raise unknown("stage of the backbone", stage, (*stages, "last"))
        self._model = model
        self._maps = jax.jit(self.compute)
        self._attention = jax.jit(self._sown)
        self._probabilities = jax.jit(
            lambda variables, images: nn.softmax(jnp.asarray(model.apply(variables, images, train=False), jnp.float32))
        )

    def compute(self, variables: Tree, images: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """As `maps`, of all images at once and not compiled."""

        def unchanged() -> Tree:
            return self._model.apply(variables, images, train=False, mutable=["perturbations"])[1]["perturbations"]

        zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), dict(jax.eval_shape(unchanged)))
        name = stage_name(self.stage)

        def score(change: jax.Array) -> tuple[jax.Array, Any]:
            changed = dict(variables) | {"perturbations": zeros | {name: change}}
            logits, maps, kept = _forward(self._model, self.stage, changed, images)
            # The sum's gradient holds each image's own: in evaluation mode they do not touch each other.
            return jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=1).sum(), (maps, kept)

        gradients, (maps, activations) = jax.grad(score, has_aux=True)(zeros[name])
        activations, gradients = activations.astype(jnp.float32), gradients.astype(jnp.float32)
        found = {name: m.astype(jnp.float32) for name, m in maps.items() if m.ndim == 3}
        found |= {"Grad-CAM": grad_cam(activations, gradients)}
        found |= {"Grad-CAM++": grad_cam_plus_plus(activations, gradients)}
        return {k: jax.image.resize(m, (len(m), *images.shape[1:3]), "bilinear") for k, m in found.items()}

    def maps(self, variables: Tree, images: np.ndarray, targets: np.ndarray) -> Maps:
        """Maps float32 [n, h, w], as large as the images uint8 [n, h, w, 3], of the target classes int [n].

        By name: the path of each attention module that sowed a map over places, `Grad-CAM` and `Grad-CAM++`.
        """
        found = in_batches(lambda i, t: self._maps(variables, i, t), images, np.asarray(targets, np.int32))
        return {name: found[name] for name in sorted(found, key=lambda name: (name.startswith("Grad-CAM"), name))}

    def _sown(self, variables: Tree, images: jax.Array) -> dict[str, jax.Array]:
        _, maps, _ = _forward(self._model, self.stage, variables, images)
        found = {name: m.astype(jnp.float32) for name, m in maps.items() if m.ndim == 3}
        return {k: jax.image.resize(m, (len(m), *images.shape[1:3]), "bilinear") for k, m in found.items()}

    def attention(self, variables: Tree, images: np.ndarray) -> Maps:
        """Of `maps` those that the attention sowed, without the Grad-CAMs and their gradients."""
        found = in_batches(lambda i: self._attention(variables, i), images)
        return {name: found[name] for name in sorted(found)}

    def sows_maps(self, variables: Tree, image_size: int) -> bool:
        """Whether there is a map over places; nothing is computed."""
        images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
        return bool(jax.eval_shape(self._sown, variables, images))

    def probabilities(self, variables: Tree, images: np.ndarray) -> np.ndarray:
        """Class probabilities float32 [n, k] of images uint8 [n, h, w, 3]."""
        return in_batches(lambda i: self._probabilities(variables, i), images)


def centre_map(images: np.ndarray) -> np.ndarray:
    """[n, h, w], highest in the middle: where the cell is in nearly every picture."""
    h, w = images.shape[1:3]
    rows, columns = (np.square(np.linspace(-1, 1, side)) for side in (h, w))
    return np.broadcast_to(np.exp(-2 * (rows[:, None] + columns[None])), images.shape[:3])


def edge_map(images: np.ndarray) -> np.ndarray:
    """[n, h, w], the size of Sobel's gradient of the brightness: it looks like a good map and knows no network."""
    grey = np.asarray(images, np.float32).mean(-1)
    return np.hypot(ndimage.sobel(grey, axis=1), ndimage.sobel(grey, axis=2))
