"""The contract of an attention variant: named checks that say what was seen, what was expected, where to look."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.analysis.contract.subject import BATCH, CHANNELS, MODES, SIZE, SIZES, Subject, Tree, as_dtype, init_keys
from bmjax.attention import commutes_with_pooling
from bmjax.training.parallel import Parallel

CONSTANTS = (0.0, 1.0, -300.0, 1e4)
HUGE = 1e4
_LEAST_GRADIENT = 1e-6


class NotRun(Exception):
    """A check can't be made here; says why."""


def _say(seen: str, expected: str, hint: str) -> str:
    return f"{seen}; expected {expected}. {hint}"


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    """(path joined by slashes, leaf), in order."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(str(getattr(k, "key", k)) for k in path), leaf) for path, leaf in flat]


def _unequal(a: Tree, b: Tree, tolerance: float = 0.0) -> str | None:
    """The first leaf in which two trees differ by more than tolerance * (1 + |b|), and by how much."""
    theirs = dict(_leaves(b))
    for path, leaf in _leaves(a):
        one, two = np.asarray(leaf, np.float64), np.asarray(theirs[path], np.float64)
        if not np.allclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"{path.split('/')[0]} by up to {np.nanmax(np.abs(one - two)):.3g}"
    return None


def made(s: Subject) -> str | None:
    """Made without options, hashable, and equal to another made alike."""
    if not isinstance(s.module, nn.Module):
        return _say(f"made {s.module!r}", "a Flax module", "The file holds one public class, a flax.linen.Module.")
    try:
        hash(s.module)
    except TypeError as e:
        return _say(
            f"hash(module) raised {_first_line(e)}",
            "a hashable module",
            "Use tuples as fields, never lists, dicts or arrays.",
        )
    if s.module != s.make():
        return _say("two modules made alike are unequal", "equal ones", "Is a field's default made anew each time?")
    return None


def call(s: Subject) -> str | None:
    """Takes features [b, h, w, c] and the keyword `train`, in both modes, in float32 and bfloat16."""
    for dtype in ("float32", "bfloat16"):
        for mode, train in MODES.items():
            y = s.abstract(SIZE, dtype, train)["y"]
            if not hasattr(y, "shape"):
                return _say(f"{mode} returned a {type(y).__name__}", "one array", "Maps are sown, not returned.")
    return None


def sizes(s: Subject) -> str | None:
    """Takes any height and width, with the same variables."""
    hint = "Look for a parameter or constant whose shape has h or w in it, or a pool larger than the map."
    for h, w in SIZES:
        x = jax.ShapeDtypeStruct((BATCH, h, w, CHANNELS), jnp.float32)
        try:
            for train in MODES.values():
                s.abstract((h, w), "float32", train)
            found = jax.eval_shape(lambda x: s.module.init(init_keys(), x), x)
        except Exception as e:
            return _say(f"features of {h}x{w} places raised {_first_line(e)}", "any size from 1x1 on", hint)
        if _shapes(found) != _shapes(s.initial):
            return _say(f"made for {h}x{w} places it has other variables than for 5x7", "the same", hint)
    return None


def _shapes(variables: Tree) -> dict[str, Any]:
    return {p: (v.shape, v.dtype) for p, v in _leaves({k: t for k, t in variables.items() if k != "intermediates"})}


def variables(s: Subject) -> str | None:
    """Keeps float32 `params` and `batch_stats` and nothing else, the same in both modes."""
    if extra := sorted(set(s.initial) - {"params", "batch_stats"}):
        seen = f"it keeps variables in {', '.join(map(repr, extra))}"
        return _say(
            seen, "none but params and batch_stats", "A checkpoint stores no others, so a resume would lose them."
        )
    for path, leaf in _leaves(s.initial):
        if leaf.dtype != jnp.float32:
            return _say(f"{path} is {leaf.dtype}", "float32", "Parameters stay float32; cast them where they are used.")
    in_training = jax.eval_shape(lambda x: s.module.init(init_keys(), x, train=True), s.features())
    if _shapes(in_training) != _shapes(s.initial):
        return _say("made with train=True it has other variables", "the same", "Make every layer in both modes.")
    return None


def shape(s: Subject) -> str | None:
    """Returns the shape it was given."""
    for h, w in SIZES if sizes(s) is None else ():
        if message := _shape_at(s, (h, w)):
            return message
    return _shape_at(s, SIZE)


def _shape_at(s: Subject, size: tuple[int, int]) -> str | None:
    for mode, train in MODES.items():
        given, got = (BATCH, *size, CHANNELS), s.abstract(size, "float32", train)["y"].shape
        if got != given:
            hint = "Look at strides, padding and axes; swapped h and w stay hidden where images are square."
            return _say(f"{mode}: features {list(given)} became {list(got)}", "the same shape", hint)
    return None


def dtype(s: Subject) -> str | None:
    """Returns the type it was given: float32, bfloat16, and float64, in which runs on many devices are proven equal."""
    for name in ("float32", "bfloat16", "float64"):
        with jax.enable_x64(name == "float64"):
            for mode, train in MODES.items():
                got = s.abstract(SIZE, name, train)["y"].dtype
                if got != jnp.dtype(name):
                    hint = (
                        "Make layers with dtype=x.dtype, and cast what was computed in float32 back: .astype(x.dtype)."
                    )
                    return _say(f"{mode}: {name} features became {got}", name, hint)
    return None


def sown_map(s: Subject) -> str | None:
    """Sows its map, [b, h, w] over places or [b, c] over channels, 0..1."""
    wanted = ((BATCH, *SIZE), (BATCH, CHANNELS))
    cases = {"random": (s.variables, s.features()), "huge": (s.variables, HUGE * s.features())}
    cases["bfloat16"] = (s.variables, s.features(dtype="bfloat16"))
    for kind, (given, x) in cases.items():
        for mode, out in s.program(given, x).items():
            if not out["maps"]:
                hint = 'Add self.sow("intermediates", "map", m) to __call__.'
                return _say(f"{mode}: no map was sown", "one", hint)
            for m in out["maps"].values():
                if m.shape not in wanted:
                    hint = "A mean over the axes that are too many makes one; `bmjax explain` draws it."
                    return _say(f"{mode}: the map is {list(m.shape)}", " or ".join(map(str, map(list, wanted))), hint)
                low, high = float(jnp.nanmin(m)), float(jnp.nanmax(m))
                if not 0 <= low <= high <= 1:
                    hint = "Sow what comes after the sigmoid or softmax, not what goes in."
                    return _say(f"{mode}, {kind} features: the map is {low:.3g} to {high:.3g}", "0 to 1", hint)
    return None


def finite(s: Subject) -> str | None:
    """No NaN and no infinity, in results or gradients, on random, constant and huge input, in float32 and bfloat16."""
    kinds = [(SIZE, "float32"), (SIZE, "bfloat16")] + [((1, 1), "float32")] * (sizes(s) is None)
    hint = "Look for a division, root or logarithm at zero: add epsilon within, compute in at_least_float32(x.dtype)."
    for size, kind in kinds:
        inputs = {f"all {v:g}": jnp.full((BATCH, *size, CHANNELS), v, jnp.dtype(kind)) for v in CONSTANTS}
        inputs["random"], inputs["huge"] = s.features(size, kind), HUGE * s.features(size, kind)
        for what, x in inputs.items():
            for mode, out in s.program(s.variables, x).items():
                for path, leaf in _leaves(out):
                    if not np.isfinite(np.asarray(leaf, np.float64)).all():
                        where = f"{kind} features of {size[0]}x{size[1]} places, {what}: {path.rstrip('/')}"
                        return _say(f"{mode}, {where} is not finite", "finite numbers", hint)
    return None


def gradients(s: Subject) -> str | None:
    """A gradient reaches every parameter, and the input of every sample."""
    out = s.usual["training"]
    dead = [path for path, g in _leaves(out["gradients"]) if np.abs(g).max() < _LEAST_GRADIENT]
    if dead:
        hint = "Is the layer's result used? Look for a stop_gradient, a rounding, a factor 0, or a bias that cancels."
        return _say(f"no gradient at {', '.join(dead)}", "one at every parameter", hint)
    if not (np.abs(np.asarray(out["input gradient"])).max((1, 2, 3)) > 0).all():
        return _say(
            "no gradient at the input", "one", "The backbone before it could not train: is x used, or constants?"
        )
    return None


def deterministic(s: Subject) -> str | None:
    """The same input gives the same result at each call; in evaluation mode whatever the dropout's key."""
    for mode, train in MODES.items():
        again = s.apply(s.variables, s.features(), train, dropout=1 if train else 2)
        if differs := _unequal(s.eager[mode], again):
            hint = "Look for a variable outside the module that each call changes, NumPy's random numbers, or dropout "
            hint += "that ignores `train`. What must be kept goes into batch_stats."
            return _say(f"{mode}: two calls with one input differ in {differs}", "the same result", hint)
    return None


