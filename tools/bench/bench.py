"""Speed and memory of training and inference against other frameworks, and of the input pipeline.

    python tools/bench/bench.py [--backbone densenet121 resnet50] [--size 224] [--batch 16 32] [--rounds 5]

Contenders are plain Flax, keras.applications on JAX and, where the `bench` extra is installed, PyTorch in channels-last
and keras.applications on TensorFlow. Each runs in a process of its own; rounds are interleaved, since a machine's speed
drifts, and only the ratios of one run count. A round is three steps, of which the last is timed. Peak memory is that of
the steps after the first; compiling has its own column. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import DEVIATION, MEAN

CLASSES = 7
# Name here -> in keras.applications. PyTorch's contender is there for the DenseNets, ONNX Runtime's for ResNet50, too.
BACKBONES = {
    "densenet121": "DenseNet121",
    "densenet169": "DenseNet169",
    "densenet201": "DenseNet201",
    "efficientnetb0": "EfficientNetB0",
    "efficientnetb5": "EfficientNetB5",
    "resnet50": "ResNet50",
    "xception": "Xception",
    "mobilenet_v2": "MobileNetV2",
}
MODES = ("train", "inference", "frozen")
LABELS = {
    "bmjax": "bmjax",
    "flax": "plain Flax",
    "keras_jax": "Keras on JAX",
    "torch": "PyTorch, channels-last",
    "keras_tensorflow": "Keras on TensorFlow",
    "onnxruntime": "ONNX Runtime",
}
NEEDS = {
    "bmjax": "bmjax",
    "flax": "flax",
    "keras_jax": "keras",
    "torch": "torch",
    "keras_tensorflow": "tensorflow",
    "onnxruntime": "onnxruntime",
}
Run = Callable[[], None]


def random_batch(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, args.size, args.size, 3), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, args.batch).astype(np.int32)


def bmjax_run(args: argparse.Namespace) -> Run:
    """One update, or one prediction, by bmjax as its loop does it."""
    import bmjax  # noqa: F401  (sets the CPU flags before jax is imported)
    from bmjax.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig, StageConfig
    from bmjax.model.create import create
    from bmjax.runs.folder import new_variables
    from bmjax.runs.state import create_state
    from bmjax.training.losses import cross_entropy
    from bmjax.training.parallel import Parallel
    from bmjax.training.stages import compile_stage, plan_stages
    from bmjax.training.steps import make_eval_step

    parts = ("attention", "head") if args.mode == "frozen" else ("backbone", "attention", "head")
    config = Config(
        data=DataConfig(image_size=args.size),
        augment=AugmentConfig(flip=False, right_angles=False),
        model=ModelConfig(backbone=args.backbone, weights=None, attention="none"),
        optim=OptimConfig(name="adamax", preset="keras"),
        stages=(StageConfig(train=parts),),
    )
    model = create(config.model, CLASSES)
    variables = new_variables(config, model)
    parallel = Parallel.create("jit", 1)
    images, labels = random_batch(args)
    batch = {"image": images, "label": labels, "position": np.arange(args.batch, dtype=np.int32)}
    if args.mode == "inference":
        evaluate = parallel.compile_step(make_eval_step(model), donate=False)
        placed = parallel.to_devices(variables)

        def predict() -> None:
            evaluate(placed, parallel.put_batch(batch))["logits"].block_until_ready()

        return predict
    plan = plan_stages(config, 10, model, variables["batch_stats"])[0]
    state = create_state(variables, plan.optimizer.tx, plan.is_trainable, seed=0, ema=False)
    step = compile_stage(config, model, plan, parallel, cross_entropy)
    on_device = parallel.to_devices(state)

    def update() -> None:
        nonlocal on_device
        on_device, metrics = step(on_device, parallel.put_batch(batch))
        metrics["loss"].block_until_ready()

    return update


def keras_base(args: argparse.Namespace, **options) -> Any:
    """The network of keras.applications without top, random weights."""
    import keras

    build = getattr(keras.applications, BACKBONES[args.backbone])
    return build(include_top=False, weights=None, input_shape=(args.size, args.size, 3), **options)


def plain_flax(args: argparse.Namespace) -> Any:
    from peers import flax_densenet, flax_from_keras

    if args.backbone.startswith("densenet"):
        return flax_densenet(args.backbone)
    return flax_from_keras(keras_base(args))


def flax_run(args: argparse.Namespace) -> Run:
    """The same in plain Flax and Optax, with the settings that jax comes with."""
    import jax
    import jax.numpy as jnp
    import optax

    model = plain_flax(args)
    images, labels = random_batch(args)
    whole = args.mode != "frozen"

    def scaled(images):
        mean, std = jnp.array(MEAN), jnp.array(DEVIATION)
        return (images.astype(jnp.float32) / 255 - mean) / std

    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, args.size, args.size, 3)), False))
    variables = init(jax.random.key(0))
    if args.mode == "inference":
        apply = jax.jit(lambda v, x: model.apply(v, scaled(x), False))
        return lambda: apply(variables, images).block_until_ready()
    head = ("head_norm", "dense", "logits")
    tx = optax.adamax(1e-3, eps=1e-7)
    params = variables["params"]
    trained = params if whole else {k: params[k] for k in head}
    opt_state = tx.init(trained)

    def step(params, stats, opt_state, images, labels, key):
        def loss_fn(trained):
            logits, new = model.apply(
                {"params": {**params, **trained}, "batch_stats": stats},
                scaled(images),
                True,
                whole,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, new["batch_stats"]

        trained = params if whole else {k: params[k] for k in head}
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return params | optax.apply_updates(trained, updates), stats, opt_state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1, 2))
    carry = (params, variables["batch_stats"], opt_state)

    def update() -> None:
        nonlocal carry
        *new, loss = compiled(*carry, images, labels, jax.random.key(0))
        carry = tuple(new)
        loss.block_until_ready()

    return update


def keras_run(args: argparse.Namespace) -> Run:
    """The same by keras.applications."""
    import keras

    inputs = keras.Input((args.size, args.size, 3))
    x = keras.applications.densenet.preprocess_input(inputs)
    base = keras_base(args, pooling="avg")
    base.trainable = args.mode != "frozen"
    x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(base(x)))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.Dense(256, activation="relu")(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adamax(), loss=loss)
    images, labels = random_batch(args)
    images = images.astype(np.float32)
    if args.mode == "inference":
        return lambda: model.predict_on_batch(images)
    return lambda: model.train_on_batch(images, labels)


def torch_run(args: argparse.Namespace) -> Run:
    """The same in PyTorch, channels-last."""
    import torch  # pyright: ignore[reportMissingImports]
    from peers import torch_densenet

    torch.set_num_threads(os.cpu_count() or 1)
    backbone, head = torch_densenet(args.backbone)
    images, labels = (torch.from_numpy(a) for a in random_batch(args))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    labels = labels.long()

    def scaled():
        # NHWC in memory already, so this is a view in channels-last.
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std

    if args.mode == "inference":
        backbone.eval()
        head.eval()

        def predict() -> None:
            with torch.inference_mode():
                head(backbone(scaled()))

        return predict
    whole = args.mode == "train"
    backbone.train(whole)
    parameters = [*(backbone.parameters() if whole else ()), *head.parameters()]
    optimizer = torch.optim.Adamax(parameters, 1e-3, eps=1e-7)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(whole):
            features = backbone(scaled())
        torch.nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()

    return update


def onnx_run(args: argparse.Namespace) -> Run:
    """A prediction by ONNX Runtime, with the settings that it comes with and a thread for each CPU."""
    import onnxruntime
    from peers import onnx_network

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    model = onnx_network(args.backbone, args.size)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    images, _ = random_batch(args)

    def predict() -> None:
        session.run(None, {"images": images})

    return predict


def pipeline_speed(args: argparse.Namespace, seconds: float = 5.0) -> float:
    """Images a second that the cached input pipeline delivers as uint8 batches."""
    from bmjax.config import DataConfig
    from bmjax.data.batches import TrainBatches
    from bmjax.data.load import load_dataset

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


def machine_peak(_: argparse.Namespace) -> float:
    """The best float32 matrix product of this machine, FLOP/s."""
    import jax

    import bmjax  # noqa: F401

    def speed(n: int) -> float:
        a = jax.random.normal(jax.random.key(0), (n, n))
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        taken = []
        for _ in range(10):
            start = time.perf_counter()
            product(a).block_until_ready()
            taken.append(time.perf_counter() - start)
        return 2 * n**3 / min(taken)

    return max(speed(n) for n in (1024, 1536, 2048))


def forward_flops(args: argparse.Namespace) -> float:
    """FLOPs of one image's forward pass, plainly written, as XLA counts them before it optimises."""
    import jax
    import jax.numpy as jnp

    model, x = plain_flax(args), jnp.zeros((1, args.size, args.size, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, False))
    cost = jax.jit(lambda v, x: model.apply(v, x, False)).lower(variables, x).cost_analysis()
    return float(cost["flops"])  # pyright: ignore


