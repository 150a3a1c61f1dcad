"""A run's cells trained by Keras (JAX backend) for as long as the run took: accuracy beside accuracy.

    python tools/bench/keras_cells.py RUN --weights FILE [--split val] [--minutes M] [--whole]

The network is the run's, from FILE (Keras's own, without top), with the run's split and the images as the run reads
them; `--whole` gives whole images instead of the run's field. The rest are Keras's means, as its guide to transfer
learning has them: `fit` of a new head on the frozen network for two epochs, then of everything, batch-norms in
inference mode, Adam, a cosine over the time that is left, flips, turns of up to 90 degrees, zoom, brightness and
contrast as layers, dropout, smoothed labels; the weights of the epoch that is best on validation are kept. All batches
of a split have one size, for each further one would be compiled for. Its compiling counts, without a cache. One run
each: no verdict. `--split test` opens the run's test split, and records that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench import environment
from peers import DEVIATION, MEAN

NETWORKS = {"densenet121": "DenseNet121", "densenet169": "DenseNet169", "densenet201": "DenseNet201"}
BATCH, HEAD_EPOCHS, HEAD_RATE, RATE, DROPOUT, WIDTH, SMOOTHING = 32, 2, 1e-3, 1e-4, 0.5, 256, 0.1


def write_cells(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes the images and labels of each split as arrays; gives what the run says of itself."""
    import bmjax  # noqa: F401  (sets the CPU flags before jax is imported)
    from bmjax.analysis.study.records import seconds_of
    from bmjax.data.load import load_dataset
    from bmjax.runs.folder import load_data, read_config, record_opening, saved_results

    config = read_config(args.run)
    if config.model.backbone not in NETWORKS:
        raise SystemExit(f"{args.run}: its network is {config.model.backbone}; expected one of {', '.join(NETWORKS)}")
    if args.split not in (results := saved_results(args.run)):
        raise SystemExit(f"{args.run}: no results on {args.split}; `bmjax eval {args.run} --split {args.split}` first")
    dataset, splits = load_data(args.run, config)
    whole = dataclasses.replace(config.data, field_size=0.0)
    images = dataset.images
    if args.whole:
        other = load_dataset(whole)
        if other.ids != dataset.ids:
            raise SystemExit(f"--whole: {args.run}'s field and whole images can't both be read of every file")
        images = other.images
    if args.split == "test":
        record_opening(args.run, results["test"]["step"])
    for name in dict.fromkeys(("train", "val", args.split)):
        rows = getattr(splits, name)
        np.savez(folder / name, images=np.asarray(images[rows]), labels=dataset.labels[rows])
    return {
        "network": NETWORKS[config.model.backbone],
        "classes": len(dataset.classes),
        "size": config.data.image_size,
        "seconds": 60 * args.minutes if args.minutes else seconds_of(args.run),
        "run's seconds": seconds_of(args.run),
        "accuracy": results[args.split]["accuracy"],
    }


def divisor(n: int, most: int = 64) -> int:
    """The largest batch size up to `most` that divides n."""
    return max(size for size in range(1, most + 1) if n % size == 0)


