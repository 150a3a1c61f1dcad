"""`bmjax study report`: the published study's tables and pictures on one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds `study` to a parser's verbs."""
    p = verbs.add_parser("study", help="the published study, as experiments/study/ runs it")
    actions = p.add_subparsers(dest="action", required=True)
    report = actions.add_parser("report", help="write its tables and pictures as one page, and as Markdown")
    report.add_argument("folder", help="the study's folder, --out of experiments/study/run.py")
    report.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from bmjax.analysis.study.page import write_study

    for path in write_study(options.folder):
        print(path)
    return 0
