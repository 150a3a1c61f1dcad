"""What an attention module costs on given features (parameters, FLOPs by XLA, measured time), and a train step."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config.base import Config
from bmjax.layers.dispatch import prepare, traced_for
from bmjax.model.classifier import Classifier
from bmjax.model.parameters import count_parameters
from bmjax.runs.state import create_state
from bmjax.training.losses import Loss, cross_entropy
from bmjax.training.parallel import Parallel
from bmjax.training.stages import StagePlan, compile_stage


class Cost(NamedTuple):
    """Of one batch of features, float32. `forward` is in evaluation mode, `step` in training mode with all gradients;
    their times are medians over `n` calls in milliseconds, without compiling."""

    parameters: int
    forward_flops: float
    step_flops: float
    forward_ms: float
    step_ms: float
    n: int


def flops_of(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of a call, as XLA counts them before it optimises. It counts none of the kernels on CPUs, so the function
    is lowered as away from them."""
    with traced_for("gpu"):
        cost = jax.jit(lambda *args: function(*args)).lower(*args).cost_analysis()
    return float("nan") if cost is None else float(cost.get("flops", 0.0))  # XLA names no count of zero


def measure(modules: dict[str, nn.Module], shape: tuple[int, int, int, int], n: int = 30) -> dict[str, Cost]:
    """Costs by name, of features [b, h, w, c]. The modules take turns, so that load falls on all alike."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    shapes = {name: jax.eval_shape(lambda x, m=module: _init(m, x), x) for name, module in modules.items()}
    parameters = {name: count_parameters(tree.get("params", {})) for name, tree in shapes.items()}
    lowered: dict[tuple[str, str], Any] = {}
    flops: dict[tuple[str, str], float] = {}
    for name, module in modules.items():
        lowered[name, "init"] = jax.jit(lambda x, m=module: _init(m, x)).lower(x)
        for kind, function in (("forward", _forward(module)), ("step", _step(module))):
            lowered[name, kind] = jax.jit(function).lower(shapes[name], x)
            flops[name, kind] = flops_of(function, shapes[name], x)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles outside Python's lock
        compiled = dict(zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True))
    variables = {name: compiled[name, "init"](x) for name in modules}
    programs = {
        (name, kind): (program, variables[name]) for (name, kind), program in compiled.items() if kind != "init"
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for i in range(n + 1):
        for key, (compiled, variables) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled(variables, x))
            if i:  # the first call warms up
                times[key].append(time.perf_counter() - began)

    ms = {key: 1e3 * float(np.median(seconds)) for key, seconds in times.items()}
    found = {}
    for name in modules:
        forward, step = (name, "forward"), (name, "step")
        found[name] = Cost(parameters[name], flops[forward], flops[step], ms[forward], ms[step], n)
    return found


def _init(module: nn.Module, x: jax.Array) -> dict[str, Any]:
    variables = dict(module.init(jax.random.key(0), x))
    variables.pop("intermediates", None)
    return variables


def _forward(module: nn.Module) -> Callable[[Any, jax.Array], Any]:
    return lambda variables, x: module.apply(variables, x, train=False)


def _step(module: nn.Module) -> Callable[[Any, jax.Array], Any]:
    def loss(params: Any, x: jax.Array, rest: Any) -> tuple[jax.Array, Any]:
        rngs = {"dropout": jax.random.key(1)}
        y, new = module.apply(rest | {"params": params}, x, train=True, rngs=rngs, mutable=["batch_stats"])
        return jnp.square(y).mean(), new

    def step(variables: Any, x: jax.Array) -> Any:
        rest = {k: v for k, v in variables.items() if k != "params"}
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables.get("params", {}), x, rest)

    return step


def step_program(config: Config, model: Classifier, plan: StagePlan, variables: Any, loss: Loss = cross_entropy) -> Any:
    """The compiled train step of a stage on one device; nothing runs. `variables` may be shapes alone."""
    prepare()
    step, *shapes = _stage_step(config, model, plan, variables, loss)
    return step.lower(*shapes).compile()


def step_flops(config: Config, model: Classifier, plan: StagePlan, variables: Any) -> float:
    """FLOPs of a stage's train step, as `flops_of` counts them; nothing is compiled."""
    step, *shapes = _stage_step(config, model, plan, variables, cross_entropy)
    return flops_of(step, *shapes)


def _stage_step(config: Config, model: Classifier, plan: StagePlan, variables: Any, loss: Loss) -> tuple[Any, Any, Any]:
    """(step, shapes of its state, shapes of its batch)."""
    size, b = config.data.image_size, config.train.batch_size
    shapes = {"image": ((b, size, size, 3), np.uint8), "label": ((b,), np.int32), "position": ((b,), np.int32)}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    ema = config.train.ema_decay is not None
    state = jax.eval_shape(lambda v: create_state(v, plan.optimizer.tx, plan.is_trainable, seed=0, ema=ema), variables)
    return compile_stage(config, model, plan, Parallel("jit", (jax.devices()[0],)), loss), state, batch
