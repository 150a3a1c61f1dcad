"""Speed of a sweep on cached features: the study's grid of 20 heads in bmjax, and the same heads in Keras.

    python tools/bench/bench_sweep.py --data FOLDER --weights FILE [--epochs 15] [--contenders bmjax keras_jax]

Five optimizers at Keras's default rates times four batch sizes, as experiments/study/optimizers.py has them: the added
head on a network's frozen, pooled features. bmjax by `run_sweep`, with everything it writes; Keras on its JAX backend
by `compile` and `fit`, a new model a head, its arrays in memory and with the `steps_per_execution` that is the fastest
for it, which is tried first and not counted. The features are computed, or found in the cache, before. Each contender
has a process of its own, one after another; its compiling counts, without a cache. Without --data: rendered cells.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench import environment
from bench_heads import keras_fit

EXPERIMENT = Path(__file__).parents[2] / "experiments/study/optimizers.py"
STEPS = (1, 8, 32)  # steps_per_execution to try
Found = dict[str, Any]


def setting(args: argparse.Namespace, folder: str) -> tuple[Any, list[dict[str, Any]]]:
    """(configuration, the changes of each cell) of the study's grid."""
    import bmjax  # noqa: F401  (sets the CPU flags before jax is imported)
    from bmjax.config.experiment import load_experiment

    _, module = load_experiment(str(EXPERIMENT))
    options: Any = module
    chosen = options.Settings(data=args.data, weights=args.weights, out=Path(folder), smoke=not args.data)
    config = options.config(chosen)
    stage = dataclasses.replace(config.stages[0], epochs=args.epochs)
    train = dataclasses.replace(config.train, keep_last=False)  # as the study trains them
    return dataclasses.replace(config, stages=(stage,), train=train), list(options.sweep(chosen))


def features(args: argparse.Namespace) -> Found:
    """Computes the features, or finds them in the cache, and keeps the pooled ones of train and validation."""
    config, changes = setting(args, args.folder)
    (Path(args.folder) / "cells.json").write_text(json.dumps(changes))  # so that Keras's process needs no bmjax
    from bmjax.training.run import complete, prepare

    prepared = prepare(complete(config))
    parts = {}
    for name in ("train", "val"):
        rows = getattr(prepared.splits, name)
        parts[f"{name}_x"] = np.asarray(prepared.features.on_device(rows, pooled=True))[:, 0, 0]
        parts[f"{name}_y"] = prepared.dataset.labels[rows]
    np.savez(Path(args.folder) / "features.npz", **parts)
    return {"n": len(parts["train_x"]), "val": len(parts["val_x"]), "channels": parts["train_x"].shape[1]}


def bmjax_sweep(args: argparse.Namespace) -> Found:
    config, changes = setting(args, args.folder)
    from bmjax.analysis.sweep.cells import cells_of
    from bmjax.analysis.sweep.run import run_sweep
    from bmjax.cpu import build as native

    native.prepare()  # compiled once for a machine, not once for a sweep
    logging.getLogger("bmjax").setLevel(logging.ERROR)
    start = time.perf_counter()
    sweep = run_sweep(config, cells_of(config, changes))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "accuracies": [row["val/accuracy"] for row in sweep.rows]}


def keras_sweep(args: argparse.Namespace) -> Found:
    import keras

    changes = json.loads((Path(args.folder) / "cells.json").read_text())

    arrays = np.load(Path(args.folder) / "features.npz")
    data = ((arrays["train_x"], arrays["train_y"]), (arrays["val_x"], arrays["val_y"]))

    def head(cell: dict[str, Any], steps: int) -> float:
        keras.utils.set_random_seed(0)
        inputs = keras.Input(data[0][0].shape[1:])
        optimizer = keras.optimizers.get(
            {"class_name": cell["optim.name"], "config": {"learning_rate": cell["optim.lr"]}}
        )
        options = {"steps_per_execution": steps, "jit_compile": True}
        return keras_fit(inputs, inputs, data, optimizer, args.epochs, cell["train.batch_size"], **options)[1]

    tried = {}
    for steps in STEPS:
        start = time.perf_counter()
        head(changes[1], steps)
        tried[steps] = time.perf_counter() - start
    best = min(tried, key=lambda steps: tried[steps])
    start = time.perf_counter()
    accuracies = [head(cell, best) for cell in changes]
    return {"seconds": time.perf_counter() - start, "accuracies": accuracies, "tried": tried, "steps": best}


CONTENDERS: dict[str, tuple[str, Callable[[argparse.Namespace], Found]]] = {
    "bmjax": ("bmjax", bmjax_sweep),
    "keras_jax": ("Keras on JAX", keras_sweep),
}


def measure(name: str, args: argparse.Namespace) -> Found:
    """What a contender found, in a process of its own."""
    words = ["--data", args.data, "--weights", args.weights, "--epochs", str(args.epochs), "--folder", args.folder]
    command = [sys.executable, __file__, *words, "--worker", name]
    process = subprocess.run(command, env=environment(name), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="", help="folder with one sub-folder of images per class")
    parser.add_argument("--weights", default="", help="weights file of one network")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=[*CONTENDERS, "features"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps((features if args.worker == "features" else CONTENDERS[args.worker][1])(args)))
        return
    with tempfile.TemporaryDirectory() as args.folder:
        sizes = measure("features", args)
        print(f"20 heads on {sizes['n']} cached features of {sizes['channels']}, {args.epochs} epochs each, validated")
        print(f"each epoch on {sizes['val']}; {platform.machine()}, {os.cpu_count()} CPUs\n")
        found = {name: measure(name, args) for name in args.contenders}
    first = next(iter(found.values()))["seconds"]
    print(
        "| | all 20 heads, s | a head, s | times as long | mean of best validation accuracies |\n|---|---|---|---|---|"
    )
    for name, one in found.items():
        cells = [f"{one['seconds']:.1f}", f"{one['seconds'] / len(one['accuracies']):.2f}"]
        cells += [f"{one['seconds'] / first:.2f}x", f"{np.mean(one['accuracies']):.3f}"]
        print(f"| {CONTENDERS[name][0]} | {' | '.join(cells)} |")
    if "keras_jax" in found:
        one = found["keras_jax"]
        tried = ", ".join(f"{steps}: {seconds:.1f} s" for steps, seconds in one["tried"].items())
        print(f"\nKeras's steps_per_execution is {one['steps']}; one head with each: {tried}.")


if __name__ == "__main__":
    main()
