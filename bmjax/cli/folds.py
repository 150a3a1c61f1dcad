"""`bmjax folds`: repeated k-fold cross-validation of an experiment."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from typing import Any

from bmjax.cli.configured import add_configured, configuration


def add_parser(verbs: Any) -> None:
    """Adds `folds` to a parser's verbs."""
    p = add_configured(verbs, "folds", "train and test an experiment by repeated k-fold cross-validation", run)
    p.add_argument("--k", type=int, default=5, help="folds (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=1, metavar="N", help="repetitions, each by another split")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, _ = configuration(options, rest)
    from bmjax.analysis.evaluate.folds import groups_of, left_out, run_folds, text
    from bmjax.analysis.evaluate.scores import score
    from bmjax.analysis.evaluate.scores import text as scores_text

    found = run_folds(config, options.k, options.repeats)
    if found.interrupted:
        return 128 + signal.Signals[found.interrupted]
    print(text(found))
    every = left_out(found)
    print(f"\nall {len(every.labels)} images of the first repetition, each by the fold that left it out:")
    print(scores_text(score(every.labels, every.probs, every.classes, groups=groups_of(found, every))))
    return 0