def statistics(s: Subject) -> str | None:
    """Evaluation mode moves no running statistics."""
    if differs := _unequal({"batch_stats": s.usual["evaluation"]["stats"]}, {"batch_stats": _stats(s.variables)}):
        return _say(f"evaluation moved {differs}", "statistics that stay", "Pass `train` on to each batch-norm.")
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
    if differs := _unequal(before, after):
        return _say(f"another first sample changed the others' {differs}", "no change", hint)
    alone = jax.jit(functools.partial(s.apply, train=False))(s.variables, x[1:2])["y"]
    if differs := _unequal({"result": alone}, {"result": s.usual["evaluation"]["y"][1:2]}, 1e-5):
        return _say(f"a sample alone and the same in a batch of {BATCH} differ in {differs}", "no difference", hint)
    return None


def eager_is_jit(s: Subject) -> str | None:
    """Gives the same with and without jit, within 1e-5."""
    for mode in MODES:
        jitted = {name: s.usual[mode][name] for name in ("y", "maps", "stats")}
        if differs := _unequal(s.eager[mode], jitted, 1e-5):
            hint = "Look for Python code that acts on the kind of array, or a global that is read while tracing."
            return _say(f"{mode}: with jit differs from without in {differs}", "at most 1e-05", hint)
    return None


