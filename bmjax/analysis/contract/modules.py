"""The checks that attention variants, heads and backbones share: what any Flax module of a classifier must honour."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.analysis.contract.subject import BATCH, MODES, Subject, as_dtype, init_keys
from bmjax.analysis.contract.verdict import NotRun, Tree, first_line, leaves, not_finite, say, unequal
from bmjax.training.parallel import Parallel

_LEAST_GRADIENT = 1e-6
NEEDS = {
    "eager_is_jit": ("deterministic",),
    "leak": ("deterministic",),
    "devices": ("dtype", "deterministic", "leak"),
}


def made(s: Subject) -> str | None:
    """Made without options, hashable, and equal to another made alike."""
    if not isinstance(s.module, nn.Module):
        return say(f"made {s.module!r}", "a Flax module", "The file holds one public class, a flax.linen.Module.")
    try:
        hash(s.module)
    except TypeError as e:
        return say(
            f"hash(module) raised {first_line(e)}",
            "a hashable module",
            "Use tuples as fields, never lists, dicts or arrays.",
        )
    if s.module != s.make():
        return say("two modules made alike are unequal", "equal ones", "Is a field's default built again each time?")
    return None


def one_array(s: Subject, dtypes: Sequence[str], hint: str) -> str | None:
    """A message where a call does not give one array."""
    for dtype in dtypes:
        for mode, train in MODES.items():
            y = s.abstract(s.size, dtype, train)["y"]
            if not hasattr(y, "shape"):
                return say(f"{mode} returned a {type(y).__name__}", "one array", hint)
    return None


def shapes(variables: Tree) -> dict[str, Any]:
    """Path -> (shape, type) of all variables but what was sown."""
    return {p: (v.shape, v.dtype) for p, v in leaves({k: t for k, t in variables.items() if k != "intermediates"})}


def variables(s: Subject) -> str | None:
    """Keeps float32 `params` and `batch_stats` and nothing else, the same in both modes."""
    if extra := sorted(set(s.initial) - {"params", "batch_stats"}):
        seen = f"it keeps variables in {', '.join(map(repr, extra))}"
        hint = "A checkpoint stores no others, so a resume would lose them."
        return say(seen, "none but params and batch_stats", hint)
    for path, leaf in leaves(s.initial):
        if leaf.dtype != jnp.float32:
            return say(f"{path} is {leaf.dtype}", "float32", "Parameters stay float32; cast them where they are used.")
    in_training = jax.eval_shape(lambda x: s.module.init(init_keys(), x, train=True), s.features())
    if shapes(in_training) != shapes(s.initial):
        return say("made with train=True it has other variables", "the same", "Make every layer in both modes.")
    return None


def dtype(s: Subject) -> str | None:
    """Returns the type it was given: float32, bfloat16, and float64, in which runs on many devices are proven equal."""
    for name in s.dtypes:
        with jax.enable_x64(name == "float64"):
            for mode, train in MODES.items():
                got = s.abstract(s.size, name, train)["y"].dtype
                if got != jnp.dtype(name):
                    hint = (
                        "Make layers with dtype=x.dtype, and cast what was computed in float32 back: .astype(x.dtype)."
                    )
                    return say(f"{mode}: {name} {s.word} became {got}", name, hint)
    return None


def finite(s: Subject) -> str | None:
    """No NaN and no infinity, in results or gradients, on random, constant and huge input."""
    hint = "Look for a division, root or logarithm at zero: add epsilon within, compute in at_least_float32(x.dtype)."
    for size, kind in s.finite_at():
        inputs = {f"all {v:g}": jnp.full(s.shape(size), v, jnp.dtype(kind)) for v in s.constants}
        inputs["random"], inputs["huge"] = s.features(size, kind), s.huge * s.features(size, kind)
        for what, x in inputs.items():
            for mode, out in s.program(s.variables, x).items():
                if path := not_finite(out):
                    where = f"{s.described(size, kind)}, {what}: {path}"
                    return say(f"{mode}, {where} is not finite", "finite numbers", hint)
    return None


def gradients(s: Subject) -> str | None:
    """A gradient reaches every parameter, and the input of every sample."""
    return gradients_in(s.usual["training"])


def gradients_in(out: dict[str, Any], least: float = _LEAST_GRADIENT) -> str | None:
    """`gradients`, of what `Subject.with_gradients` gave."""
    dead = [path for path, g in leaves(out["gradients"]) if np.abs(g).max() < least]
    if dead:
        hint = "Is the layer's result used? Look for a stop_gradient, a rounding, a factor 0, or a bias that cancels."
        return say(f"no gradient at {', '.join(dead)}", "one at every parameter", hint)
    of_input = np.abs(np.asarray(out["input gradient"])).reshape(BATCH, -1)
    if not (of_input.max(1) > 0).all():
        hint = "The backbone before it could not train: is x used, or constants?"
        return say("no gradient at the input", "one", hint)
    return None


def deterministic(s: Subject) -> str | None:
    """The same input gives the same result at each call; in evaluation mode whatever the dropout's key."""
    for mode, train in MODES.items():
        again = s.apply(s.variables, s.features(), train, dropout=1 if train else 2)
        if differs := unequal(s.eager[mode], again):
            hint = "Look for a variable outside the module that each call changes, NumPy's random numbers, or dropout "
            hint += "that ignores `train`. What must be kept goes into batch_stats."
            return say(f"{mode}: two calls with one input differ in {differs}", "the same result", hint)
    return None


