"""Speed and memory of the train step against keras.applications on JAX, and of the input pipeline.

    python tools/bench.py [--backbone densenet121] [--size 224] [--batch 16] [--rounds 5]

Each contender runs in a process of its own; rounds are interleaved, since a machine's speed drifts, and only the
ratios of one run count. Needs the `test` extra, for Keras. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

CLASSES = 7


def random_batch(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, args.size, args.size, 3), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, args.batch).astype(np.int32)


def bmjax_step(args: argparse.Namespace):
    """A function that does one update of the whole network by bmjax."""
    import bmjax  # noqa: F401  (sets the CPU flag before jax is imported)
    from bmjax import loop
    from bmjax.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig
    from bmjax.model import create
    from bmjax.parallel import Parallel
    from bmjax.run import new_variables
    from bmjax.state import create_state

    config = Config(
        data=DataConfig(image_size=args.size),
        augment=AugmentConfig(flip=False, right_angles=False),
        model=ModelConfig(backbone=args.backbone, weights=None, attention="none"),
        optim=OptimConfig(name="adamax", preset="keras"),
    )
    model = create(config.model, CLASSES)
    variables = new_variables(config, model)
    plan = loop.plan_stages(config, 10, model, variables["batch_stats"])[0]
    state = create_state(variables, plan.optimizer.tx, plan.is_trainable, seed=0, ema=False)
    parallel = Parallel.create("jit", 1)
    step = loop.compile_stage(config, model, plan, parallel, None)
    images, labels = random_batch(args)
    batch = {"image": images, "label": labels, "position": np.arange(args.batch, dtype=np.int32)}
    on_device = parallel.to_devices(state)

    def run() -> None:
        nonlocal on_device
        on_device, metrics = step(on_device, parallel.put_batch(batch))
        metrics["loss"].block_until_ready()

    return run


def keras_step(args: argparse.Namespace):
    """The same network and head by keras.applications on the JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    names = {"densenet121": "DenseNet121", "densenet169": "DenseNet169", "densenet201": "DenseNet201"}
    inputs = keras.Input((args.size, args.size, 3))
    x = keras.applications.densenet.preprocess_input(inputs)
    build = getattr(keras.applications, names[args.backbone])
    x = build(include_top=False, weights=None, input_shape=(args.size, args.size, 3), pooling="avg")(x)
    x = keras.layers.Dense(256, activation="relu")(keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(x)))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adamax(), loss=loss)
    images, labels = random_batch(args)
    images = images.astype(np.float32)

    def run() -> None:
        model.train_on_batch(images, labels)

    return run


def pipeline_speed(args: argparse.Namespace, seconds: float = 5.0) -> float:
    """Images a second that the cached input pipeline delivers as uint8 batches."""
    from bmjax.config import DataConfig
    from bmjax.data import load_dataset
    from bmjax.data.pipeline import TrainBatches

    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(image_size=args.size, synthetic_per_class=60, cache_dir=folder)
        dataset = load_dataset(config)
        batches = TrainBatches(dataset, np.arange(len(dataset.labels)), args.batch, 0).batches(0)
        for _ in range(5):
            next(batches)
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            n += len(next(batches)["image"])
        return n / (time.perf_counter() - start)


def worker(args: argparse.Namespace) -> None:
    """Answers each line on standard input with the seconds of one step, or the peak memory."""
    start = time.perf_counter()
    run = {"bmjax": bmjax_step, "keras": keras_step}[args.worker](args)
    run()
    print(json.dumps({"first": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({"memory": peak}), flush=True)
            continue
        start = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def ask(process: subprocess.Popen, line: str) -> dict:
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=("bmjax", "keras", "pipeline"))
    args = parser.parse_args()
    if args.worker == "pipeline":
        print(pipeline_speed(args))
        return
    if args.worker:
        worker(args)
        return
    command = [
        sys.executable,
        __file__,
        "--backbone",
        args.backbone,
        "--size",
        str(args.size),
        "--batch",
        str(args.batch),
    ]
    processes, first = {}, {}
    for name in ("bmjax", "keras"):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # No compilation cache: the time to the first step is that of a fresh machine.
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "TQDM_DISABLE": "1"}
        processes[name] = subprocess.Popen([*command, "--worker", name], env=environment, **pipes)
        first[name] = ask(processes[name], "")["first"]
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(args.rounds):
        for name, process in processes.items():
            seconds[name].append(ask(process, "step")["seconds"])
    memory = {name: ask(process, "memory")["memory"] for name, process in processes.items()}
    for process in processes.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    out = subprocess.run([*command, "--worker", "pipeline"], capture_output=True, text=True, check=True).stdout
    pipeline = float(out.split()[-1])
    speed = {name: args.batch / statistics.median(s) for name, s in seconds.items()}
    print(f"{args.backbone}, {args.size}x{args.size}, batch {args.batch}, float32, train step, median of {args.rounds}")
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n")
    print("| | images/s | peak memory, GB | seconds to the end of the first step |\n|---|---|---|---|")
    for name, label in (("bmjax", "bmjax"), ("keras", "keras.applications on JAX")):
        print(f"| {label} | {speed[name]:.2f} | {memory[name] / 1e9:.2f} | {first[name]:.0f} |")
    ratio = statistics.median([k / b for b, k in zip(seconds["bmjax"], seconds["keras"], strict=True)])
    print(f"\ntrain step, bmjax over Keras: {ratio:.2f} times as fast")
    print(f"peak memory, bmjax over Keras: {memory['bmjax'] / memory['keras']:.2f}")
    print(f"cached input pipeline: {pipeline:.0f} images/s, {pipeline / speed['bmjax']:.0f} times the train step")


if __name__ == "__main__":
    main()
