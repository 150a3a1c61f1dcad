"""What the command line says of attention variants: their papers, options and costs."""

from __future__ import annotations

import functools
import re
from typing import Any

_COST_NOTE = "A step is forward and all gradients, in training mode; FLOPs are those that XLA counts."


def print_costs(variant: str, shape: tuple[int, int, int, int], options: dict[str, Any] | None = None) -> None:
    """A variant's parameters, FLOPs and times beside those of se and cbam, on features [b, h, w, c]."""
    import jax

    from bmjax.analysis.cost import measure
    from bmjax.attention import create_attention

    names = list(dict.fromkeys([variant, "se", "cbam"]))
    made = {name: create_attention(name, **(options or {}) if name == variant else {}) for name in names}
    costs = measure(made, shape)
    n = costs[variant].n
    print(f"\nOn float32 features {list(shape)}, {jax.devices()[0].device_kind}; times are medians of n = {n} calls.")
    width = max(len(name) for name in names) + 2
    heads = ("parameters", "MFLOP forward", "ms forward", "MFLOP step", "ms step")
    print("".ljust(width) + "".join(h.rjust(15) for h in heads))
    for name, c in costs.items():
        row = (f"{c.parameters:,}", f"{c.forward_flops / 1e6:,.4g}", f"{c.forward_ms:.3f}",
               f"{c.step_flops / 1e6:,.4g}", f"{c.step_ms:.3f}")  # fmt: skip
        print(name.ljust(width) + "".join(v.rjust(15) for v in row))
    print(_COST_NOTE)


def first_lines() -> dict[str, str]:
    """Variant -> the first line of its file: what it is, and its paper."""
    from bmjax.attention import list_attention
    from bmjax.registry import modules

    files = modules("bmjax.attention")
    return {name: (files[name].__doc__ or "").strip().split("\n")[0] for name in list_attention()}


def print_table(shape: tuple[int, int, int, int] = (8, 7, 7, 1024)) -> None:
    """Every variant as a row of Markdown: its paper, options, map and cost on features [b, h, w, c]."""
    import dataclasses

    import jax
    import numpy as np

    from bmjax.analysis.cost import measure
    from bmjax.attention import create_attention

    texts = first_lines()
    variants = {name: create_attention(name) for name in texts}
    costs = measure(variants, shape)
    n = next(iter(costs.values())).n
    print(f"On float32 features {list(shape)}, {jax.devices()[0].device_kind}; ms are medians of n = {n} calls.\n")
    print("| variant | what it is | options | map over | parameters | MFLOP forward | ms forward | ms step |")
    print("|---|---|---|---|---|---|---|---|")
    x = np.zeros(shape, np.float32)
    for name, module in variants.items():
        fields = [f for f in dataclasses.fields(module) if f.name not in ("parent", "name", "dtype")]
        options = ", ".join(f"`{f.name}={getattr(module, f.name)!r}`" for f in fields)
        variables = jax.eval_shape(functools.partial(module.init, mutable=True), jax.random.key(0), x)
        ranks = sorted({leaf.ndim for leaf in jax.tree.leaves(variables.get("intermediates", {}))})
        maps = " and ".join({2: "channels", 3: "places"}[rank] for rank in ranks)
        text = re.sub(r", (https://\S+)\)\.$", r", [link](\1))", texts[name]).rstrip(".")
        c = costs[name]
        row = (name, text, options, maps, f"{c.parameters:,}", f"{c.forward_flops / 1e6:,.4g}",
               f"{c.forward_ms:.3f}", f"{c.step_ms:.3f}")  # fmt: skip
        print("| " + " | ".join(row) + " |")
    print(f"\n{_COST_NOTE}")
