"""`bmjax compare`: attention variants on equal terms."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from bmjax.cli.configured import add_configured, add_hosts, configuration

log = logging.getLogger(__name__)


def add_parser(verbs: Any) -> None:
    """Adds `compare` to a parser's verbs."""
    p = add_configured(verbs, "compare", "train attention variants on equal terms and compare them", run)
    p.add_argument("--variants", nargs="+", metavar="NAME", help="attention variants")
    p.add_argument("--seeds", type=int, metavar="N", help="runs a variant, from the experiment's seed (default: 5)")
    p.add_argument("--baseline", default="none", help="variant that the others are held against (default: none)")
    p.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="runs at a time on cached features (default: one a device, on CPUs two)",
    )
    p.add_argument(
        "--attach", nargs="+", metavar="STAGES", help="places of attention to compare, as in --attach last conv4,last"
    )
    p.add_argument(
        "--folds", type=int, default=0, metavar="K", help="cross-validation: each seed is trained once for each fold"
    )
    p.add_argument(
        "--tune", type=int, default=0, metavar="N", help="each variant has the best of N learning rates on validation"
    )
    p.add_argument(
        "--until-shown",
        type=float,
        metavar="POINTS",
        help="add seeds until each difference is shown or is less than so many points",
    )
    p.add_argument("--max-seeds", type=int, default=20, metavar="N", help="seeds in all with --until-shown")
    add_hosts(p)
    where = p.add_mutually_exclusive_group()
    where.add_argument("--cached", dest="cached", action="store_true", default=None, help="train on cached features")
    where.add_argument("--end-to-end", dest="cached", action="store_false", help="train from the images")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if not options.variants:
        raise ValueError("compare: expected --variants with the names of attention variants")
    if options.seeds is not None and options.until_shown is not None:
        raise ValueError(f"--seeds is {options.seeds}; expected none with --until-shown, which begins with three")
    log.info("compare: reading %s", options.experiment)
    config, _ = configuration(options, rest)
    if options.cached is not None:
        features = dataclasses.replace(config.features, cached=options.cached)
        config = dataclasses.replace(config, features=features)
    from bmjax.analysis.compare.compare import compare, markdown
    from bmjax.analysis.compare.design import Design

    design = Design(
        attach=tuple(tuple(stages.split(",")) for stages in options.attach or ()),
        folds=options.folds,
        tune=options.tune,
        wanted=None if options.until_shown is None else options.until_shown / 100,
        max_seeds=options.max_seeds,
    )
    # A line a run, not one an epoch.
    training = logging.getLogger("bmjax.training")
    level = training.level
    training.setLevel(logging.WARNING)
    seeds = 5 if options.seeds is None else options.seeds
    try:
        comparison = compare(config, options.variants, seeds, options.baseline, options.at_once, design)
    finally:
        training.setLevel(level)
    print(markdown(comparison))
    return 0