def retrace(s: Subject) -> str | None:
    """A second call, with the statistics that the first returned, is not compiled anew."""
    first = s.usual["training"]["stats"]
    before = s.traces
    s.program(s.variables | ({"batch_stats": first} if first else {}), s.features(seed=3))
    if s.traces == before:
        return None
    types = {p: jax.typeof(v) for p, v in _leaves(_stats(s.variables))}
    changed = [f"{p} {types.get(p)} -> {jax.typeof(v)}" for p, v in _leaves(first) if jax.typeof(v) != types.get(p)]
    seen = f"the second training step was compiled anew: {', '.join(changed) or 'nothing it was given had changed'}"
    return _say(seen, "one program", "Statistics must come back in the shape and type in which they were given.")


def pooling(s: Subject) -> str | None:
    """Pools as it says: with `commutes_with_pooling`, its result's means are its result for the means, within 1e-5."""
    if not commutes_with_pooling(s.module):
        return None
    means = jnp.mean(s.features(), (1, 2), keepdims=True)
    for mode, out in s.program(s.variables, means).items():
        whole = {"result": jnp.mean(s.usual[mode]["y"], (1, 2), keepdims=True)}
        if differs := _unequal({"result": out["y"]}, whole, 1e-5):
            hint = "Leave commutes_with_pooling out: only gates over channels that come from the means alone have it."
            return _say(f"{mode}: pooled before and after it differ in {differs}", "at most 1e-05", hint)
    return None


