"""Optimizers by optax: the study's five and Adam, schedules, decay, clipping and rates by depth.

Each has two presets. `keras` holds Keras 3's defaults. `tuned` is ours: rates at which the optimizers are on a
comparable footing, since at Keras's defaults AdaDelta moves weights hundreds of times less than the others and a
table at defaults compares learning rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from bmjax.config.training import OptimConfig, ScheduleConfig
from bmjax.registry import is_own, load_own

Tree = Any
Path = tuple[str, ...]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "adagrad": {"keras": {"lr": 1e-3}, "tuned": {"lr": 1e-2}},
    "adadelta": {"keras": {"lr": 1e-3}, "tuned": {"lr": 1.0}},
    "adamax": {"keras": {"lr": 1e-3}, "tuned": {"lr": 2e-3}},
    "rmsprop": {"keras": {"lr": 1e-3}, "tuned": {"lr": 3e-4}},
    "sgd": {"keras": {"lr": 1e-2}, "tuned": {"lr": 1e-2, "momentum": 0.9, "nesterov": True}},
    "adam": {"keras": {"lr": 1e-3}, "tuned": {"lr": 1e-3}},
    # Keras's AdamW also decays by 0.004; here decay is a field of its own, for every optimizer.
    "adamw": {"keras": {"lr": 1e-3}, "tuned": {"lr": 1e-3}},
}


def _rescale(config: OptimConfig, lr: float, momentum: float, nesterov: bool) -> optax.GradientTransformation:
    """The update of an optimizer at a constant rate, sign included; schedules multiply it afterwards.

    One of optax or of the user's is made by (learning_rate, **options).

    A rate inside a momentum buffer (as in Keras) and one outside are the same while it is constant. Under a schedule
    optax's order holds here: the buffer has gradients, the rate of the day multiplies all of it. For Keras's order
    `make_optimizer` asks for no momentum here and adds its own buffer.
    """
    # The epsilons and accumulators are Keras 3's; each equality is tested against Keras.
    build: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adagrad": lambda: optax.adagrad(lr, initial_accumulator_value=0.1, eps=1e-7),
        # Always with a rate: optax.adadelta() without one climbs.
        "adadelta": lambda: optax.adadelta(lr, rho=0.95, eps=1e-7),
        "adamax": lambda: optax.adamax(lr, eps=1e-7),
        "rmsprop": lambda: optax.rmsprop(lr, decay=0.9, eps=1e-7, momentum=momentum or None),
        "sgd": lambda: optax.sgd(lr, momentum=momentum or None, nesterov=nesterov),
        "adam": lambda: optax.adam(lr, eps=1e-7),
        "adamw": lambda: optax.adam(lr, eps=1e-7),
    }
    if not is_own(config.name):
        return build[config.name]()
    make = load_own("optimizer", config.name, callable, "a function of (learning_rate, **options)")
    try:
        tx = make(lr, **config.options)
    except TypeError as e:
        raise ValueError(f"optimizer {config.name!r} can't be made with options {config.options!r}: {e}") from e
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"optimizer {config.name!r} gives {tx!r}; expected an optax.GradientTransformation")
    return tx


def _rate_goes_inside(config: OptimConfig, momentum: float) -> bool:
    """Whether the momentum buffer is to hold updates that have their step's rate already, as Keras's does."""
    varies = config.schedule.kind != "constant" or config.schedule.warmup_epochs > 0
    return config.preset == "keras" and config.name in ("sgd", "rmsprop") and momentum > 0 and varies


class RateState(NamedTuple):
    """State of the schedule: completed updates of this stage, and the plateau's record."""

    count: jax.Array
    plateau_scale: jax.Array
    best: jax.Array
    epochs_since_best: jax.Array