QUESTIONS = {"pipeline": pipeline_speed, "peak": machine_peak, "flops": forward_flops}
RUNS = {
    "bmjax": bmjax_run,
    "flax": flax_run,
    "keras_jax": keras_run,
    "torch": torch_run,
    "keras_tensorflow": keras_run,
    "onnxruntime": onnx_run,
}


def peak_memory() -> int:
    """Largest resident memory of this process in bytes, since its start or `reset_peak_memory`."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Hands back what is freed and starts again, so that compiling doesn't count; on Linux alone."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def worker(args: argparse.Namespace) -> None:
    """Answers one question, or serves a contender's runs."""
    if args.worker in QUESTIONS:
        print(QUESTIONS[args.worker](args))
        return
    serve(lambda: RUNS[args.worker](args), warm_up=2)


def serve(make: Callable[[], Run], warm_up: int = 0) -> None:
    """Makes a run and runs it once; then answers each line of standard input: another's seconds, or the peak memory.

    So many runs go before each that is timed: while others had their turn, pages and caches went cold.
    """
    start = time.perf_counter()
    run = make()
    run()
    first, memory = time.perf_counter() - start, peak_memory()
    reset_peak_memory()
    print(json.dumps({"first": first, "compiling": memory}), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps({"memory": peak_memory()}), flush=True)
            continue
        for _ in range(warm_up):
            run()
        start = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def ask(process: subprocess.Popen, line: str) -> dict:
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    while not answer.startswith("{"):
        if not answer:
            raise RuntimeError(f"{process.args} ended before it answered")
        answer = process.stdout.readline()
    return json.loads(answer)