def devices(s: Subject) -> str | None:
    """Four devices give what one gives, in float64 within 1e-10, under jit and under pmap."""
    try:
        four = tuple(jax.devices("cpu")[:BATCH])
    except RuntimeError:
        four = ()
    if len(four) < BATCH:
        raise NotRun(f"needs {BATCH} CPU devices, {len(four)} here; set JAX_PLATFORMS to include cpu and XLA_FLAGS to "
                     f"--xla_force_host_platform_device_count={BATCH}")  # fmt: skip

    def step(variables: Tree, batch: dict[str, jax.Array]) -> Any:
        outs = {mode: s.apply(variables, batch["x"], train) for mode, train in MODES.items()}
        return {m: out["stats"] for m, out in outs.items()}, {m: out["y"] for m, out in outs.items()}

    results = []
    with jax.enable_x64(True):
        given = as_dtype(s.variables, "float64")
        x = np.random.default_rng(2).standard_normal((BATCH, *SIZE, CHANNELS))
        kinds: tuple[tuple[Literal["jit", "pmap"], int], ...] = (("jit", 1), ("jit", BATCH), ("pmap", BATCH))
        for kind, count in kinds:
            parallel = Parallel(kind, four[:count])
            stats, y = parallel.compile_step(step, donate=False)(
                parallel.to_devices(given), parallel.put_batch({"x": x})
            )
            results.append({"result": parallel.batch_to_host(y), "statistics": parallel.to_host(stats)})
    for (kind, _), result in zip(kinds[1:], results[1:], strict=True):
        if differs := _unequal(result, results[0], 1e-10):
            hint = (
                "Use bmjax.layers.BatchNorm and Dropout, and all_sum for sums over the batch; cast to no fixed float32."
            )
            return _say(f"four devices under {kind} and one differ in {differs}", "at most 1e-10", hint)
    return None


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    f.__name__: f
    for f in (
        made, call, sizes, variables, shape, dtype, sown_map, finite, gradients, deterministic, statistics, leak,
        eager_is_jit, retrace, pooling, devices,
    )
}  # fmt: skip
# What makes no sense where another check fails: the cause is said once.
_NEEDS = dict.fromkeys(CHECKS, ("made", "call")) | {
    "made": (),
    "call": ("made",),
    "eager_is_jit": ("made", "call", "deterministic"),
    "leak": ("made", "call", "deterministic"),
    "devices": ("made", "call", "dtype", "deterministic", "leak"),
}


class Verdict(NamedTuple):
    """Of one check. `text` is what the check demands, or why it failed or was not run."""

    name: str
    status: Literal["ok", "FAIL", "not run"]
    text: str


def examine(make: Callable[[], nn.Module]) -> list[Verdict]:
    """Every check of the contract, in order, of the module that `make` makes."""
    subject, verdicts = Subject(make), dict[str, Verdict]()
    for name, check in CHECKS.items():
        demand = (check.__doc__ or "").strip()
        if missing := [n for n in _NEEDS[name] if verdicts[n].status != "ok"]:
            verdicts[name] = Verdict(name, "not run", f"needs {missing[0]}")
            continue
        try:
            with jax.default_matmul_precision("highest"):  # GPUs and TPUs would compare roundings
                message = check(subject)
            verdicts[name] = Verdict(name, "FAIL" if message else "ok", message or demand)
        except NotRun as e:
            verdicts[name] = Verdict(name, "not run", str(e))
        except Exception as e:  # a variant may raise anything
            verdicts[name] = Verdict(name, "FAIL", _raised(e, make, demand))
    return list(verdicts.values())


def _first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"


def _raised(e: BaseException, make: Callable[[], nn.Module], demand: str) -> str:
    """The error, and the last line of the variant's own file that led to it."""
    try:
        own = inspect.getsourcefile(type(make()))
    except Exception:  # it can't even be made
        own = None
    lines = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == own]
    where = f" at {lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else ""
    return _say(f"raised {_first_line(e)}{where}", "no error", f"Demanded: {demand}")