class BufferedRateState(NamedTuple):
    """State of the schedule with Keras's momentum: `trace` holds updates that each have the rate of their step."""

    rate: RateState
    trace: Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`tx` acts on the tree of trainable parameters; `multiplier(step)` is the schedule's factor, 0..1.

    `schedule` is the configuration it follows; of kind `plateau`, `update_plateau` lowers the rate.
    """

    tx: optax.GradientTransformation
    peak_lr: float
    multiplier: Callable[[Any], Any]
    schedule: ScheduleConfig

    def rates_at(self, opt_state: Tree | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """Learning rates by steps of the stage, an array at once; with a plateau's verdict in `opt_state`, if given."""
        scale = self.peak_lr * (1.0 if opt_state is None else float(_rate_state(opt_state).plateau_scale))
        return lambda steps: np.broadcast_to(scale * np.asarray(self.multiplier(steps), np.float64), steps.shape)


def resolve(config: OptimConfig) -> dict[str, Any]:
    """lr, momentum, nesterov: the preset's numbers, overridden by those that are set.

    Raises:
      ValueError: momentum for an optimizer that has none, or out of range; options of a built-in one; no rate of
        one that has no preset.
    """
    numbers = {"lr": None, "momentum": 0.0, "nesterov": False} | PRESETS.get(config.name, {}).get(config.preset, {})
    given = {name: getattr(config, name) for name in ("lr", "momentum", "nesterov")}
    numbers |= {name: value for name, value in given.items() if value is not None}
    if config.momentum is not None and config.name not in ("sgd", "rmsprop"):
        raise ValueError(
            f"config field 'optim.momentum' is {config.momentum}; {config.name!r} has none, expected unset"
        )
    if config.nesterov is not None and config.name != "sgd":
        raise ValueError(f"config field 'optim.nesterov' is {config.nesterov}; expected unset for {config.name!r}")
    if config.options and not is_own(config.name):
        raise ValueError(f"config field 'optim.options' is {config.options!r}; expected {{}} for {config.name!r}")
    if numbers["lr"] is None:
        raise ValueError(f"config field 'optim.lr' is None; expected a number, for {config.name!r} has no preset")
    if not 0 <= numbers["momentum"] < 1:
        raise ValueError(f"config field 'optim.momentum' is {numbers['momentum']}; expected 0..1, 1 excluded")
    return numbers


