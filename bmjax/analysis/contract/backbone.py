"""The contract of a backbone: images [b, h, w, 3] -> a feature map [b, h, w, c], `tap` called after each stage."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.analysis.contract import modules
from bmjax.analysis.contract.subject import BATCH, Subject, init_keys
from bmjax.analysis.contract.verdict import Contract, Tree, first_line, leaves, say, unequal
from bmjax.backbones._registry import fault_of
from bmjax.layers.collectives import all_sum

SIZES = ((96, 96), (80, 80))
"""Further heights and widths; images are square, and their size is the configuration's."""
_LEAST_GRADIENT = 1e-8
_FROZEN = ("stats_frozen", "frozen")


class _Backbone(Subject):
    word, unit = "images", "pixels"
    size = (64, 64)
    channels = 3
    constants = (0.0, 1.0, 255.0)
    huge = 1e3
    tolerance = 1e-4  # a whole network's
    mode = "train"

    def keywords(self, x: jax.Array) -> dict[str, Any]:
        return {"mode": self.mode, "tap": lambda stage, x: x}

    def apply(self, variables: Tree, x: jax.Array, train: bool, dropout: int = 1) -> dict[str, Any]:
        module = self.module
        if any(field.name == "dtype" for field in dataclasses.fields(module)):
            module = module.clone(dtype=x.dtype)  # as `train.dtype` does
        mutable = [k for k in self.initial if k != "params"]
        rngs = {"dropout": jax.random.key(dropout)}
        keywords = self.keywords(x) | {"train": train, "rngs": rngs, "mutable": mutable}
        y, new = module.apply(variables, x, **keywords)
        return {"y": y, "maps": {}, "stats": dict(new).get("batch_stats", {})}

    def with_gradients(self, variables: Tree, x: jax.Array, train: bool) -> dict[str, Any]:
        # Those in evaluation would be compiled for nothing: nothing trains in it.
        return super().with_gradients(variables, x, train) if train else self.apply(variables, x, train)

    @functools.cached_property
    def variables(self) -> Tree:
        """The initial ones, with noise on what is begun as zero or one: more would grow from layer to layer."""
        r = np.random.default_rng(1)

        def leaf(v: jax.Array) -> jax.Array:
            noise = jnp.asarray(0.1 * np.abs(r.standard_normal(v.shape)), v.dtype)
            return v + noise if v.ndim < 2 else v

        return jax.tree.map(leaf, self.initial)

    @functools.cached_property
    def frozen(self) -> dict[str, Any]:
        """Results and gradients in training by mode of the norms, of those that leave the statistics."""

        def run(variables: Tree, x: jax.Array) -> dict[str, Any]:
            found = {}
            for mode in _FROZEN:
                other = type(self)(self.make)
                other.mode, other.initial = mode, self.initial
                found[mode] = other.with_gradients(variables, x, True)
            return found

        return jax.jit(run)(self.variables, self.features())


def stages(s: _Backbone) -> str | None:
    """Names its stages, and takes the keywords train, mode and tap."""
    if fault := fault_of(s.module):
        seen, _, expected = fault.partition("; expected ")
        return say(f"it {seen}", expected, "A field or property `stages`: ('stem', 'stage1', ...).")
    return None


def call(s: _Backbone) -> str | None:
    """Takes images [b, h, w, 3] in both modes, and gives a feature map [b, h, w, c]."""
    if message := modules.one_array(s, ("float32",), "The feature map alone, before pooling."):
        return message
    got = s.abstract(s.size, "float32", False)["y"].shape
    if len(got) != 4 or got[0] != BATCH:
        hint = "Leave pooling and the classifier out; a transformer's tokens go back to their places."
        return say(f"images {list(s.shape())} became {list(got)}", f"a map [{BATCH}, h, w, c]", hint)
    return None


def taps(s: _Backbone) -> str | None:
    """Calls tap(stage, x) once after each stage, in order, with maps [b, h, w, c], the last of which it returns."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def tap(stage: str, x: jax.Array) -> jax.Array:
        seen.append((stage, x.shape))
        return x

    given = {"train": False, "mode": "train", "tap": tap}
    out: Any = jax.eval_shape(lambda v, x: s.module.apply(v, x, **given), s.variables, s.features())
    named = tuple(s.module.stages)  # type: ignore[attr-defined]
    if tuple(stage for stage, _ in seen) != named:
        found = ", ".join(stage for stage, _ in seen) or "nothing"
        return say(f"tap was called for {found}", ", ".join(named), "x = tap(name, x) after each stage.")
    for stage, shape in seen:
        if len(shape) != 4 or shape[0] != BATCH:
            hint = "Attention stands there: give it a map over places, not tokens."
            return say(f"tap({stage!r}) was given {list(shape)}", f"a map [{BATCH}, h, w, c]", hint)
    if seen[-1][1] != out.shape:
        hint = "What comes after the last tap (a norm, a convolution) goes before it: attention is the last."
        return say(f"it returned {list(out.shape)}, the last tap {list(seen[-1][1])}", "the same map", hint)
    return None


def goes_on(s: _Backbone) -> str | None:
    """What a tap returns replaces the stage's output."""
    names = tuple(s.module.stages)  # type: ignore[attr-defined]

    def change(x: jax.Array) -> jax.Array:
        # Without symmetry, so that no norm takes it away.
        return jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * (1 + jnp.abs(x).mean())

    @jax.jit
    def run(factors: jax.Array) -> Any:
        def tap(stage: str, x: jax.Array) -> jax.Array:
            return x + factors[names.index(stage)] * change(x)

        return s.module.apply(s.variables, s.features(), train=False, mode="train", tap=tap)

    zeros = jnp.zeros(len(names))
    plain = run(zeros)
    hint = "x = tap(name, x): use what it returns, and nothing of before it."
    for i, stage in enumerate(names):
        if not np.abs(run(zeros.at[i].set(1.0)) - plain).max() > 1e-6 * np.abs(plain).max():
            return say(f"a change at {stage!r} does not reach the output", "another output", hint)
    if unequal({"y": run(zeros.at[-1].set(1.0))}, {"y": plain + change(plain)}, 1e-4):
        return say("what the last tap returned was changed afterwards", "the output itself", hint)
    return None


