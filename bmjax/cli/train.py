"""`bmjax train`: trains an experiment and writes its report."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.cli.configured import add_configured, add_hosts, configuration
from bmjax.cli.output import metrics_line, print_confusion
from bmjax.config.base import Config

if TYPE_CHECKING:
    from bmjax.data.dataset import Dataset
    from bmjax.data.splits import Splits


def add_parser(verbs: Any) -> None:
    """Adds `train` to a parser's verbs."""
    p = add_configured(verbs, "train", "train an experiment", run)
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--profile", metavar="START:END", help="trace these steps, as --train.profile (10:15)")
    p.add_argument("--sweep", action="store_true", help=argparse.SUPPRESS)  # of older versions
    add_hosts(p)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.sweep:
        raise ValueError(f"--sweep has become a verb of its own; expected: bmjax sweep {options.experiment}")
    config, module = configuration(options, rest)
    if options.profile is not None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, profile=options.profile))
    from bmjax.analysis.evaluate.reference import keep_looks
    from bmjax.analysis.report.report import write_report
    from bmjax.runs.tracking import agents_run
    from bmjax.training import hosts
    from bmjax.training.run import train_run

    if (run_id := agents_run()) is not None:
        config, options.resume = _of_agent(config, run_id), True
    callbacks = [module.on_event] if module is not None and hasattr(module, "on_event") else []
    files = [Path(options.experiment)] if module is not None else []
    pages: list[Path] = []

    def finish(run_dir: Path, dataset: Dataset, splits: Splits) -> list[Path]:
        keep_looks(run_dir, dataset, splits)
        pages.append(write_report(run_dir, dataset.images))
        return pages

    result = train_run(config, resume=options.resume, callbacks=callbacks, files=files, finish=finish)
    if result.interrupted:
        return 128 + signal.Signals[result.interrupted]
    if not hosts.leads():
        return 0
    assert result.data is not None
    dataset, splits = result.data
    for split, m in result.metrics.items():
        print(metrics_line(split, m))
    if "test" in result.metrics:
        print_confusion(result.metrics["test"]["confusion"], dataset.classes)
    if module is not None and hasattr(module, "report"):
        module.report(result)
    if not pages:  # finished before, or without any split to report on
        finish(result.run_dir, dataset, splits)
    print(f"report: {pages[0]}")
    return 0


def _of_agent(config: Config, run_id: str) -> Config:
    """The configuration of a run that an agent of a W&B sweep has started: in a folder of its own, which the agent's
    restart of the same run finds again."""
    from bmjax.runs.folder import run_folder

    folder = str(run_folder(config) / run_id)
    return dataclasses.replace(config, name=f"{config.name}-{run_id}", run_dir=folder)