def schedule(config: ScheduleConfig, total_steps: int, steps_per_epoch: int) -> Callable[[Any], Any]:
    """Step of the stage (0-based) -> multiplier 0..1: linear warm-up, then the schedule over the remaining steps."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    rest = max(total_steps - warmup, 1)
    if config.kind == "cosine":
        after = optax.cosine_decay_schedule(1.0, rest, alpha=config.final)
    elif config.kind == "step":
        every = max(1, round(config.step_epochs * steps_per_epoch))
        drops = dict.fromkeys(range(every, rest + 1, every), config.factor)
        after = optax.piecewise_constant_schedule(1.0, drops)
    else:
        after = optax.constant_schedule(1.0)
    if not warmup:
        return after
    # The first update already moves: step 0 has 1/warmup of the peak.
    ramp = optax.linear_schedule(1.0 / warmup, 1.0, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def decays(path: Path, leaf: Any) -> bool:
    """Whether weight decay applies: not to biases, norms, or anything one-dimensional."""
    return leaf.ndim > 1 and path[-1] not in ("bias", "scale")


def make_optimizer(
    config: OptimConfig,
    *,
    lr_scale: float = 1.0,
    total_steps: int,
    steps_per_epoch: int,
    stages: Sequence[str] = (),
    stage_of: Callable[[Path], str | None] | None = None,
) -> Optimizer:
    """The optimizer of one stage of training, on a nested dict of trainable parameters.

    In order: clip by the global norm, the optimizer's rescaling, decoupled weight decay, the multiplier of the
    layer's depth, the schedule. `stage_of(path)` gives the backbone's stage of a leaf, or None. Under the preset
    `keras` a momentum comes after the schedule, and the decay, with the rate of its own step, after the momentum.

    Raises:
      ValueError: a field doesn't fit the optimizer.
    """
    numbers = resolve(config)
    peak = numbers["lr"] * lr_scale
    multiplier = schedule(config.schedule, total_steps, steps_per_epoch)

    def depth_multiplier(path: Path) -> float:
        stage = stage_of(path) if stage_of and config.layer_decay != 1 else None
        return 1.0 if stage is None else config.layer_decay ** (len(stages) - 1 - list(stages).index(stage))

    inside = _rate_goes_inside(config, numbers["momentum"])
    buffer = optax.trace(numbers["momentum"], numbers["nesterov"]) if inside else optax.identity()

    def init(params: Tree) -> RateState | BufferedRateState:
        zero = jnp.zeros((), jnp.int32)
        state = RateState(zero, jnp.ones(()), jnp.asarray(math.inf, jnp.float32), zero)
        return BufferedRateState(state, buffer.init(params)) if inside else state

    def scale(updates: Tree, state: RateState, params: Tree | None, decay: float) -> Tree:
        """The updates, less the decay, times the rate of this step and the depth's multiplier."""
        flat_params = traverse_util.flatten_dict(params)
        rate = multiplier(state.count) * state.plateau_scale

        def one(path: Path, u: jax.Array) -> jax.Array:
            if decay and decays(path, u):
                u = u - peak * decay * flat_params[path]
            return u * jnp.asarray(rate * depth_multiplier(path), u.dtype)

        flat: dict[Path, Any] = dict(traverse_util.flatten_dict(updates))
        return traverse_util.unflatten_dict({path: one(path, u) for path, u in flat.items()})

    def update(updates: Tree, state: Any, params: Tree | None = None):
        if not inside:
            return scale(updates, state, params, config.weight_decay), state._replace(count=state.count + 1)
        rate = state.rate
        moved, trace = buffer.update(scale(updates, rate, params, 0.0), state.trace)
        if config.weight_decay:
            shrunk = scale(jax.tree.map(jnp.zeros_like, moved), rate, params, config.weight_decay)
            moved = jax.tree.map(jnp.add, moved, shrunk)
        return moved, BufferedRateState(rate._replace(count=rate.count + 1), trace)

    rescale = _rescale(config, peak, 0.0 if inside else numbers["momentum"], numbers["nesterov"] and not inside)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    rate = optax.GradientTransformation(init, update)  # type: ignore[arg-type]
    return Optimizer(optax.chain(*clip, rescale, rate), peak, multiplier, config.schedule)


def _is_rate_state(node: Any) -> bool:
    return isinstance(node, RateState)


def _rate_state(opt_state: Tree) -> RateState:
    return next(filter(_is_rate_state, jax.tree.leaves(opt_state, is_leaf=_is_rate_state)))


def update_plateau(optimizer: Optimizer, opt_state: Tree, value: float) -> Tree:
    """The state after an epoch whose validation loss was `value`; unchanged unless the schedule is `plateau`.

    After `patience` epochs without a new best the rate is multiplied by `factor`, and the count starts again.
    """
    if optimizer.schedule.kind != "plateau":
        return opt_state

    def advance(s: Any) -> Any:
        if not _is_rate_state(s):
            return s
        rounded = float(np.float32(value))  # as the best so far is kept, so that an equal loss is no improvement
        better = rounded < float(s.best)
        waited = 0 if better else int(s.epochs_since_best) + 1
        drop = waited >= optimizer.schedule.patience
        return s._replace(
            best=jnp.asarray(min(rounded, float(s.best)), jnp.float32),
            epochs_since_best=jnp.asarray(0 if drop else waited, jnp.int32),
            plateau_scale=s.plateau_scale
            * jnp.asarray(optimizer.schedule.factor if drop else 1.0, s.plateau_scale.dtype),
        )

    return jax.tree.map(advance, opt_state, is_leaf=_is_rate_state)