def command(args: argparse.Namespace, name: str, mode: str, batch: int) -> list[str]:
    options = {"--backbone": args.backbone, "--size": args.size, "--batch": batch, "--mode": mode, "--worker": name}
    return [sys.executable, __file__, *(str(part) for pair in options.items() for part in pair)]


def environment(name: str) -> dict[str, str]:
    # No compilation cache: the time to the first step is that of a fresh machine.
    backend = "tensorflow" if name == "keras_tensorflow" else "jax"
    own = {"KERAS_BACKEND": backend, "JAX_ENABLE_COMPILATION_CACHE": "false", "TQDM_DISABLE": "1"}
    return os.environ | own | {"TF_CPP_MIN_LOG_LEVEL": "3"}


def compare(args: argparse.Namespace, names: list[str], mode: str, batch: int) -> dict[str, dict]:
    """Per contender: "seconds" of each round; "first", to the end of the first step; bytes: "memory", "compiling"."""
    processes, found = {}, {}
    for name in names:
        processes[name] = subprocess.Popen(
            command(args, name, mode, batch),
            env=environment(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found[name] = ask(processes[name], "") | {"seconds": []}
    for _ in range(args.rounds):
        for name, process in processes.items():
            found[name]["seconds"].append(ask(process, "step")["seconds"])
    for name, process in processes.items():
        found[name]["memory"] = ask(process, "memory")["memory"]
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    return found


def ratio(found: dict[str, dict], name: str, other: str) -> float:
    """How many times as fast `name` is as `other`: the median over rounds of the ratio within a round."""
    pairs = zip(found[name]["seconds"], found[other]["seconds"], strict=True)
    return statistics.median(b / a for a, b in pairs)


def question(args: argparse.Namespace, name: str) -> float:
    run = command(args, name, "train", args.batch[0])
    out = subprocess.run(run, env=environment(name), capture_output=True, text=True, check=True).stdout
    return float(out.split()[-1])


def plot(results: dict[tuple[str, str, int], dict[str, dict]], path: str, title: str) -> None:
    """Bars of images a second, a panel for each network, mode and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.2 * rows + 0.5), layout="constrained")
    for number, ((backbone, mode, batch), found) in enumerate(results.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        speeds = [batch / statistics.median(f["seconds"]) for f in found.values()]
        bars = axes.barh([LABELS[n] for n in found], speeds, color=["C1" if n == "bmjax" else "C0" for n in found])
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max(speeds))
        axes.set_title(f"{backbone}, {mode}, batch {batch}", fontsize=10)
        axes.set_xlabel("images/s")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", nargs="+", default=["densenet121"], choices=BACKBONES)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", nargs="+", default=["train", "inference"], choices=MODES)
    parser.add_argument("--contenders", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--plot", help="PNG file for a picture of the speeds")
    parser.add_argument("--worker", choices=(*RUNS, *QUESTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.backbone, args.batch, args.mode = args.backbone[0], args.batch[0], args.mode[0]
        worker(args)
        return
    installed = [name for name in args.contenders if importlib.util.find_spec(NEEDS[name])]
    results = {}
    for backbone in args.backbone:
        args.backbone = backbone
        results |= compare_backbone(args, [name for name in installed if has(name, backbone)])
    if args.plot:
        plot(results, args.plot, f"{args.size}x{args.size}, float32, {os.cpu_count()} CPUs")


def has(contender: str, backbone: str) -> bool:
    """Whether the contender has this network; others of PyTorch and ONNX Runtime are not written here."""
    if contender == "onnxruntime" and backbone == "resnet50":
        return True
    return contender not in ("torch", "onnxruntime") or backbone.startswith("densenet")


def compare_backbone(args: argparse.Namespace, names: list[str]) -> dict[tuple[str, str, int], dict[str, dict]]:
    """Prints a table for each mode and batch size: {(backbone, mode, batch): what `compare` found}."""
    peak, flops = question(args, "peak"), question(args, "flops")
    print(f"{args.backbone}, {args.size}x{args.size}, float32, medians of {args.rounds} interleaved rounds")
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()};", end=" ")
    print(f"float32 matrix product {peak / 1e9:.0f} GFLOP/s; forward {flops / 1e9:.2f} GFLOP an image\n")
    results = {}
    for mode in args.mode:
        for batch in args.batch:
            taking_part = [name for name in names if mode == "inference" or name != "onnxruntime"]
            found = results[args.backbone, mode, batch] = compare(args, taking_part, mode, batch)
            work = 3 * flops if mode == "train" else flops
            print(f"{args.backbone}, {mode}, batch {batch}:\n")
            print(
                "| | images/s | bmjax is faster by | peak memory, GB | compiling, GB | first step done, s | of peak |"
            )
            print("|---|---|---|---|---|---|---|")
            for name in taking_part:
                f = found[name]
                speed = batch / statistics.median(f["seconds"])
                times = f"{ratio(found, 'bmjax', name):.2f}x" if "bmjax" in found else ""
                share = f"{100 * speed * work / peak:.0f} %"
                sizes = (f"{f[key] / 1e9:.2f}" for key in ("memory", "compiling"))
                cells = (LABELS[name], f"{speed:.2f}", times, *sizes, f"{f['first']:.0f}", share)
                print(f"| {' | '.join(cells)} |", flush=True)
            print()
    if "bmjax" in names and "train" in args.mode:
        pipeline = question(args, "pipeline")
        seconds = results[args.backbone, "train", args.batch[0]]["bmjax"]["seconds"]
        trained = args.batch[0] / statistics.median(seconds)
        print(f"cached input pipeline: {pipeline:.0f} images/s, {pipeline / trained:.0f} times the train step\n")
    return results


if __name__ == "__main__":
    main()