def sizes(s: _Backbone) -> str | None:
    """Can be made for other image sizes."""
    for size in SIZES:
        x = jax.ShapeDtypeStruct(s.shape(size), jnp.float32)
        try:
            got: Any = jax.eval_shape(lambda x: s.module.init_with_output(init_keys(), x)[0], x)
        except Exception as e:
            hint = "Take h and w from x.shape, also for embeddings of places: data.image_size decides them."
            return say(f"images of {size[0]}x{size[1]} pixels raised {first_line(e)}", "any size from 64 on", hint)
        if len(got.shape) != 4:
            return say(f"images of {size[0]}x{size[1]} pixels became {list(got.shape)}", "a map [b, h, w, c]", "")
    return None


def bfloat16(s: _Backbone) -> str | None:
    """In bfloat16 it gives nearly what it gives in float32: within a tenth of the largest value."""
    wide = np.asarray(s.usual["evaluation"]["y"], np.float64)
    half = np.asarray(s.program(s.variables, s.features(dtype="bfloat16"))["evaluation"]["y"], np.float64)
    worst = np.abs(half - wide).max() / np.abs(wide).max()
    if not worst < 0.1:
        hint = "Compute means, norms and softmax in at_least_float32(x.dtype)."
        return say(f"bfloat16 differs by {worst:.2g} of the largest value", "less than 0.1", hint)
    return None


def gradients(s: _Backbone) -> str | None:
    """A gradient reaches every parameter, and the input of every image."""
    # By the stored statistics: those of the batch take a bias before them away, and with it its gradient.
    return modules.gradients_in(s.frozen["stats_frozen"], _LEAST_GRADIENT)


def frozen(s: _Backbone) -> str | None:
    """Mode `stats_frozen` moves no running statistics in training; `frozen` neither, and its norms get no gradient."""
    stats = s.variables.get("batch_stats", {})
    hint = "Pass `mode` on to each bmjax.layers.BatchNorm: norm(x, train=train, mode=mode)."
    for mode in _FROZEN:
        if differs := unequal({"batch_stats": s.frozen[mode]["stats"]}, {"batch_stats": stats}):
            return say(f"mode {mode!r} moved {differs}", "statistics that stay", hint)
    norms = {path.rpartition("/")[0] for path, _ in leaves(stats)}
    for path, g in leaves(s.frozen["frozen"]["gradients"]):
        if path.rpartition("/")[0] in norms and np.abs(g).max() > 0:
            return say(f"mode 'frozen' gave {path} a gradient", "none to a norm's scale and bias", hint)
    return None


def deterministic(s: _Backbone) -> str | None:
    """In evaluation mode the same images give the same map, whatever the dropout's key."""
    plain = s.usual["evaluation"]["y"]
    again = jax.jit(functools.partial(s.apply, train=False, dropout=2))(s.variables, s.features())["y"]
    if differs := unequal({"map": again}, {"map": plain}, s.tolerance):
        hint = "Look for dropout that ignores `train`, or a variable outside the module that each call changes."
        return say(f"two calls with one input differ in {differs}", "the same map", hint)
    return None


def devices(s: _Backbone) -> str | None:
    """A training step's gradients and statistics on four devices are those on one, in float64 within 1e-9, under jit
    and under pmap."""

    def step(variables: Tree, batch: dict[str, jax.Array]) -> Any:
        rest = {k: v for k, v in variables.items() if k != "params"}

        def loss(params: Tree) -> Any:
            out = s.apply(rest | {"params": params}, batch["x"], True)
            y = out["y"]
            weights = jnp.cos(jnp.arange(y.size // len(y), dtype=y.dtype)).reshape(1, *y.shape[1:])
            return (jnp.sin(y) * weights).mean((1, 2, 3)).sum(), out

        grads, out = jax.grad(loss, has_aux=True)(variables["params"])
        evaluated = s.apply(variables, batch["x"], False)
        return {"gradients": all_sum(grads), "stats": out["stats"]}, {
            "training": out["y"],
            "evaluation": evaluated["y"],
        }

    return modules.devices_differ(s, step, "map", "gradients or statistics", 1e-9)


CONTRACT = Contract(
    "backbone",
    _Backbone,
    (
        modules.made, stages, call, taps, modules.variables, sizes, modules.dtype, goes_on, deterministic,
        modules.leak, modules.statistics, gradients, frozen, modules.finite, bfloat16, modules.retrace, devices,
    ),
    basis=("made", "stages", "call"),
    needs={"leak": ("deterministic",), "devices": ("dtype", "deterministic"), "bfloat16": ("dtype",)},
)  # fmt: skip
