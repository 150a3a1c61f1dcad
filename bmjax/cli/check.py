"""`bmjax check`: whether a part of one's own honours its kind's contract."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Sequence
from typing import Any

KINDS = ("attention", "backbone", "head", "loss", "metric", "optimizer", "augmentation", "source", "callback")


def add_parser(verbs: Any) -> None:
    """Adds `check` to a parser's verbs."""
    p = verbs.add_parser(
        "check",
        help="check that a part of yours honours its contract",
        usage="bmjax check [KIND] NAME [options]",
        epilog="KIND is found by the part where it can be: by a function's first parameter (counts: loss, labels: "
        "metric, learning_rate: optimizer, image: augmentation, root: source, event: callback), by a module's fields "
        "(stages: backbone, num_classes: head), and is attention otherwise.",
    )
    p.set_defaults(run=run)
    p.add_argument("words", nargs="+", metavar="[KIND] NAME", help="a built-in name, a path.py, or module:name")
    p.add_argument("--kind", choices=KINDS, help="the kind of part")
    p.add_argument("--options", default="{}", help="the part's options as JSON, as in '{\"ratio\": 8}'")
    p.add_argument("--root", default="", help="source: where its images are; by default a few made-up ones")
    text = "attention: features to measure its cost on (default: 8 7 7 1024)"
    p.add_argument("--shape", type=int, nargs=4, default=(8, 7, 7, 1024), metavar=("B", "H", "W", "C"), help=text)


def _kind_and_name(options: argparse.Namespace) -> tuple[str | None, str]:
    """What was asked for.

    Raises:
      ValueError: more than a kind and a name, or two kinds.
    """
    from bmjax.registry import unknown

    *kinds, name = options.words
    if len(kinds) > 1:
        raise ValueError(f"{' '.join(options.words)!r} are {len(options.words)} words; expected [KIND] NAME")
    if kinds and kinds[0] not in KINDS:
        raise unknown("kind of part", kinds[0], KINDS)
    if kinds and options.kind not in (None, kinds[0]):
        raise ValueError(f"--kind is {options.kind!r}; expected {kinds[0]!r}, the kind before the name, or none")
    return (kinds[0] if kinds else options.kind), name


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """The contract, check by check, as they are reached; an attention variant's cost beside se and cbam. 1 if a check
    fails."""
    del rest
    if min(options.shape) < 1:
        raise ValueError(f"--shape is {options.shape}; expected four positive numbers")
    try:
        own_options = json.loads(options.options)
    except ValueError as e:
        raise ValueError(f"--options is {options.options!r}; expected JSON: {e}") from e
    if not isinstance(own_options, dict):
        raise ValueError(f"--options is {options.options!r}; expected a JSON object")
    kind, name = _kind_and_name(options)
    import jax

    from bmjax.analysis.contract.examine import kind_of, verdicts
    from bmjax.layers import prepare

    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 4)  # holds if nothing has been computed yet
    # What takes milliseconds to compile is kept too: there are a hundred such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    prepare()
    kind = kind or kind_of(name)
    if kind != "attention":
        print(f"{kind} {name}")
    failed, not_run, count = [], [], 0
    for v in verdicts(kind, name, own_options, options.root):
        lines = textwrap.wrap(v.text, 100, break_on_hyphens=False, break_long_words=False)
        print(f"{v.status:8} {v.name:14} " + f"\n{'':24}".join(lines), flush=True)
        count += 1
        failed += [v.name] * (v.status == "FAIL")
        not_run += [v.name] * (v.status == "not run")
    if failed:
        print(f"\n{name}: {len(failed)} of {count} checks failed: {', '.join(failed)}")
        return 1
    if not_run:
        print(f"\nnot shown here: {', '.join(not_run)}")
    if kind == "attention":
        from bmjax.cli.attention import print_costs

        print_costs(name, tuple(options.shape), own_options)
    else:
        print(f"\n{name}: all {count - len(not_run)} checks passed")
    return 0
