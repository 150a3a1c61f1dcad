"""`bmjax train`: trains an experiment and writes its report."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bmjax.cli.configured import add_configured, add_hosts, configuration
from bmjax.cli.output import metrics_line, print_confusion
from bmjax.config.base import Config
from bmjax.config.experiment import sweep


def add_parser(verbs: Any) -> None:
    """Adds `train` to a parser's verbs."""
    p = add_configured(verbs, "train", "train an experiment", run)
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--sweep", action="store_true", help="run each of the experiment's sweep()")
    add_hosts(p)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, module = configuration(options, rest)
    configs = sweep(config, module, options.experiment) if options.sweep else [config]
    for i, one in enumerate(configs, 1):
        if len(configs) > 1:
            print(f"run {i} of {len(configs)}: {one.name}")
        code = _train_one(one, module, options)
        if code:
            return code
    return 0


def _train_one(config: Config, module: ModuleType | None, options: argparse.Namespace) -> int:
    from bmjax.analysis.report.report import write_report
    from bmjax.training import hosts
    from bmjax.training.run import train_run

    callbacks = [module.on_event] if module is not None and hasattr(module, "on_event") else []
    files = [Path(options.experiment)] if module is not None else []
    result = train_run(config, resume=options.resume, callbacks=callbacks, files=files)
    if result.interrupted:
        return 128 + signal.Signals[result.interrupted]
    if not hosts.leads():
        return 0
    assert result.data is not None
    dataset, _ = result.data
    for split, m in result.metrics.items():
        print(metrics_line(split, m))
    if "test" in result.metrics:
        print_confusion(result.metrics["test"]["confusion"], dataset.classes)
    if module is not None and hasattr(module, "report"):
        module.report(result)
    print(f"report: {write_report(result.run_dir, dataset.images)}")
    return 0
