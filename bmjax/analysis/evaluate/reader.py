"""How a run sees images: plainly, or in several views, or with its norms adapted to the images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bmjax.analysis.evaluate.looks import looks
from bmjax.data.dataset import Dataset
from bmjax.data.images.colours import ColourMap
from bmjax.model.parameters import Tree
from bmjax.runs.folder import Run
from bmjax.training.predict import Predictor, softmax, unlabelled
from bmjax.training.statistics import nothing_dropped

NO_NUMBER = "the network's probabilities of it are no numbers"
VIEWS = (1, 2, 4, 8)
"""The image; and mirrored; and turned by half; and all that by a quarter: every way to lay a square on itself."""


def laid(images: np.ndarray, view: int) -> np.ndarray:
    """Images [n, s, s, 3] in view 0 to 7, of the same memory."""
    left, up, quarter = view & 1, view & 2, view & 4
    images = images[:, :, ::-1] if left else images
    images = images[:, ::-1] if up else images
    return images.swapaxes(1, 2) if quarter else images


@dataclasses.dataclass(frozen=True)
class Seen:
    """Of n images: probs float32 [n, k], means over the views; energy float [n], -log of the sum of exp of logits, low
    where the network is sure; features [n, c] before the head; maps [n, s, 128], sketches of stages' maps (see
    bmjax.training.steps); looks [n, 6]. All but the first are of the image as it is."""

    probs: np.ndarray
    energy: np.ndarray
    features: np.ndarray
    maps: np.ndarray
    images: np.ndarray
    """uint8 [m, s, s, 3], from the disk where they are many; the n are those of `rows`, in the colours of `colours`."""
    rows: np.ndarray
    colours: ColourMap | None = None

    def shown(self, rows: np.ndarray) -> np.ndarray:
        """Some of the m images as the run saw them."""
        return self.images[rows] if self.colours is None else self.colours(self.images[rows])

    @functools.cached_property
    def looks(self) -> np.ndarray:
        """See bmjax.analysis.evaluate.looks."""
        parts = np.array_split(self.rows, -(-len(self.rows) // 1024))
        return np.concatenate([looks(self.shown(part)) for part in parts])


class Reader:
    """Compiles once, for one run. `variables` may be replaced by adapted ones; `colours`, where set, maps every image
    before the run sees it."""

    def __init__(self, run: Run, views: int = 1, batch_size: int | None = None):
        if views not in VIEWS:
            raise ValueError(f"views is {views}; expected one of {', '.join(map(str, VIEWS))}")
        if batch_size is not None:
            train = dataclasses.replace(run.config.train, eval_batch_size=batch_size)
            run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
        self.run, self.views = run, views
        self.variables: dict[str, Tree] = run.variables
        self.colours: ColourMap | None = None
        self._predictor = Predictor(run.config, run.model, features=True)

    def __call__(self, dataset: Dataset, rows: np.ndarray, *, views: int | None = None) -> Seen:
        """What the run says of rows [n] of a dataset, in their order; in its own number of views, or another."""
        views = self.views if views is None else views
        variables = self._predictor.to_devices(self.variables)
        total, plain = None, None
        for view in range(views):
            turned = dataclasses.replace(dataset, images=laid(dataset.images, view))
            outputs, _ = self._predictor.outputs(variables, turned, rows, self.colours)
            probs = softmax(outputs["logits"]).astype(np.float64)
            total, plain = (probs, outputs) if total is None or plain is None else (total + probs, plain)
        assert total is not None
        assert plain is not None
        energy = -np.logaddexp.reduce(np.asarray(plain["logits"], np.float64), axis=-1)
        features, maps = (np.asarray(plain[name], np.float32) for name in ("features", "maps"))
        return Seen((total / views).astype(np.float32), energy, features, maps, dataset.images, rows, self.colours)

    def adapt(self, images: np.ndarray) -> None:
        """Sees from now on with norms adapted to images uint8 [n, s, s, 3]: see `adapted`."""
        images = images if self.colours is None else self.colours(images)
        self.variables = adapted(self.run, images, update=self._update)

    @functools.cached_property
    def _update(self) -> Callable[..., Tree]:
        return make_update(self.run)

    def images(self, images: np.ndarray, *, views: int | None = None) -> Seen:
        """As a call, of images uint8 [n, s, s, 3], n >= 1, read as the run reads files."""
        return self(unlabelled(images, self.run.classes), np.arange(len(images)), views=views)


def make_update(run: Run) -> Callable[[Tree, Tree, Any], Tree]:
    """update(params, batch_stats, images [b, s, s, 3]) -> the batch_stats after one batch, whose norms are by the batch
    as in training, and which drops nothing."""

    @jax.jit
    def update(params: Tree, stats: Tree, images: jax.Array) -> Tree:
        variables, dropout = {"params": params, "batch_stats": stats}, {"dropout": jax.random.key(0)}
        with nn.intercept_methods(nothing_dropped):
            out: Any = run.model.apply(
                variables, images, train=True, output="features", rngs=dropout, mutable=["batch_stats"]
            )
        return {**stats, **out[1]["batch_stats"]}

    return update


def check_adaptable(run: Run) -> None:
    """Refuses a network without norms by the batch before the head.

    Raises:
      ValueError: it is one.
    """
    if not set(run.variables.get("batch_stats", {})) - {"head"}:
        raise ValueError(
            f"{run.run_dir}: {run.config.model.backbone} has no batch-norm before the head, and --adapt estimates the "
            "statistics of those; expected a run of another backbone, or no --adapt"
        )


def adapted(
    run: Run, images: np.ndarray, *, batch: int = 64, own: int = 64, update: Callable[..., Tree] | None = None
) -> dict[str, Tree]:
    """The run's variables with the statistics of every norm before the head estimated on images uint8 [n, s, s, 3].

    Each layer's mean and variance over the n images, mixed with the run's own, which count as `own` images; no label is
    used. The images are taken in a drawn order, for files in the order of their names are often in that of classes.
    Li et al. 2016, https://arxiv.org/abs/1603.04779; Schneider et al. 2020, https://arxiv.org/abs/2006.16971.
    `update`: that of `make_update`, made before.

    Raises:
      ValueError: fewer than two images, or a network without norms by the batch before the head.
    """
    check_adaptable(run)
    n = len(images)
    if n < 2:
        raise ValueError(f"{n} images to adapt to; expected at least 2")
    params, old = run.variables["params"], run.variables["batch_stats"]
    step = functools.partial(update or make_update(run), params)
    size, order = min(batch, n), np.random.default_rng(0).permutation(n)
    parts = [images[order[min(i, n - size) : min(i, n - size) + size]] for i in range(0, n, size)]
    # A norm keeps m * old + (1 - m) * of the batch: from zeros and from ones, m and the batch's own follow.
    zeros, ones = (jax.tree.map(lambda x, v=value: np.full_like(x, v), old) for value in (0, 1))
    from_zeros = jax.tree.map(np.asarray, step(zeros, parts[0]))
    keeps = jax.tree.map(lambda one, zero: np.asarray(one) - zero, step(ones, parts[0]), from_zeros)
    sums, squares = jax.tree.map(np.zeros_like, old), jax.tree.map(np.zeros_like, old)
    for part in parts:
        found = jax.tree.map(np.asarray, step(zeros, part))
        sums = jax.tree.map(np.add, sums, found)
        squares = jax.tree.map(lambda total, x: total + x * x, squares, found)
    return {"params": params, "batch_stats": _mixed(old, sums, squares, keeps, len(parts), n / (n + own))}


def _mixed(old: Tree, sums: Tree, squares: Tree, keeps: Tree, parts: int, share: float) -> Tree:
    """`share` of the statistics of all parts and the rest of the old ones; what no batch changes stays as it is."""
    out: Tree = {}
    for name, value in old.items():
        if isinstance(value, dict):
            out[name] = _mixed(value, sums[name], squares[name], keeps[name], parts, share)
            continue
        new = 1 - keeps[name]
        moved = new > 1e-6
        found = sums[name] / parts / np.where(moved, new, 1)
        if name == "var" and "mean" in old:  # and the variance of the batches' means
            own = 1 - keeps["mean"]
            apart = squares["mean"] / parts - (sums["mean"] / parts) ** 2
            found = found + np.maximum(apart, 0) / np.where(own > 1e-6, own, 1) ** 2
        out[name] = np.where(moved, (1 - share) * value + share * found, value).astype(value.dtype)
    return out


def adapted_priors(probs: np.ndarray, source: np.ndarray, rounds: int = 200) -> np.ndarray:
    """The classes' frequencies [k] among images of probabilities [n, k], by expectation maximisation.

    `source` [k]: those that the probabilities were learned at. Saerens et al. 2002,
    https://doi.org/10.1162/089976602753284446.
    """
    wide, priors = np.asarray(probs, np.float64), np.asarray(source, np.float64)
    source = np.maximum(priors, 1e-12)
    for _ in range(rounds):
        weighted = wide * (priors / source)
        new = (weighted / np.maximum(weighted.sum(1, keepdims=True), 1e-300)).mean(0)
        done = np.abs(new - priors).max() < 1e-9
        priors = new
        if done:
            break
    return priors


def at_priors(probs: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Probabilities float32 [n, k] learned at the frequencies `source` [k], as they are at `target` [k]."""
    weighted = np.asarray(probs, np.float64) * (target / np.maximum(source, 1e-12))
    return (weighted / np.maximum(weighted.sum(1, keepdims=True), 1e-300)).astype(np.float32)
