"""A sweep of seconds on cached features, and the same in processes of its own."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from bmjax.analysis.sweep.rows import TIMES
from bmjax.config import AugmentConfig, Config, FeaturesConfig, OptimConfig, StageConfig, to_json

ROOT = Path(__file__).resolve().parents[2]
# Checkpoints after each epoch, though an epoch takes a hundredth of a second.
RUN = "import sys, bmjax.training.run as run; run._MAPS_CHECKPOINT_SECONDS = 0.0\n"
RUN += "from bmjax.cli.main import main; sys.exit(main(sys.argv[1:]))"


def tiny(config: Config, folder: Path, epochs: int = 2) -> Config:
    """A frozen tiny network on cached features, with a head that trains."""
    return dataclasses.replace(
        config,
        name="lab",
        run_dir=str(folder / "lab"),
        augment=AugmentConfig(flip=False, right_angles=False),
        model=dataclasses.replace(config.model, attention="none"),
        optim=OptimConfig(name="adam"),
        stages=(StageConfig(epochs=epochs, train=("attention", "head")),),
        features=FeaturesConfig(cached=True),
        train=dataclasses.replace(config.train, accumulate=1, ema_decay=None),
    )


def start(config: Config, folder: Path, *flags: str) -> subprocess.Popen:
    """`bmjax sweep` in a process, in a folder of its own, so that two sweeps name the same run folders."""
    folder.mkdir(exist_ok=True)
    (folder / "lab.json").write_text(to_json(dataclasses.replace(config, run_dir="lab")))
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # each process would compile the same
    command = [sys.executable, "-c", RUN, "sweep", "lab.json", *flags]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """What the process printed; it ended well."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def table(folder: Path) -> list[dict[str, str]]:
    """results.csv, but for the columns of time."""
    with (folder / "lab/results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
