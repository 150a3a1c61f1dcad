"""The verb `bmjax compare`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence

from bmjax.experiment import load_experiment, override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options to a parser that takes an experiment."""
    parser.add_argument("--variants", nargs="+", required=True, metavar="NAME", help="attention variants")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs a variant, from the experiment's seed")
    parser.add_argument("--baseline", default="none", help="variant that the others are held against (default: none)")
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="runs at a time on cached features (default: one a device, on CPUs two)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cached", dest="cached", action="store_true", default=None, help="train on cached features")
    where.add_argument("--end-to-end", dest="cached", action="store_false", help="train from the images")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, _ = load_experiment(options.experiment)
    config = override(config, rest, f"bmjax compare {options.experiment}")
    if options.cached is not None:
        features = dataclasses.replace(config.features, cached=options.cached)
        config = dataclasses.replace(config, features=features)
    from bmjax.compare import compare, markdown

    logging.getLogger("bmjax.loop").setLevel(logging.WARNING)  # one line a run, not one an epoch
    comparison = compare(config, options.variants, options.seeds, options.baseline, options.at_once)
    if comparison is None:
        return 130
    print(markdown(comparison))
    return 0
