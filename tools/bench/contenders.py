"""What tools/bench/accelerator.py compares: one train step of a network in each framework, on batches that are on the
device already. Each maker gives a `Stepper`; its `step` only sends the work off, so that 30 steps need one wait.

Images are uint8 [b, h, w, 3] throughout, scaled on the device; the optimizer is Adamax, the head the study's.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from bench import CLASSES, keras_base, peak_memory
from peers import DEVIATION, MEAN

BATCHES = 4
"""Batches on the device, taken in turn."""
STEPS_PER_EPOCH, EPOCHS = 20, 4
"""Of the run by bmjax's own loop; the bare step has its schedule, so both are one program."""
# Name here -> in timm.
TIMM = {
    "densenet121": "densenet121",
    "resnet50": "resnet50",
    "mobilenet_v2": "mobilenetv2_100",
    "xception": "legacy_xception",
    "efficientnetb5": "tf_efficientnet_b5",
}
# What stands for a network in a dry run, where minutes on a CPU must do.
TINY = {
    "densenet121": "densenet_tiny",
    "resnet50": "resnet_tiny",
    "mobilenet_v2": "mobilenet_v2_tiny",
    "xception": "xception_tiny",
    "efficientnetb5": "efficientnet_tiny",
}


class Unavailable(RuntimeError):
    """A contender that can't run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One row: a contender and what it trains. `dtype` is the compute type; float32 is TF32 on a GPU."""

    contender: str
    backbone: str = "densenet121"
    dtype: str = "bfloat16"
    size: int = 224
    batch: int = 256
    dry: bool = False
    repeat: bool = False
    """Whether this is the first row once more, for the spread."""

    @property
    def network(self) -> str:
        """The backbone's name in bmjax."""
        return TINY[self.backbone] if self.dry else self.backbone


class Stepper(NamedTuple):
    """A contender that is built and compiled. `step(k)` sends step k off and gives what `wait` waits for; `peak()` is
    the device's largest use of memory; `program()` is the compiled step as XLA's text, where there is one."""

    step: Callable[[int], Any]
    wait: Callable[[Any], Any]
    peak: Callable[[], int | None]
    program: Callable[[], str | None] | None = None


def batches(job: Job) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [b, h, w, 3] and labels int32 [b], random."""
    rng = np.random.default_rng(0)
    shape = (job.batch, job.size, job.size, 3)
    return [
        (rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, CLASSES, job.batch).astype(np.int32))
        for _ in range(BATCHES)
    ]


def jax_peak() -> int | None:
    """The largest use of the first device's memory in bytes; on CPUs the process's."""
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return peak_memory()
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def bmjax_config(job: Job, **changes: Any) -> Any:
    """The configuration that the bare step and the loop share: cosine schedule, nothing augmented."""
    from bmjax.config import (
        AugmentConfig,
        Config,
        DataConfig,
        ModelConfig,
        OptimConfig,
        ScheduleConfig,
        StageConfig,
        TrainConfig,
    )

    return Config(
        name="accelerator",
        data=DataConfig(image_size=job.size),
        augment=AugmentConfig(flip=False, right_angles=False),
        model=ModelConfig(backbone=job.network, weights=None, attention="none"),
        optim=OptimConfig(name="adamax", preset="keras", schedule=ScheduleConfig(kind="cosine")),
        stages=(StageConfig(epochs=EPOCHS),),
        train=TrainConfig(
            batch_size=job.batch,
            eval_batch_size=job.batch,
            dtype=job.dtype,  # type: ignore[arg-type]
            train_eval_epochs=0,
            workers=8,
            devices=1,
        ),
        **changes,
    )


def bmjax_stepper(job: Job, kind: str = "jit") -> Stepper:
    """bmjax's own train step, as its loop compiles it."""
    # isort: off
    import bmjax  # noqa: F401  (sets its flags before jax is imported)
    import jax

    # isort: on
    from bmjax.model.create import create
    from bmjax.runs.folder import new_variables
    from bmjax.runs.state import create_state
    from bmjax.training.losses import cross_entropy
    from bmjax.training.parallel import Parallel
    from bmjax.training.stages import compile_stage, plan_stages

    config = bmjax_config(job)
    model = create(config.model, CLASSES, config.train.dtype)
    variables = new_variables(config, model)
    plan = plan_stages(config, STEPS_PER_EPOCH, model, variables["batch_stats"])[0]
    parallel = Parallel.create(kind, 1)  # type: ignore[arg-type]
    state = parallel.to_devices(create_state(variables, plan.optimizer.tx, plan.is_trainable, seed=0, ema=False))
    train_step = compile_stage(config, model, plan, parallel, cross_entropy)
    position = np.arange(job.batch, dtype=np.int32)
    placed = [parallel.put_batch({"image": x, "label": y, "position": position}) for x, y in batches(job)]
    compiled = train_step.lower(state, placed[0]).compile()

    def step(k: int) -> Any:
        nonlocal state
        state, metrics = compiled(state, placed[k % BATCHES])
        return metrics["loss"]

    return Stepper(step, jax.block_until_ready, jax_peak, compiled.as_text)


