"""The contract of a head: a Flax module of (num_classes, **options), features [b, c] -> logits [b, k]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.analysis.contract import modules
from bmjax.analysis.contract.subject import BATCH, MODES, Subject, init_keys
from bmjax.analysis.contract.verdict import Contract, say
from bmjax.registry import missing_keywords

CLASSES = 5


class _Head(Subject):
    """A head; `part` makes it for a number of classes. It is given pooled features, float32 at least."""

    size = ()
    channels = 32
    dtypes = ("float32", "float64")

    def __init__(self, part: Callable[[int], Any]):
        super().__init__(lambda: part(CLASSES))
        self.part = part


def call(s: _Head) -> str | None:
    """Takes features [b, c] and the keyword `train`, in both modes."""
    if missing_keywords(type(s.module).__call__, ["train"]):
        hint = "def __call__(self, x, *, train=False)"
        return say("__call__ takes no train", "the keyword, which switches dropout and batch-norm", hint)
    return modules.one_array(s, ("float32",), "Logits alone; probabilities are computed from them.")


def shape(s: _Head) -> str | None:
    """Gives logits [b, k], for any number of classes and of channels."""
    for k in (2, CLASSES):
        for c in (8, s.channels):
            module: nn.Module = s.part(k)
            x = jnp.zeros((BATCH, c))
            for mode, train in MODES.items():
                rngs = {"dropout": jax.random.key(0)}
                got: Any = jax.eval_shape(
                    lambda x, m=module, t=train, r=rngs: m.init_with_output(init_keys() | r, x, train=t)[0], x
                )
                if got.shape != (BATCH, k):
                    seen = f"{mode}: features {[BATCH, c]} became {list(got.shape)} for {k} classes"
                    return say(seen, f"logits {[BATCH, k]}", "The last layer is nn.Dense(self.num_classes).")
    return None


CONTRACT = Contract(
    "head",
    _Head,
    (
        modules.made, call, shape, modules.variables, modules.dtype, modules.finite, modules.gradients,
        modules.deterministic, modules.statistics, modules.leak, modules.eager_is_jit, modules.retrace,
        modules.devices,
    ),
    basis=("made", "call"),
    needs=modules.NEEDS,
)  # fmt: skip
