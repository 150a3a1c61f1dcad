"""What each setting against unequal classes does, at the marrow collection's own 21 frequencies, by simulation.

    python tools/simulate_imbalance.py [--seeds 5] [--images 171374] [--steps 3000]

Classes are Gaussians with equal covariance and random means, as frequent as in the collection: for a linear classifier
the best decision is then known for each set of frequencies. It is trained with each setting of `train` by Adam, and
tested on 200 drawings of each class. Intervals are those of the mean over seeds (Student's t, 95 %), and paired
differences are to plain cross-entropy on the same seeds.
"""

from __future__ import annotations

import argparse
import os
import platform

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import jax
import jax.numpy as jnp
import numpy as np
import optax

# isort: on
from bmjax.config import TrainConfig
from bmjax.data.batches import batch_places
from bmjax.data.builders.bm_cytomorphology import COUNTS
from bmjax.training.losses import make_loss

SETTINGS = {
    "plain": TrainConfig(),
    "sampling balanced": TrainConfig(sampling="balanced"),
    "class_weights balanced": TrainConfig(class_weights="balanced"),
    "class_weights effective, beta 0.999": TrainConfig(class_weights="effective"),
    "class_weights effective, beta 0.9999": TrainConfig(class_weights="effective", effective_beta=0.9999),
    "logit_adjustment 1": TrainConfig(logit_adjustment=1.0),
    "focal_gamma 2": TrainConfig(focal_gamma=2.0),
}
FIGURES = ("balanced accuracy", "recall of the 5 rarest", "recall of the 5 commonest", "accuracy at the frequencies")
DIMENSIONS, SPREAD, BATCH, PER_CLASS = 16, 0.8, 256, 200


def counts_of(images: int) -> np.ndarray:
    """The collection's counts scaled to so many images, at least 2 a class, int [21]."""
    counts = np.array(list(COUNTS.values()))
    return np.maximum(2, np.round(counts * images / counts.sum())).astype(int)


def train(
    config: TrainConfig, x: np.ndarray, labels: np.ndarray, seed: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [d, k] and biases [k] of a linear classifier of x [n, d], trained as configured."""
    counts = np.bincount(labels)
    loss, tx = make_loss(config, counts), optax.adam(optax.cosine_decay_schedule(0.05, steps))
    places = batch_places(labels, BATCH, seed, 0, steps, config.sampling)

    def objective(params: tuple[jax.Array, jax.Array], rows: jax.Array) -> jax.Array:
        return loss(jnp.asarray(x)[rows] @ params[0] + params[1][None], jnp.asarray(labels)[rows]).mean()

    def step(carry: tuple, rows: jax.Array):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = (jnp.zeros((x.shape[1], len(counts))), jnp.zeros(len(counts)))
    (params, _), _ = jax.jit(lambda carry, places: jax.lax.scan(step, carry, places))((params, tx.init(params)), places)
    return np.asarray(params[0]), np.asarray(params[1])


def simulate(config: TrainConfig, counts: np.ndarray, seed: int, steps: int) -> np.ndarray:
    """The figures of one run, in the order of `FIGURES`."""
    rng = np.random.default_rng(seed)
    k = len(counts)
    means = SPREAD * rng.standard_normal((k, DIMENSIONS))
    labels = np.repeat(np.arange(k), counts)
    x = (means[labels] + rng.standard_normal((len(labels), DIMENSIONS))).astype(np.float32)
    test_labels = np.repeat(np.arange(k), PER_CLASS)
    test_x = means[test_labels] + rng.standard_normal((len(test_labels), DIMENSIONS))
    weights, biases = train(config, x, labels, seed, steps)
    hits = (test_x @ weights + biases).argmax(-1) == test_labels
    recall, order = hits.reshape(k, PER_CLASS).mean(1), np.argsort(counts)
    return np.array(
        [recall.mean(), recall[order[:5]].mean(), recall[order[-5:]].mean(), recall @ counts / counts.sum()]
    )


def interval(values: np.ndarray) -> str:
    """Mean and half-width of the 95 % interval of the mean, [n] -> text."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default: %(default)s)")
    parser.add_argument("--images", type=int, default=sum(COUNTS.values()), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3000, help=f"of {BATCH} images (default: %(default)s)")
    options = parser.parse_args()
    counts = counts_of(options.images)
    sizes = f"{counts.sum():,} images, {counts.min()} to {counts.max():,} a class"
    print(f"{platform.machine()}, {os.cpu_count()} CPUs; {sizes}\n")
    print(f"| {options.seeds} seeds | {' | '.join(FIGURES)} | {FIGURES[0]}, difference |")
    print("|---" * (len(FIGURES) + 2) + "|")
    plain = None
    for name, config in SETTINGS.items():
        found = np.stack([simulate(config, counts, seed, options.steps) for seed in range(options.seeds)])
        plain = found if plain is None else plain
        difference = "" if found is plain else interval(found[:, 0] - plain[:, 0])
        print(f"| {name} | {' | '.join(interval(column) for column in found.T)} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
