"""Speed of training heads on cached feature maps: bmjax against Keras on the JAX backend.

    python tools/bench_heads.py [--variants none se soft] [--rounds 5] [--epochs 15] [--images 1955] [--channels 1664]

A round trains one head, from new weights to predictions of the test split: batches shuffled anew, validation after each
epoch, the best epoch's weights kept. Keras does it by `compile`, `fit` and `predict`, bmjax by the run that
`bmjax compare` makes, files included. Maps are random, the same for both. Each contender has a process of its own;
rounds are interleaved, since a machine's speed drifts, and only ratios of one run count. Prints Markdown.

    python tools/bench_heads.py --stack 5

asks instead whether so many seeds stacked by `vmap` train faster than one after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from bench import CLASSES, ask, environment, serve

LABELS = {"bmjax": "bmjax", "keras_jax": "Keras on JAX"}
SIDE, BATCH, WIDTH, DROPOUT, RATE = 7, 32, 256, 0.5, 1e-3
Run = Callable[[], None]


def random_maps(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 [n, 7, 7, c] and labels of train, then validation and test, each a fifth of train."""
    rng, n = np.random.default_rng(0), args.images + 2 * (args.images // 5)
    maps = rng.standard_normal((n, SIDE, SIDE, args.channels), dtype=np.float32)
    return maps, rng.integers(0, CLASSES, n).astype(np.int32)


def bmjax_setting(args: argparse.Namespace) -> tuple[Any, Any]:
    """(configuration, what its runs share: random maps in the place of cached ones)."""
    import bmjax  # noqa: F401  (sets the CPU flags before jax is imported)
    from bmjax import heads
    from bmjax.config import (
        AugmentConfig,
        Config,
        FeaturesConfig,
        HeadConfig,
        ModelConfig,
        OptimConfig,
        StageConfig,
        TrainConfig,
    )
    from bmjax.data import Dataset, Splits

    # isort: split
    import jax.numpy as jnp

    maps, labels = random_maps(args)
    n, held = args.images, args.images // 5
    names = tuple(map(str, range(len(labels))))
    images = np.zeros((len(labels), 16, 16, 3), np.uint8)
    dataset = Dataset("random", tuple("abcdefg"), images, labels, names, names, "random")
    splits = Splits(*np.split(np.arange(len(labels)), [n, n + held]))

    class RandomMaps:
        """Takes the place of FeatureMaps."""

        shape = maps.shape[1:]
        backbone = {"params": {}, "batch_stats": {}}  # noqa: RUF012
        parts = {(rows[0], False): jnp.asarray(maps[rows]) for rows in (splits.train, splits.val, splits.test)}  # noqa: RUF012
        parts |= {(first, True): part.mean((1, 2), keepdims=True) for (first, _), part in parts.items()}

        def on_device(self, rows: np.ndarray, pooled: bool = False) -> object:
            return self.parts[rows[0], pooled]

        views_on_device = on_device

    config = Config(
        augment=AugmentConfig(flip=False, right_angles=False),
        model=ModelConfig("densenet_tiny", None, attention=args.variant, head=HeadConfig(widths=(WIDTH,))),
        optim=OptimConfig(name="adam", lr=RATE),
        stages=(StageConfig(epochs=args.epochs, train=("attention", "head")),),
        train=TrainConfig(batch_size=BATCH, train_eval_epochs=0, final_test=True),
        features=FeaturesConfig(cached=True),
    )
    features: Any = RandomMaps()
    return config, heads.Prepared(dataset, splits, features, heads.Programs(config, dataset, splits, maps.shape[1:]))


def bmjax_run(args: argparse.Namespace) -> Run:
    config, prepared = bmjax_setting(args)
    from bmjax import heads

    logging.getLogger("bmjax").setLevel(logging.ERROR)
    seed = 0

    def train() -> None:
        nonlocal seed
        seed += 1
        with tempfile.TemporaryDirectory() as folder:
            run = dataclasses.replace(config, seed=seed, run_dir=folder)
            heads.train_on_features(run, prepared=prepared)

    return train


def stacked(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of an epoch of `args.stack` seeds, one after another and stacked by vmap: medians of the rounds."""
    _, prepared = bmjax_setting(args)
    import jax
    import jax.numpy as jnp

    from bmjax.data.pipeline import batch_places
    from bmjax.state import create_state

    programs, splits = prepared.programs, prepared.splits
    plan, epoch, seeds = programs.plans[0], programs.epoch(0), range(args.stack)
    maps = prepared.features.on_device(splits.train, programs.pooled)
    labels = jnp.asarray(prepared.dataset.labels[splits.train])
    places = [batch_places(np.zeros(args.images, np.int32), BATCH, seed, 0, programs.per_epoch) for seed in seeds]
    states = [create_state(programs.init(s), plan.optimizer.tx, plan.is_trainable, seed=s, ema=False) for s in seeds]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def one_by_one() -> None:
        for state, chosen in zip(states, places, strict=True):
            jax.block_until_ready(epoch(state, maps, labels, chosen))

    one_by_one()  # here, not under vmap, it is decided whether the epoch is one program
    vmapped = jax.jit(jax.vmap(epoch, (0, None, None, 0)))
    jobs = (one_by_one, lambda: jax.block_until_ready(vmapped(together, maps, labels, np.stack(places))))
    jobs[1]()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.rounds):
        for job, taken in zip(jobs, seconds, strict=True):
            start = time.perf_counter()
            job()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def keras_run(args: argparse.Namespace) -> Run:
    import keras
    from keras import layers, ops

    maps, labels = random_maps(args)
    n, held = args.images, args.images // 5
    train_split, val, test = (slice(a, b) for a, b in ((0, n), (n, n + held), (n + held, None)))

    def attention(x):
        c = args.channels
        if args.variant == "se":
            z = layers.Dense(c // 16, activation="relu")(layers.GlobalAveragePooling2D()(x))
            gate = layers.Dense(c, activation="sigmoid")(z)
            return layers.Multiply()([x, layers.Reshape((1, 1, c))(gate)])
        if args.variant == "soft":
            z = x
            for width in (64, 16):
                z = layers.Conv2D(width, 1, activation="relu")(z)
            z = layers.Reshape((SIDE * SIDE,))(layers.Conv2D(1, 1)(z))
            weights = ops.multiply(ops.softmax(ops.log_sigmoid(z)), SIDE**2)
            return layers.Multiply()([x, layers.Reshape((SIDE, SIDE, 1))(weights)])
        return x

    def train() -> None:
        inputs = keras.Input(maps.shape[1:])
        x = layers.GlobalAveragePooling2D()(attention(inputs))
        x = layers.Dropout(DROPOUT)(layers.BatchNormalization()(x))
        outputs = layers.Dense(CLASSES)(layers.Dense(WIDTH, activation="relu")(x))
        model = keras.Model(inputs, outputs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(RATE), loss, metrics=["accuracy"])
        best = keras.callbacks.EarlyStopping("val_accuracy", patience=args.epochs, restore_best_weights=True)
        model.fit(
            maps[train_split],
            labels[train_split],
            batch_size=BATCH,
            epochs=args.epochs,
            validation_data=(maps[val], labels[val]),
            validation_batch_size=64,
            callbacks=[best],
            verbose=0,  # pyright: ignore[reportArgumentType]
        )
        model.predict(maps[test], batch_size=64, verbose=0)  # pyright: ignore[reportArgumentType]

    return train


RUNS = {"bmjax": bmjax_run, "keras_jax": keras_run}


def compare(args: argparse.Namespace, variant: str) -> dict[str, list[float]]:
    """Seconds of each head, the first one's set-up and compiling included, by contender."""
    processes, seconds = {}, {}
    for name in LABELS:
        options = {"--variant": variant, "--epochs": args.epochs, "--images": args.images, "--channels": args.channels}
        words = [str(word) for pair in options.items() for word in pair]
        processes[name] = subprocess.Popen(
            [sys.executable, __file__, *words, "--worker", name],
            env=environment(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds[name] = [ask(processes[name], "")["first"]]
    for _ in range(args.rounds - 1):
        for name, process in processes.items():
            seconds[name].append(ask(process, "step")["seconds"])
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["none", "se", "soft"], choices=("none", "se", "soft"))
    parser.add_argument("--rounds", type=int, default=5, help="heads a contender and variant")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=1955, help="to train on; a fifth each to validate and test")
    parser.add_argument("--channels", type=int, default=1664)
    parser.add_argument("--stack", type=int, help="ask about so many seeds stacked by vmap instead")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(lambda: RUNS[args.worker](args))
        return
    print(f"{args.images} maps of {SIDE}x{SIDE}x{args.channels}, float32, {args.epochs} epochs, batch {BATCH}, Adam")
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n")
    if args.stack:
        print(f"| variant | an epoch of {args.stack} seeds in turn, s | stacked by vmap, s |\n|---|---|---|")
        for variant in args.variants:
            args.variant = variant
            in_turn, at_once = stacked(args)
            print(f"| {variant} | {in_turn:.2f} | {at_once:.2f} |", flush=True)
        return
    print(f"| variant | | first head, s | each further head, s | {args.rounds} heads, s | bmjax is faster by |")
    print("|---|---|---|---|---|---|")
    for variant in args.variants:
        seconds = compare(args, variant)
        for name, found in seconds.items():
            further, times = statistics.median(found[1:]), sum(found) / sum(seconds["bmjax"])
            cells = (variant, LABELS[name], f"{found[0]:.1f}", f"{further:.1f}", f"{sum(found):.1f}", f"{times:.2f}x")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
