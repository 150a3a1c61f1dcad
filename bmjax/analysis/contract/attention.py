"""The contract of an attention variant: [b, h, w, c] -> [b, h, w, c], its map sown."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.analysis.contract import modules
from bmjax.analysis.contract.modules import shapes
from bmjax.analysis.contract.subject import BATCH, MODES, Subject, init_keys
from bmjax.analysis.contract.verdict import Contract, Verdict, first_line, say, unequal
from bmjax.attention import commutes_with_pooling

SIZES = ((1, 1), (1, 5), (8, 8))
"""Further heights and widths."""


class _Variant(Subject):
    def finite_at(self) -> list[tuple[tuple[int, ...], str]]:
        # A single place has no deviation.
        return super().finite_at() + [((1, 1), "float32")] * (sizes(self) is None)


def call(s: Subject) -> str | None:
    """Takes features [b, h, w, c] and the keyword `train`, in both modes, in float32 and bfloat16."""
    return modules.one_array(s, ("float32", "bfloat16"), "Maps are sown, not returned.")


def sizes(s: Subject) -> str | None:
    """Takes any height and width, with the same variables."""
    hint = "Look for a parameter or constant whose shape has h or w in it, or a pool larger than the map."
    for h, w in SIZES:
        x = jax.ShapeDtypeStruct(s.shape((h, w)), jnp.float32)
        try:
            for train in MODES.values():
                s.abstract((h, w), "float32", train)
            found = jax.eval_shape(lambda x: s.module.init(init_keys(), x), x)
        except Exception as e:
            return say(f"features of {h}x{w} places raised {first_line(e)}", "any size from 1x1 on", hint)
        if shapes(found) != shapes(s.initial):
            return say(f"made for {h}x{w} places it has other variables than for 5x7", "the same", hint)
    return None


def shape(s: Subject) -> str | None:
    """Returns the shape it was given."""
    for size in SIZES if sizes(s) is None else ():
        if message := _shape_at(s, size):
            return message
    return _shape_at(s, s.size)


def _shape_at(s: Subject, size: tuple[int, ...]) -> str | None:
    for mode, train in MODES.items():
        given, got = s.shape(size), s.abstract(size, "float32", train)["y"].shape
        if got != given:
            hint = "Look at strides, padding and axes; swapped h and w stay hidden where images are square."
            return say(f"{mode}: features {list(given)} became {list(got)}", "the same shape", hint)
    return None


def sown_map(s: Subject) -> str | None:
    """Sows its map, [b, h, w] over places or [b, c] over channels, 0..1."""
    wanted = ((BATCH, *s.size), (BATCH, s.channels))
    cases = {"random": (s.variables, s.features()), "huge": (s.variables, s.huge * s.features())}
    cases["bfloat16"] = (s.variables, s.features(dtype="bfloat16"))
    for kind, (given, x) in cases.items():
        for mode, out in s.program(given, x).items():
            if not out["maps"]:
                return say(f"{mode}: no map was sown", "one", 'Add self.sow("intermediates", "map", m) to __call__.')
            for m in out["maps"].values():
                if m.shape not in wanted:
                    hint = "A mean over the axes that are too many makes one; `bmjax explain` draws it."
                    return say(f"{mode}: the map is {list(m.shape)}", " or ".join(map(str, map(list, wanted))), hint)
                low, high = float(jnp.nanmin(m)), float(jnp.nanmax(m))
                if not 0 <= low <= high <= 1:
                    hint = "Sow what comes after the sigmoid or softmax, not what goes in."
                    return say(f"{mode}, {kind} features: the map is {low:.3g} to {high:.3g}", "0 to 1", hint)
    return None


def pooling(s: Subject) -> str | None:
    """Pools as it says: with `commutes_with_pooling`, its result's means are its result for the means, within 1e-5."""
    if not commutes_with_pooling(s.module):
        return None
    means = jnp.mean(s.features(), (1, 2), keepdims=True)
    for mode, out in s.program(s.variables, means).items():
        whole = {"result": jnp.mean(s.usual[mode]["y"], (1, 2), keepdims=True)}
        if differs := unequal({"result": out["y"]}, whole, s.tolerance):
            hint = "Leave commutes_with_pooling out: only gates over channels that come from the means alone have it."
            return say(f"{mode}: pooled before and after it differ in {differs}", "at most 1e-05", hint)
    return None


CONTRACT = Contract(
    "attention",
    _Variant,
    (
        modules.made, call, sizes, modules.variables, shape, modules.dtype, sown_map, modules.finite,
        modules.gradients, modules.deterministic, modules.statistics, modules.leak, modules.eager_is_jit,
        modules.retrace, pooling, modules.devices,
    ),
    basis=("made", "call"),
    needs=modules.NEEDS,
)  # fmt: skip
CHECKS = CONTRACT.names


def examine(make: Callable[[], nn.Module]) -> list[Verdict]:
    """Every check of the contract, in order, of the module that `make` makes."""
    return list(CONTRACT.verdicts(make))