def keras_train(folder: Path, weights: str, split: str, about: dict[str, Any]) -> dict[str, Any]:
    """Trains for about["seconds"]; epochs, and the images of the split that it names rightly."""
    began = time.monotonic()
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    data = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    targets = {name: np.eye(about["classes"], dtype=np.float32)[d["labels"]] for name, d in data.items()}
    shape = (about["size"], about["size"], 3)
    base = getattr(keras.applications, about["network"])(include_top=False, weights=weights, input_shape=shape)
    base.trainable = False
    x = inputs = keras.Input(shape)
    for layer in (
        layers.RandomFlip(),
        layers.RandomRotation(0.25, fill_mode="reflect"),
        layers.RandomZoom(0.15, fill_mode="reflect"),
        layers.RandomBrightness(0.05),
        layers.RandomContrast(0.1),
    ):
        x = layer(x)
    x = layers.Normalization(mean=MEAN, variance=[d * d for d in DEVIATION])(layers.Rescaling(1 / 255)(x))
    x = layers.GlobalAveragePooling2D()(base(x, training=False))
    x = layers.Dropout(DROPOUT)(layers.BatchNormalization()(x))
    outputs = layers.Dense(about["classes"])(layers.Dense(WIDTH, activation="relu")(x))
    model = keras.Model(inputs, outputs)

    best: dict[str, Any] = {"val": -1.0, "weights": model.get_weights()}
    left_from = 0.0

    class Clock(keras.callbacks.Callback):
        """Sets the rate by the time that is left, keeps the best weights, and ends when the time is up."""

        rate, cosine = HEAD_RATE, False

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if self.cosine:
                done = (time.monotonic() - left_from) / max(began + about["seconds"] - left_from, 1.0)
                rate = self.rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
                self.model.optimizer.learning_rate = max(rate, 1e-7)  # type: ignore[union-attr]

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if time.monotonic() - began > about["seconds"]:
                self.model.stop_training = True  # type: ignore[union-attr]

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if logs and logs["val_accuracy"] > best["val"]:
                best.update(val=float(logs["val_accuracy"]), weights=model.get_weights())

    class Batches(keras.utils.PyDataset):
        """Whole batches of the training images, in another order each epoch; what is over is left out of it."""

        def __init__(self) -> None:
            super().__init__()
            self._rng = np.random.default_rng(0)
            self.on_epoch_end()

        def __len__(self) -> int:
            return len(data["train"]["labels"]) // BATCH

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            rows = self._order[index * BATCH : (index + 1) * BATCH]
            return data["train"]["images"][rows], targets["train"][rows]

        def on_epoch_end(self) -> None:
            self._order = self._rng.permutation(len(data["train"]["labels"]))

    def fit(rate: float, epochs: int, *, cosine: bool) -> int:
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING)
        model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
        clock = Clock()
        clock.rate, clock.cosine = rate, cosine
        history: Any = model.fit(
            Batches(),
            epochs=epochs,
            validation_data=(data["val"]["images"], targets["val"]),
            validation_batch_size=divisor(len(targets["val"])),
            callbacks=[clock],
            verbose=0,  # pyright: ignore[reportArgumentType]
        )
        return len(history.history["loss"])

    epochs = [fit(HEAD_RATE, HEAD_EPOCHS, cosine=False)]
    base.trainable = True
    left_from = time.monotonic()
    epochs.append(fit(RATE, 10_000, cosine=True))
    seconds = time.monotonic() - began
    model.set_weights(best["weights"])
    size = divisor(len(targets[split]))
    logits: Any = model.predict(data[split]["images"], batch_size=size, verbose=0)  # pyright: ignore[reportArgumentType]
    hits = int((np.asarray(logits).argmax(1) == data[split]["labels"]).sum())
    return {"epochs": epochs, "seconds": seconds, "hits": hits, "n": len(logits), "val": best["val"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of bmjax")
    parser.add_argument("--weights", required=True, help="Keras's weights file of the run's network, without top")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--minutes", type=float, help="instead of the run's own time")
    parser.add_argument("--whole", action="store_true", help="whole images instead of the run's field")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        about = json.loads((args.worker / "about.json").read_text())
        print(json.dumps(keras_train(args.worker, args.weights, args.split, about)))
        return
    with tempfile.TemporaryDirectory() as folder:
        about = write_cells(args, Path(folder))
        (Path(folder) / "about.json").write_text(json.dumps(about))
        # A process without bmjax, whose XLA flags are not Keras's.
        process = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--worker", folder],
            env={k: v for k, v in environment("keras_jax").items() if k != "XLA_FLAGS"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(process.stdout.splitlines()[-1])
    from bmjax.runs.intervals import wilson_interval

    n = found["n"]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; {about['network']}\n")
    print(f"| | minutes | accuracy on {args.split} | n |\n|---|---|---|---|")
    hits = round(about["accuracy"] * n)
    given = "whole images" if args.whole else "the run's images"
    keras = f"Keras on JAX, {given}, {found['epochs'][0]} + {found['epochs'][1]} epochs"
    for name, seconds, k in (("bmjax", about["run's seconds"], hits), (keras, found["seconds"], found["hits"])):
        low, high = wilson_interval(k, n)
        print(f"| {name} | {seconds / 60:.1f} | {k / n:.3f} ({low:.3f} to {high:.3f}) | {n} |")


if __name__ == "__main__":
    main()