def bmjax_predictor(job: Job) -> Stepper:
    """bmjax's logits of a batch, as its evaluation computes them."""
    # isort: off
    import bmjax  # noqa: F401  (sets its flags before jax is imported)
    import jax

    # isort: on
    from bmjax.model.create import create
    from bmjax.runs.folder import new_variables
    from bmjax.training.parallel import Parallel
    from bmjax.training.steps import make_eval_step

    config = bmjax_config(job)
    model = create(config.model, CLASSES, config.train.dtype)
    parallel = Parallel.create("jit", 1)
    variables = parallel.to_devices(new_variables(config, model))
    placed = [parallel.put_batch({"image": x, "label": y}) for x, y in batches(job)]
    evaluate = parallel.compile_step(make_eval_step(model), donate=False)
    compiled = evaluate.lower(variables, placed[0]).compile()

    def step(k: int) -> Any:
        return compiled(variables, placed[k % BATCHES])

    return Stepper(step, jax.block_until_ready, jax_peak, compiled.as_text)


def bmjax_pmap(job: Job) -> Stepper:
    return bmjax_stepper(job, "pmap")


def _scaled(images: Any) -> Any:
    import jax.numpy as jnp

    return (images.astype(jnp.float32) / 255 - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)


def _keras_base(job: Job) -> Any:
    if importlib.util.find_spec("keras") is None:
        raise Unavailable("keras is not installed")
    if job.dry and job.backbone != "mobilenet_v2":
        raise Unavailable("in a dry run MobileNetV2 alone stands for keras.applications")
    options = {"alpha": 0.35} if job.dry else {}
    return keras_base(argparse_like(job), **options)


def argparse_like(job: Job) -> Any:
    """What tools/bench/bench.py asks of its arguments."""
    import argparse

    return argparse.Namespace(backbone=job.backbone, size=job.size, batch=job.batch)


def flax_stepper(job: Job) -> Stepper:
    """The network as plain Flax and Optax have it, compiled by jit with the settings that jax comes with."""
    import jax
    import jax.numpy as jnp
    import optax
    from peers import flax_densenet, flax_from_keras

    dtype = jnp.bfloat16 if job.dtype == "bfloat16" else None
    if job.backbone.startswith("densenet"):
        model = flax_densenet(job.network, dtype)
    else:
        model = flax_from_keras(_keras_base(job), dtype)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, job.size, job.size, 3)), False))
    variables = init(jax.random.key(0))
    tx = optax.adamax(1e-3, eps=1e-7)
    carry: tuple[Any, ...] = (variables["params"], variables["batch_stats"], tx.init(variables["params"]))

    def one(params, stats, opt_state, images, labels, key):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats},
                _scaled(images),
                True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
            return loss, new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    placed = jax.device_put(batches(job))
    key = jax.random.key(0)
    compiled = jax.jit(one, donate_argnums=(0, 1, 2)).lower(*carry, *placed[0], key).compile()

    def step(k: int) -> Any:
        nonlocal carry
        *new, loss = compiled(*carry, *placed[k % BATCHES], key)
        carry = tuple(new)
        return loss

    return Stepper(step, jax.block_until_ready, jax_peak, compiled.as_text)


def keras_stepper(job: Job) -> Stepper:
    """keras.applications on JAX by Keras's own stateless functions, as its guide to training loops in JAX has it."""
    if importlib.util.find_spec("keras") is None:
        raise Unavailable("keras is not installed")
    import jax
    import keras

    keras.mixed_precision.set_global_policy("mixed_bfloat16" if job.dtype == "bfloat16" else "float32")
    base = _keras_base(job)
    inputs = keras.Input((job.size, job.size, 3))
    x = keras.layers.GlobalAveragePooling2D()(base(inputs))
    x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(x))
    x = keras.layers.Dense(256, activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, dtype="float32")(x))
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adamax()
    optimizer.build(model.trainable_variables)

    def one(trainable, rest, opt_state, images, labels):
        def loss_fn(trainable):
            found: Any = model.stateless_call(trainable, rest, _scaled(images), training=True)
            return loss_of(labels, found[0]), found[1]

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
        trainable, opt_state = optimizer.stateless_apply(opt_state, grads, trainable)
        return trainable, rest, opt_state, loss

    groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    carry: tuple[Any, ...] = tuple([jax.numpy.array(v.value, copy=True) for v in group] for group in groups)
    placed = jax.device_put(batches(job))
    compiled = jax.jit(one, donate_argnums=(0, 1, 2)).lower(*carry, *placed[0]).compile()

    def step(k: int) -> Any:
        nonlocal carry
        *new, loss = compiled(*carry, *placed[k % BATCHES])
        carry = tuple(new)
        return loss

    return Stepper(step, jax.block_until_ready, jax_peak, compiled.as_text)