def statistics(s: Subject) -> str | None:
    """Evaluation mode moves no running statistics."""
    if differs := unequal({"batch_stats": s.usual["evaluation"]["stats"]}, {"batch_stats": _stats(s.variables)}):
        return say(f"evaluation moved {differs}", "statistics that stay", "Pass `train` on to each batch-norm.")
    return None


def _stats(variables: Tree) -> Tree:
    return variables.get("batch_stats", {})


def leak(s: Subject) -> str | None:
    """In evaluation mode a sample's result depends on that sample alone."""
    x = s.features()
    changed = s.program(s.variables, x.at[0].set(17 * s.features(seed=9)[0]))["evaluation"]
    pick = {"result": "y", "map": "maps"}
    before, after = (
        {name: jax.tree.map(lambda v: v[1:], out[key]) for name, key in pick.items()}
        for out in (s.usual["evaluation"], changed)
    )
    hint = "Look for a mean, softmax or norm over axis 0, the batch; in evaluation use running statistics."
    if differs := unequal(before, after):
        return say(f"another first sample changed the others' {differs}", "no change", hint)
    alone, whole = _one_and_all(s)
    if differs := unequal({"result": alone}, {"result": whole[1:2]}, s.tolerance):
        return say(f"a sample alone and the same in a batch of {BATCH} differ in {differs}", "no difference", hint)
    return None


def _one_and_all(s: Subject) -> tuple[jax.Array, jax.Array]:
    """Results in evaluation mode for the second sample alone, and for the whole batch. In float64: another batch is
    another program, and a softmax of large scores enlarges float32's other roundings to more than the tolerance."""

    def both(variables: Tree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return s.apply(variables, x[1:2], train=False)["y"], s.apply(variables, x, train=False)["y"]

    with jax.enable_x64(True):
        return jax.jit(both)(as_dtype(s.variables, "float64"), s.features(dtype="float64"))


def eager_is_jit(s: Subject) -> str | None:
    """Gives the same with and without jit, within 1e-5 (a backbone 1e-4)."""
    for mode in MODES:
        jitted = {name: s.usual[mode][name] for name in ("y", "maps", "stats")}
        if differs := unequal(s.eager[mode], jitted, s.tolerance):
            hint = "Look for Python code that acts on the kind of array, or a global that is read while tracing."
            return say(f"{mode}: with jit differs from without in {differs}", f"at most {s.tolerance:g}", hint)
    return None


def retrace(s: Subject) -> str | None:
    """A second call, with the statistics that the first returned, is not compiled again."""
    first = s.usual["training"]["stats"]
    before = s.traces
    s.program(s.variables | ({"batch_stats": first} if first else {}), s.features(seed=3))
    if s.traces == before:
        return None
    types = {p: jax.typeof(v) for p, v in leaves(_stats(s.variables))}
    changed = [f"{p} {types.get(p)} -> {jax.typeof(v)}" for p, v in leaves(first) if jax.typeof(v) != types.get(p)]
    seen = f"the second training step was compiled again: {', '.join(changed) or 'nothing it was given had changed'}"
    return say(seen, "one program", "Statistics must come back in the shape and type in which they were given.")


def devices(s: Subject) -> str | None:
    """Four devices give what one gives, in float64 within 1e-10, under jit and under pmap."""

    def step(variables: Tree, batch: dict[str, jax.Array]) -> Any:
        outs = {mode: s.apply(variables, batch["x"], train) for mode, train in MODES.items()}
        return {m: out["stats"] for m, out in outs.items()}, {m: out["y"] for m, out in outs.items()}

    return devices_differ(s, step, "result", "statistics")


def devices_differ(s: Subject, step: Any, per_image: str, shared: str, tolerance: float = 1e-10) -> str | None:
    """A message where step(variables, {"x"}) -> (equal on every device, arrays [b, ...]) depends on how many devices
    run it; the two are called `shared` and `per_image`."""
    try:
        four = tuple(jax.devices("cpu")[:BATCH])
    except RuntimeError:
        four = ()
    if len(four) < BATCH:
        raise NotRun(f"needs {BATCH} CPU devices, {len(four)} here; set JAX_PLATFORMS to include cpu and XLA_FLAGS to "
                     f"--xla_force_host_platform_device_count={BATCH}")  # fmt: skip
    with jax.enable_x64(True):
        given = as_dtype(s.variables, "float64")
        x = np.asarray(s.features(dtype="float64", seed=2))
    kinds: tuple[tuple[Literal["jit", "pmap"], int], ...] = (("jit", 1), ("jit", BATCH), ("pmap", BATCH))

    def on(kind: tuple[Literal["jit", "pmap"], int]) -> dict[str, Any]:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):  # of this thread
            parallel = Parallel(kind[0], four[: kind[1]])
            compiled = parallel.compile_step(step, donate=False)
            same, y = compiled(parallel.to_devices(given), parallel.put_batch({"x": x}))
            return {per_image: parallel.batch_to_host(y), shared: parallel.to_host(same)}

    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:  # XLA compiles outside Python's lock
        results = list(pool.map(on, kinds))
    for (kind, _), result in zip(kinds[1:], results[1:], strict=True):
        if differs := unequal(result, results[0], tolerance):
            hint = (
                "Use bmjax.layers.BatchNorm and Dropout, and all_sum for sums over the batch; cast to no fixed float32."
            )
            return say(f"four devices under {kind} and one differ in {differs}", f"at most {tolerance:g}", hint)
    return None
