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
from bmjax.layers.dispatch import prepare
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


def measure(modules: dict[str, nn.Module], shape: tuple[int, int, int, int], n: int = 30) -> dict[str, Cost]:
    """Costs by name, of features [b, h, w, c]. The modules take turns, so that load falls on all alike."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    shapes = {name: jax.eval_shape(lambda x, m=module: _init(m, x), x) for name, module in modules.items()}
    parameters = {name: count_parameters(tree.get("params", {})) for name, tree in shapes.items()}
    lowered: dict[tuple[str, str], Any] = {}
    for name, module in modules.items():
        lowered[name, "init"] = jax.jit(lambda x, m=module: _init(m, x)).lower(x)
        lowered[name, "forward"] = jax.jit(_forward(module)).lower(shapes[name], x)
        lowered[name, "step"] = jax.jit(_step(module)).lower(shapes[name], x)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles outside Python's lock
        compiled = dict(zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True))
    variables = {name: compiled[name, "init"](x) for name in modules}
    programs: dict[tuple[str, str], tuple[Any, Any, float]] = {}
    for (name, kind), program in compiled.items():
        if kind != "init":
            analysis = program.cost_analysis()
            counted = float("nan") if analysis is None else analysis.get("flops", 0.0)  # XLA names no count of zero
            programs[name, kind] = program, variables[name], float(counted)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for i in range(n + 1):
        for key, (compiled, variables, _) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled(variables, x))
            if i:  # the first call warms up
                times[key].append(time.perf_counter() - began)

    flops = {key: flops for key, (_, _, flops) in programs.items()}
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
    size, b = config.data.image_size, config.train.batch_size
    shapes = {"image": ((b, size, size, 3), np.uint8), "label": ((b,), np.int32), "position": ((b,), np.int32)}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    ema = config.train.ema_decay is not None
    state = jax.eval_shape(lambda v: create_state(v, plan.optimizer.tx, plan.is_trainable, seed=0, ema=ema), variables)
    parallel = Parallel("jit", (jax.devices()[0],))
    return compile_stage(config, model, plan, parallel, loss).lower(state, batch).compile()
