"""`bmjax sweep`: many configurations of an experiment, chosen between on validation."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.cli.configured import add_configured, configuration

if TYPE_CHECKING:
    from bmjax.analysis.sweep.run import Sweep
    from bmjax.config.base import Config


def add_parser(verbs: Any) -> None:
    """Adds `sweep` to a parser's verbs."""
    p = add_configured(verbs, "sweep", "train many configurations and choose between them on validation", run)
    p.add_argument(
        "--grid",
        nargs="+",
        metavar="FIELD=VALUES",
        help="every combination, as in optim.name=adagrad,sgd train.batch_size=16,32 seed=0:5 (default: the "
        "experiment's sweep())",
    )
    p.add_argument("--random", type=int, metavar="N", help="N draws instead, from values and ranges as 1e-4..1e-1")
    p.add_argument(
        "--halving",
        type=int,
        nargs="?",
        const=3,
        metavar="ETA",
        help="successive halving: at each rung of epochs the best one in ETA goes on (3)",
    )
    p.add_argument("--at-once", type=int, metavar="N", help="cells at a time in a process, on cached features")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes, each with its cores or its own GPU")
    p.add_argument("--retry", action="store_true", help="train cells again that failed")
    p.add_argument("--wandb", action="store_true", help="write, and register, a sweep for W&B's agents; train nothing")
    p.add_argument(
        "--optuna",
        nargs="?",
        const="",
        metavar="URL",
        help="draw the N of --random by Optuna, and prune; its study's storage (a SQLite file in the sweep's folder)",
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, module = configuration(options, rest)
    from bmjax.analysis.sweep.cells import parse_space

    space = parse_space(options.grid) if options.grid else None
    if options.wandb:
        return _for_agents(config, module, space, options, rest)
    training = logging.getLogger("bmjax.training")  # a line a cell, not one an epoch
    level = training.level
    training.setLevel(logging.WARNING)
    try:
        return _report(_trained(config, module, space, options))
    finally:
        training.setLevel(level)


def _trained(config: Config, module: Any, space: Any, options: argparse.Namespace) -> Sweep:
    from bmjax.analysis.sweep.cells import cells_of, draws, experiment_cells, grid

    shared: dict[str, Any] = {"experiment": options.experiment if module is not None else ""}
    shared |= {"at_once": options.at_once, "workers": options.workers}
    if options.optuna is not None:
        from bmjax.analysis.sweep.tune import tune

        if space is None or options.random is None:
            raise ValueError("--optuna draws from a space; expected --grid FIELD=VALUES ... and --random N trials")
        if options.halving is not None:
            raise ValueError("--halving beside --optuna, which prunes by itself; expected one of them")
        return tune(config, space, options.random, storage=options.optuna, **shared)
    from bmjax.analysis.sweep.run import run_sweep

    if space is None and options.random is not None:
        raise ValueError("--random draws from a space; expected --grid FIELD=VALUES ... beside it")
    if space is None:
        cells = experiment_cells(config, module, options.experiment)
    elif options.random is None:
        cells = cells_of(config, grid(space))
    else:
        cells = cells_of(config, draws(space, options.random, config.seed))
    return run_sweep(config, cells, retry=options.retry, halving=options.halving, **shared)


def _report(sweep: Sweep) -> int:
    """Prints the table and the chosen cell; the exit status."""
    from bmjax.analysis.sweep.rows import FAILED
    from bmjax.analysis.sweep.table import figure_text, text_table

    print(text_table(sweep.rows, sweep.fields, sweep.monitor, falls=sweep.falls))
    best = sweep.best
    if best is not None:
        figure = sweep.monitor.removeprefix("-")
        print(f"best on validation: {best['cell']}, {figure} {figure_text(best, figure)}: {best['run_dir']}")
    print(f"page: {sweep.folder / 'sweep.html'}; rows: {sweep.folder / 'results.csv'} and .parquet")
    return 1 if any(row["status"] == FAILED for row in sweep.rows) else 0


def _for_agents(config: Config, module: Any, space: Any, options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes the sweep for W&B's agents and says how they are started."""
    from bmjax.analysis.sweep.agents import configuration as tree_of
    from bmjax.analysis.sweep.agents import space_of, write_and_register
    from bmjax.analysis.sweep.cells import experiment_cells
    from bmjax.runs.tracking import project_of

    if space is None:
        space = space_of(experiment_cells(config, module, options.experiment))
    arguments = [str(Path(options.experiment)), *rest]
    tree = tree_of(config, space, arguments, runs=options.random, halving=options.halving)
    path, sweep_id = write_and_register(config, tree)
    print(path)
    entity = f"--entity {config.tracking.entity} " if config.tracking.entity else ""
    where = f"{entity}--project {project_of(config.tracking)} "
    if sweep_id is None:
        print(f"register it, where there is a server, with: wandb sweep {where}{path}")
        print(f"then start any number of agents: wandb agent {where}ID")
    else:
        print(f"start any number of agents: wandb agent {where}{sweep_id}")
    return 0