def timm_stepper(job: Job, compiled: bool = False) -> Stepper:
    """timm's network in channels-last memory, eager or compiled; autocast for bfloat16, else TF32 is allowed."""
    for package in ("torch", "timm"):
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not job.dry:
        raise Unavailable("torch sees no GPU")
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    model: Any = timm.create_model(TIMM[job.backbone], num_classes=CLASSES).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adamax(model.parameters(), 1e-3, eps=1e-7)
    mean, deviation = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    placed = [
        (torch.from_numpy(x).to(device), torch.from_numpy(y.astype(np.int64)).to(device)) for x, y in batches(job)
    ]
    mixed = job.dtype == "bfloat16"

    def step(k: int) -> Any:
        images, labels = placed[k % BATCHES]
        optimizer.zero_grad(set_to_none=True)
        # NHWC in memory already, so this is a view in channels-last.
        x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / deviation
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()
        return loss

    def wait(loss: Any) -> None:
        loss.item()
        if on_gpu:
            torch.cuda.synchronize()

    if compiled:  # torch compiles when it is called; the memory of that step is given back, for others compile too
        wait(step(0))
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    return Stepper(step, wait, torch.cuda.max_memory_allocated if on_gpu else peak_memory)


def timm_compiled(job: Job) -> Stepper:
    return timm_stepper(job, compiled=True)


def cells(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` different pictures uint8 [n, s, s, 3] of rendered cells and their labels [n]: few are rendered, the rest
    are those moved over the edge."""
    from bmjax.data.sources.synthetic import synthetic_cells

    rendered, labels, _ = synthetic_cells(10, size, seed=0)
    n = len(rendered)
    images = np.empty((count, *rendered.shape[1:]), np.uint8)
    for i in range(count):
        round_ = i // n
        images[i] = np.roll(rendered[i % n], (round_ % size, round_ // size), (0, 1))
    return images, labels[np.arange(count) % n]


def run_loop(job: Job) -> dict[str, Any]:
    """Trains by `bmjax.train` on rendered cells: images/s within epochs and over whole ones, evaluations and
    checkpoints included, of all epochs but the first, and the seconds to the first step's end."""
    import tempfile
    import time

    import bmjax
    from bmjax.data.dataset import Dataset

    # 70 % are the training split, by chance; a few more, so that an epoch has at least so many steps.
    images, labels = cells(job.size, int(job.batch * (STEPS_PER_EPOCH + 1) / 0.7))
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()

        def watch(event: Any) -> None:
            if event.kind == "step":
                times.append(time.perf_counter())

        config = bmjax_config(job, run_dir=f"{folder}/run")
        result = bmjax.train(config, data=Dataset.from_arrays(images, labels), callbacks=[watch])
    per_epoch = result.steps // EPOCHS
    at = np.asarray(times).reshape(EPOCHS, per_epoch)
    within = (EPOCHS - 1) * (per_epoch - 1) * job.batch / np.diff(at[1:], axis=1).sum()
    whole = (EPOCHS - 2) * per_epoch * job.batch / (at[-1, 0] - at[1, 0])
    found = {"images_per_second": float(within), "images_per_second_whole_epochs": float(whole)}
    return found | {"first_seconds": times[0] - began, "steps": result.steps, "peak_bytes": jax_peak()}


MAKERS: dict[str, Callable[[Job], Stepper]] = {
    "bmjax": bmjax_stepper,
    "bmjax_pmap": bmjax_pmap,
    "bmjax_in_place": bmjax_stepper,
    "bmjax_remat": bmjax_stepper,
    "bmjax_taps": bmjax_stepper,
    "bmjax_depthwise": bmjax_stepper,
    "bmjax_dot": bmjax_stepper,
    "bmjax_pool": bmjax_stepper,
    "bmjax_dot_remat": bmjax_stepper,
    "flax": flax_stepper,
    "keras_jax": keras_stepper,
    "timm": timm_stepper,
    "timm_compiled": timm_compiled,
}
FORMS = {
    "bmjax_in_place": "dense_in_place",
    "bmjax_remat": "dense_remat",
    "bmjax_taps": "depthwise_taps",
    "bmjax_depthwise": "plain_depthwise",
    "bmjax_dot": "pointwise_dot",
    "bmjax_pool": "plain_pool",
    "bmjax_dot_remat": "pointwise_dot,dense_remat",
}
"""What BMJAX_FORMS is for the variants of bmjax; see bmjax/layers/dispatch.py."""
