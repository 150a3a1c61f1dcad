"""`bmjax compare`: attention variants on equal terms."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from bmjax.cli.configured import add_configured, add_hosts, configuration


def add_parser(verbs: Any) -> None:
    """Adds `compare` to a parser's verbs."""
    p = add_configured(verbs, "compare", "train attention variants on equal terms and compare them", run)
    p.add_argument("--variants", nargs="+", metavar="NAME", help="attention variants")
    p.add_argument("--seeds", type=int, default=5, metavar="N", help="runs a variant, from the experiment's seed")
    p.add_argument("--baseline", default="none", help="variant that the others are held against (default: none)")
    p.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="runs at a time on cached features (default: one a device, on CPUs two)",
    )
    add_hosts(p)
    where = p.add_mutually_exclusive_group()
    where.add_argument("--cached", dest="cached", action="store_true", default=None, help="train on cached features")
    where.add_argument("--end-to-end", dest="cached", action="store_false", help="train from the images")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if not options.variants:
        raise ValueError("compare: expected --variants with the names of attention variants")
    config, _ = configuration(options, rest)
    if options.cached is not None:
        features = dataclasses.replace(config.features, cached=options.cached)
        config = dataclasses.replace(config, features=features)
    from bmjax.analysis.compare.compare import compare, markdown

    # A line a run, not one an epoch.
    training = logging.getLogger("bmjax.training")
    level = training.level
    training.setLevel(logging.WARNING)
    try:
        comparison = compare(config, options.variants, options.seeds, options.baseline, options.at_once)
    finally:
        training.setLevel(level)
    print(markdown(comparison))
    return 0
