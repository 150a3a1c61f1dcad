"""`bmjax list`: what there is by name."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from bmjax.cli.attention import first_lines, print_table
from bmjax.cli.weights import record_lines


def add_parser(verbs: Any) -> None:
    """Adds `list` to a parser's verbs."""
    p = verbs.add_parser("list", help="list what there is by name")
    p.add_argument("kind", nargs="?", choices=("attention", "backbones", "optimizers", "weights"))
    p.add_argument("--cost", action="store_true", help="attention: a table with options, maps, FLOPs, measured time")
    p.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    if options.cost:
        if options.kind != "attention":
            raise ValueError(f"--cost is for `bmjax list attention`; the kind is {options.kind!r}")
        print_table()
        return 0

    def attention() -> list[str]:
        return [f"{name:20} {text}" for name, text in first_lines().items()]

    def backbones() -> list[str]:
        from bmjax.backbones import list_backbones
        from bmjax.weights.catalog import RECORDS

        known = {r.backbone for r in RECORDS}
        return [f"{name:20} {'imagenet weights' if name in known else ''}".rstrip() for name in list_backbones()]

    def optimizers() -> list[str]:
        from bmjax.training.optim import PRESETS

        def preset(numbers: dict[str, Any]) -> str:
            return ", ".join(f"{key} {value}" for key, value in numbers.items())

        return [f"{name:20} keras: {preset(p['keras'])}; tuned: {preset(p['tuned'])}" for name, p in PRESETS.items()]

    kinds: dict[str, Callable[[], list[str]]] = {
        "attention": attention,
        "backbones": backbones,
        "optimizers": optimizers,
        "weights": record_lines,
    }
    if options.kind is None:
        for kind, lines in kinds.items():
            found = list(dict.fromkeys(line.split()[0] for line in lines() if not line.startswith(" ")))
            print(f"{kind} ({len(found)}):")
            print(textwrap.fill(", ".join(found), 100, initial_indent="  ", subsequent_indent="  "))
        print("more on each: bmjax list KIND")
        return 0
    print(f"{options.kind}:")
    print(*(f"  {line}" for line in kinds[options.kind]()), sep="\n")
    return 0
