"""Speed of training heads on cached feature maps: bmjax against Keras on the JAX backend.

    python tools/bench/bench_heads.py [--variants none se soft] [--seeds 5] [--epochs 15] [--images 1955]

A head goes from new weights to predictions of the test split: batches shuffled and validation in each epoch, the best
epoch's weights kept. Keras does it by `compile`, `fit` and `predict`, a new model a head; bmjax by
`bmjax.compare`, several heads at a time as it does by default, and once more one at a time; files included. Maps are
random, the same for all. Each contender has a process of its own, one after another, and trains all variants with
all seeds; its compiling counts, without a cache. Prints Markdown.

    python tools/bench/bench_heads.py --stack 5

asks instead whether so many seeds stacked by `vmap` train faster than one after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from bench import CLASSES, environment

VARIANTS = ("none", "se", "eca", "cbam", "scse", "coordinate", "global_context", "soft")
SIDE, BATCH, WIDTH, DROPOUT, RATE = 7, 32, 256, 0.5, 1e-3
Seconds = dict[str, list[float]]  # of each head, by variant


def random_maps(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 [n, 7, 7, c] and labels of train, then validation and test, each a fifth of train."""
    rng, n = np.random.default_rng(0), args.images + 2 * (args.images // 5)
    maps = rng.standard_normal((n, SIDE, SIDE, args.channels), dtype=np.float32)
    return maps, rng.integers(0, CLASSES, n).astype(np.int32)


def bmjax_setting(args: argparse.Namespace) -> tuple[Any, Any]:
    """(configuration, what its runs share: random maps in the place of cached ones)."""
    import bmjax  # noqa: F401  (sets the CPU flags before jax is imported)
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
    from bmjax.data.dataset import Dataset
    from bmjax.data.splits import Splits
    from bmjax.training.run import Prepared

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
    return config, Prepared(dataset, splits, features, programs_of(config, dataset, splits, maps.shape[1:]))


def programs_of(config: Any, dataset: Any, splits: Any, shape: Any) -> Any:
    """The programs of a configuration on maps of a shape."""
    from bmjax.data.batches import steps_per_epoch
    from bmjax.training.cached import Programs
    from bmjax.training.run import loss_of

    per_epoch = steps_per_epoch(len(splits.train), config.train.batch_size)
    return Programs(config, len(dataset.classes), shape, per_epoch, loss_of(config, dataset, splits))


def bmjax_train(args: argparse.Namespace, at_once: int | None) -> tuple[float, Seconds]:
    args.variant = args.variants[0]
    config, prepared = bmjax_setting(args)
    from bmjax.analysis.compare import compare

    def prepare(shared: Any, run: Any) -> Any:
        with shared._lock:
            key = run.model.attention
            if key not in shared._programs:
                programs = programs_of(run, prepared.dataset, prepared.splits, prepared.features.shape)
                shared._programs[key] = dataclasses.replace(prepared, programs=programs)
            return shared._programs[key]

    compare.Shared.prepared = prepare  # type: ignore[method-assign]
    taken: Seconds = {variant: [] for variant in args.variants}
    train = compare.train_run

    def timed(config: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = train(config, **options)
        taken[config.model.attention].append(time.perf_counter() - start)
        return result

    compare.train_run = timed
    logging.getLogger("bmjax").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, run_dir=folder + "/runs")
        start = time.perf_counter()
        compare.compare(config, args.variants, args.seeds, args.variants[0], at_once)
        return time.perf_counter() - start, taken


def epoch_inputs(prepared: Any, seed: int) -> tuple[Any, Any, Any, np.ndarray]:
    """What an epoch of a seed's head begins with: (state, maps, labels, places of its batches)."""
    import jax.numpy as jnp

    from bmjax.data.batches import batch_places
    from bmjax.runs.state import create_state

    programs, train = prepared.programs, prepared.splits.train
    plan, per_epoch = programs.plans[0], programs.per_epoch
    state = create_state(programs.init(seed), plan.optimizer.tx, plan.is_trainable, seed=seed, ema=False)
    maps, labels = prepared.features.on_device(train, programs.pooled), jnp.asarray(prepared.dataset.labels[train])
    return state, maps, labels, batch_places(np.zeros(len(train), np.int32), BATCH, seed, 0, per_epoch)


def stacked(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of an epoch of `args.stack` seeds, one after another and stacked by vmap: medians of the rounds."""
    _, prepared = bmjax_setting(args)
    import jax
    import jax.numpy as jnp

    epoch = prepared.programs.epoch(0)
    states, maps, labels, places = zip(*(epoch_inputs(prepared, seed) for seed in range(args.stack)), strict=True)
    maps, labels = maps[0], labels[0]
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


def keras_fit(
    inputs: Any, features: Any, data: Any, optimizer: Any, epochs: int, batch: int = BATCH, **compiled: Any
) -> tuple[Any, float]:
    """Keras's model of the added head on features [b, c], trained by `fit` on data ((x, y), (x, y) of validation), with
    the weights of its best epoch; and the validation accuracy of that."""
    import keras
    from keras import layers

    x = layers.Dropout(DROPOUT)(layers.BatchNormalization()(features))
    outputs = layers.Dense(CLASSES)(layers.Dense(WIDTH, activation="relu")(x))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **compiled)
    best = keras.callbacks.EarlyStopping("val_accuracy", patience=epochs, restore_best_weights=True)
    (images, labels), validation = data
    history: Any = model.fit(
        images,
        labels,
        batch_size=batch,
        epochs=epochs,
        validation_data=validation,
        validation_batch_size=64,
        callbacks=[best],
        verbose=0,  # pyright: ignore[reportArgumentType]
    )
    return model, max(history.history["val_accuracy"])


def keras_train(args: argparse.Namespace) -> tuple[float, Seconds]:
    import keras
    from keras import layers, ops

    maps, labels = random_maps(args)
    n, held = args.images, args.images // 5
    train_split, val, test = (slice(a, b) for a, b in ((0, n), (n, n + held), (n + held, None)))

    def attention(x, variant: str):
        c = args.channels
        sigmoid = keras.activations.sigmoid

        def over_channels(z):
            return layers.Reshape((1, 1, c))(z)

        def two_layers(ratio):
            first, second = layers.Dense(c // ratio, activation="relu"), layers.Dense(c)
            return lambda z: second(first(z))

        match variant:
            case "se":
                z = two_layers(16)(layers.GlobalAveragePooling2D()(x))
                return layers.Multiply()([x, over_channels(sigmoid(z))])
            case "eca":
                z = layers.Reshape((c, 1))(layers.GlobalAveragePooling2D()(x))
                z = layers.Conv1D(1, 5, padding="same", use_bias=False)(z)
                return layers.Multiply()([x, over_channels(sigmoid(z))])
            case "cbam":
                net = two_layers(16)
                z = net(layers.GlobalAveragePooling2D()(x)) + net(layers.GlobalMaxPooling2D()(x))
                x = layers.Multiply()([x, over_channels(sigmoid(z))])
                z = ops.stack([ops.max(x, -1), ops.mean(x, -1)], -1)
                z = layers.Conv2D(1, 7, padding="same", use_bias=False)(z)
                return layers.Multiply()([x, sigmoid(layers.BatchNormalization(epsilon=1e-5)(z))])
            case "scse":
                channels = over_channels(sigmoid(two_layers(2)(layers.GlobalAveragePooling2D()(x))))
                places = layers.Conv2D(1, 1, use_bias=False, activation="sigmoid")(x)
                return layers.Multiply()([x, channels]) + layers.Multiply()([x, places])
            case "coordinate":
                z = ops.concatenate([ops.mean(x, 2), ops.mean(x, 1)], 1)
                z = layers.BatchNormalization(epsilon=1e-5)(layers.Dense(c // 32, use_bias=False)(z))
                z = layers.Activation("hard_swish")(z)
                rows = layers.Dense(c, activation="sigmoid")(z[:, :SIDE])
                columns = layers.Dense(c, activation="sigmoid")(z[:, SIDE:])
                return x * ops.expand_dims(rows, 2) * ops.expand_dims(columns, 1)
            case "global_context":
                scores = layers.Reshape((SIDE * SIDE,))(layers.Conv2D(1, 1, use_bias=False)(x))
                weights = layers.Reshape((SIDE, SIDE, 1))(ops.softmax(scores))
                z = layers.Dense(c // 16)(ops.sum(x * weights, (1, 2)))
                z = layers.Dense(c)(layers.ReLU()(layers.LayerNormalization(epsilon=1e-6)(z)))
                return x + over_channels(z)
            case "soft":
                z = x
                for width in (64, 16):
                    z = layers.Conv2D(width, 1, activation="relu")(z)
                z = layers.Reshape((SIDE * SIDE,))(layers.Conv2D(1, 1)(z))
                weights = ops.multiply(ops.softmax(ops.log_sigmoid(z)), SIDE**2)
                return layers.Multiply()([x, layers.Reshape((SIDE, SIDE, 1))(weights)])
        return x

    def train(variant: str) -> None:
        inputs = keras.Input(maps.shape[1:])
        pooled = layers.GlobalAveragePooling2D()(attention(inputs, variant))
        data = ((maps[train_split], labels[train_split]), (maps[val], labels[val]))
        model, _ = keras_fit(inputs, pooled, data, keras.optimizers.Adam(RATE), args.epochs)
        model.predict(maps[test], batch_size=64, verbose=0)  # pyright: ignore[reportArgumentType]

    taken: Seconds = {}
    began = time.perf_counter()
    for variant in args.variants:
        for seed in range(args.seeds):
            keras.utils.set_random_seed(seed)
            start = time.perf_counter()
            train(variant)
            taken.setdefault(variant, []).append(time.perf_counter() - start)
    return time.perf_counter() - began, taken


CONTENDERS: dict[str, tuple[str, Callable[[argparse.Namespace], tuple[float, Seconds]]]] = {
    "bmjax": ("bmjax", lambda args: bmjax_train(args, None)),
    "in_turn": ("bmjax, one head at a time", lambda args: bmjax_train(args, 1)),
    "keras_jax": ("Keras on JAX", keras_train),
}


def measure(name: str, args: argparse.Namespace) -> tuple[float, Seconds]:
    """Seconds of all heads of a contender, its table included, and of each head by variant."""
    options = {"--seeds": args.seeds, "--epochs": args.epochs, "--images": args.images, "--channels": args.channels}
    words = [str(word) for pair in options.items() for word in pair]
    process = subprocess.run(
        [sys.executable, __file__, *words, "--variants", *args.variants, "--worker", name],
        env=environment(name),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(process.stdout.splitlines()[-1])
    return found["total"], found["heads"]


def work(args: argparse.Namespace) -> None:
    """Runs one contender and prints its seconds: in the process that `measure` starts."""
    if args.worker != "keras_jax":
        import bmjax  # noqa: F401
        from bmjax.cpu import build as native

        native.prepare()  # compiled once for a machine, not once for a comparison
    total, heads = CONTENDERS[args.worker][1](args)
    print(json.dumps({"total": total, "heads": heads}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["none", "se", "soft"], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=5, help="heads a variant")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=1955, help="to train on; a fifth each to validate and test")
    parser.add_argument("--channels", type=int, default=1664)
    parser.add_argument("--stack", type=int, help="ask about so many seeds stacked by vmap instead")
    parser.add_argument("--rounds", type=int, default=5, help="of --stack")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
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
    found = {name: measure(name, args) for name in args.contenders}
    labels = [CONTENDERS[name][0] for name in found]
    alone = [name for name in found if name != "bmjax"]  # heads that train beside others have no time of their own
    print(f"| seconds | {' | '.join(labels)} |\n|---|{'---|' * len(labels)}")
    for variant in args.variants:
        for what, of in (("first head", lambda s: s[0]), ("each further head", lambda s: statistics.median(s[1:]))):
            cells = [f"{of(found[name][1][variant]):.2f}" if name in alone else "" for name in found]
            print(f"| {variant}, {what} | {' | '.join(cells)} |")
    print(
        f"| all {len(args.variants) * args.seeds} heads | {' | '.join(f'{total:.1f}' for total, _ in found.values())} |"
    )
    first = next(iter(found.values()))[0]
    print(f"| times as long as {labels[0]} | {' | '.join(f'{total / first:.2f}x' for total, _ in found.values())} |")


if __name__ == "__main__":
    main()
