"""The verbs for those who write attention variants: `bmjax new attention` and `bmjax check`."""

from __future__ import annotations

import argparse
import functools
import keyword
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COST_NOTE = "A step is forward and all gradients, in training mode; FLOPs are those that XLA counts."

_TEMPLATE = '''"""{title}: say in one line what it attends to, and where it is from (authors, year, link)."""

from __future__ import annotations

import flax.linen as nn
import jax
from einops import rearrange, reduce

from bmjax.layers import Conv, global_average


class {class_name}(nn.Module):
    """y = x * channels * places: a gate for each channel, and one for each place."""

    # Fields are options: each with a type and a default, set by --model.attention-options. Tuples, no lists.
    ratio: int = 16
    """The hidden layer of the gate over channels has c / ratio channels, at least one."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate over places [b, h, w], 0..1."""
        c = x.shape[-1]

        # Channels: what is there? global_average sums in float32 also where x is bfloat16, so it is cast back.
        z = global_average(x).astype(x.dtype)
        z = nn.relu(nn.Dense(max(1, c // self.ratio), dtype=x.dtype, name="reduce")(z))
        channels = nn.sigmoid(nn.Dense(c, dtype=x.dtype, name="expand")(z))

        # Places: where is it? A 1x1 convolution fits any height and width; Conv computes in the type of x.
        places = nn.sigmoid(Conv(1, use_bias=True, name="places")(x))

        # What `bmjax explain` draws: [b, h, w] over places or [b, c] over channels, after the sigmoid.
        self.sow("intermediates", "map", reduce(places, "b h w 1 -> b h w", "sum"))

        # Use bmjax.layers.BatchNorm and Dropout, and pass `train` on to them: they are equal on any number of devices.
        return x * rearrange(channels, "b c -> b 1 1 c") * places
'''


def add_parser(verbs: Any) -> None:
    """Adds `new` and `check` to a parser's verbs."""
    p = verbs.add_parser("new", help="write a starting file")
    p.set_defaults(run=new)
    p.add_argument("kind", choices=("attention",))
    p.add_argument("name", help="the variant's name, and the file's")
    p.add_argument("--out", help="folder of the file; by default bmjax/attention, where the name alone finds it")
    p = verbs.add_parser("check", help="check that an attention variant honours the contract, and what it costs")
    p.set_defaults(run=check)
    p.add_argument(
        "variant", help="a name that `bmjax list attention` prints, the path of a .py, or package.module:Class"
    )
    text = "features to measure on (default: 8 7 7 1024)"
    p.add_argument("--shape", type=int, nargs=4, default=(8, 7, 7, 1024), metavar=("B", "H", "W", "C"), help=text)


def new(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes a variant that passes its check, to be changed.

    Raises:
      ValueError: the name can't be a module's.
      FileExistsError: there is such a file already.
    """
    del rest
    name = options.name
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_") or name != name.lower():
        raise ValueError(f"name is {name!r}; expected a Python module's: lower-case letters, digits and underscores")
    folder = Path(options.out) if options.out else Path(__file__).parents[1] / "attention"
    if not folder.is_dir():
        raise FileNotFoundError(f"--out is {options.out!r}; there is no such folder")
    words = name.split("_")
    text = _TEMPLATE.format(title=" ".join(words).capitalize(), class_name="".join(w.capitalize() for w in words))
    path = folder / f"{name}.py"
    with path.open("x") as f:
        f.write(text)
    known_as = str(path) if options.out else name
    print(f"{path}\nnext: bmjax check {known_as}\nthen: bmjax train EXPERIMENT --model.attention {known_as}")
    return 0


def check(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """The contract, check by check, then the cost beside se and cbam; 1 if a check fails."""
    del rest
    if min(options.shape) < 1:
        raise ValueError(f"--shape is {options.shape}; expected four positive numbers")
    import jax

    from bmjax.analysis.contract.checks import examine
    from bmjax.attention import create_attention

    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 4)  # holds if nothing has been computed yet
    make = functools.partial(create_attention, options.variant)
    try:
        make()
    except (ValueError, OSError):  # there is no such variant
        raise
    except Exception:  # the contract says what is wrong with it
        pass
    verdicts = examine(make)
    for v in verdicts:
        lines = textwrap.wrap(v.text, 100, break_on_hyphens=False, break_long_words=False)
        print(f"{v.status:8} {v.name:14} " + f"\n{'':24}".join(lines))
    failed = [v.name for v in verdicts if v.status == "FAIL"]
    if failed:
        print(f"\n{options.variant}: {len(failed)} of {len(verdicts)} checks failed: {', '.join(failed)}")
        return 1
    if not_run := [v.name for v in verdicts if v.status == "not run"]:
        print(f"\nnot shown here: {', '.join(not_run)}")
    _print_costs(options.variant, tuple(options.shape))
    return 0


def _print_costs(variant: str, shape: tuple[int, int, int, int]) -> None:
    import jax

    from bmjax.analysis.cost import measure
    from bmjax.attention import create_attention

    names = list(dict.fromkeys([variant, "se", "cbam"]))
    costs = measure({name: create_attention(name) for name in names}, shape)
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
