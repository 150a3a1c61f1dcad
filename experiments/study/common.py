"""What the parts of the study share: its options, its one protocol, and what the abstract leaves open.

The published study (abstract only) names five networks, an added head of batch-norm, dropout and two dense layers,
attention, five optimizers and four batch sizes. All else here is ours, each choice a field with a comment.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bmjax import environment
from bmjax.analysis.study.records import Entry, Part, read_part, write_part
from bmjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TrainConfig,
)

OFF = AugmentConfig(flip=False, right_angles=False)
NETWORKS = ("densenet121", "efficientnetb5", "resnet50", "xception", "mobilenet_v2")
TINY = ("densenet_tiny", "efficientnet_tiny", "resnet_tiny", "xception_tiny", "mobilenet_v2_tiny")
OPTIMIZERS = ("adagrad", "adadelta", "adamax", "rmsprop", "sgd")
BATCHES = (16, 32, 64, 128)
HEAD = HeadConfig(order=("batch_norm", "dropout", "dense"), widths=(256,), dropout=0.5)

# What the abstract does not say. The value shown beside it is that of the part's configuration.
OPEN = {
    "data.root": "the data set's name and classes; seven of the marrow collection of Matek et al. 2021 are likely",
    "data.split": "shares of train, validation and test",
    "data.split_by": "what stays on one side of the split; the collection has no patient for an image",
    "data.image_size": "resolution",
    "augment": "augmentation",
    "model.weights": "ImageNet's are named; which file is not",
    "model.attention": "the attention's kind",
    "model.attach": "where attention stands",
    "model.head.order": "order of the added layers",
    "model.head.widths": "widths of the dense layers; the last of the two gives the classes",
    "model.head.dropout": "dropout rate",
    "optim.name": "the optimizer outside the table of optimizers",
    "optim.lr": "learning rates; none: the preset's",
    "optim.preset": "the optimizers' other numbers",
    "optim.schedule.kind": "schedule of the rate",
    "stages": "epochs, and what is frozen when",
    "train.batch_size": "batch size outside the table of optimizers",
    "train.loss": "loss",
    "train.label_smoothing": "label smoothing",
    "train.monitor": "what picks the epoch; here always on validation",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of every part. `weights`: `imagenet` fetches Keras's file of each network; a path is one network's
    file, the others are then random; empty: all random."""

    data: str = ""
    weights: str = "imagenet"
    out: Path = Path("runs/study")
    seeds: int = 5
    at_once: int | None = None
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.smoke:
            object.__setattr__(self, "seeds", min(self.seeds, 3))

    def part(self, name: str) -> str:
        return str(self.out / name)

    @property
    def device(self) -> str:
        """Where it runs."""
        import jax

        return f"{jax.device_count()} {jax.default_backend()} device(s), {platform.machine()}, {os.cpu_count()} cores"


DEFAULT = Settings()


def settings(doc: str | None, arguments: Sequence[str] | None = None) -> Settings:
    """The options of a part's command.

    Raises:
      SystemExit: an option is wrong; it is said.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--data", default="", help="folder with one sub-folder of images per class")
    parser.add_argument(
        "--weights", default="imagenet", help="`imagenet` (default), the file of one network, or none for random ones"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the study's folder (runs/study)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each comparison (5)")
    parser.add_argument("--at-once", type=int, help="runs at a time on cached features")
    parser.add_argument("--smoke", action="store_true", help="rendered cells, tiny networks, few epochs: minutes")
    options = parser.parse_args(arguments)
    if not options.smoke and not Path(options.data or "?").is_dir():
        parser.error(f"--data is {options.data!r}; expected a folder with one sub-folder of images per class")
    if options.weights.lower() == "none":
        options.weights = ""
    elif options.weights != "imagenet" and not Path(options.weights).is_file():
        parser.error(f"--weights is {options.weights!r}; expected a file, imagenet or none")
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}; expected at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    environment.quiet_libraries("bmjax.training")
    return Settings(**vars(options))


def start(run: Callable[[Settings], Any], doc: str | None) -> NoReturn:
    """A part as a program: its options, one line where something is wrong, and the exit status of `bmjax`."""
    from bmjax.training.signals import Interrupted

    try:
        run(settings(doc))
    except Interrupted as e:
        sys.exit(e.code)
    except (ValueError, OSError, FloatingPointError) as e:
        if os.environ.get("BMJAX_DEBUG"):
            raise
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def networks(s: Settings) -> list[tuple[str, str | None]]:
    """(network, weights) of the study's five. A file of a larger DenseNet stands for DenseNet121."""
    if s.smoke:
        return [(name, None) for name in TINY]
    if s.weights == "imagenet":
        return [(name, "imagenet") for name in NETWORKS]
    named = _network_of(s.weights) if s.weights else ""
    stands_for = "densenet121" if named.startswith("densenet") else named
    if named and stands_for not in NETWORKS:
        raise ValueError(f"--weights is {s.weights!r}, of {named}; expected a file of {', '.join(NETWORKS)}")
    return [(named, s.weights) if name == stands_for else (name, None) for name in NETWORKS]


def _network_of(file: str) -> str:
    """The network that a weights file's name begins with.

    Raises:
      ValueError: none is known by that name.
    """
    from bmjax.backbones import list_backbones

    found = [name for name in list_backbones() if Path(file).name.startswith(name)]
    if not found:
        raise ValueError(f"--weights is {file!r}; expected a file whose name begins with a network's, as Keras's do")
    return max(found, key=len)


def base(s: Settings, part: str) -> Config:
    """The protocol of every part but the end-to-end ones: head and attention on frozen features, computed once."""
    network, weights = networks(s)[0]
    if s.weights not in ("", "imagenet") and not s.smoke:
        network, weights = next(pair for pair in networks(s) if pair[1])
    return Config(
        name=f"study_{part}",
        run_dir=s.part(part),
        # Ours: 70, 15 and 15 of a hundred, by image, since the collection names no patient.
        data=DataConfig(
            source="synthetic" if s.smoke else "folder",
            root=s.data,
            image_size=32 if s.smoke else 224,
            synthetic_per_class=30,
        ),
        augment=OFF,  # Ours: none on cached features; the parts that train whole networks augment.
        model=ModelConfig(backbone=network, weights=weights, attention="none", head=HEAD),
        optim=OptimConfig(name="adamax", preset="keras"),  # Ours, outside optimizers.py.
        stages=(StageConfig(epochs=3 if s.smoke else 15, train=("attention", "head")),),  # Ours.
        train=TrainConfig(batch_size=32, train_eval_epochs=0),
        features=FeaturesConfig(cached=True),
    )


def choices(config: Config, varied: Iterable[str] = ()) -> tuple[tuple[str, str, str], ...]:
    """(field, value, comment) of what the abstract leaves open; fields that the part itself varies are left out."""
    varied = set(varied)

    def value(field: str) -> str:
        found: Any = config
        for name in field.split("."):
            found = getattr(found, name)
        if field == "stages":
            return "; ".join(f"{stage.epochs} epochs of {' + '.join(stage.train)}" for stage in found)
        if field == "data.root" and not found:
            return "rendered cells" if config.data.source == "synthetic" else "a folder"
        if field == "augment":
            return switched_on(found)
        return Path(found).name if field in ("data.root", "model.weights") and found else str(found)

    return tuple((field, value(field), why) for field, why in OPEN.items() if field not in varied)


def switched_on(augment: AugmentConfig) -> str:
    """The augmentations that are not off, with their strengths."""
    default = AugmentConfig(flip=False, right_angles=False)
    pairs = [(f.name, getattr(augment, f.name)) for f in dataclasses.fields(augment)]
    return ", ".join(f"{name} {value}" for name, value in pairs if value != getattr(default, name)) or "none"


def about(config: Config, network: str = "") -> str:
    """What a part trains on, in a line; `network` where it is not the configuration's."""
    weights = f"weights {Path(config.model.weights).name}" if config.model.weights else "random weights"
    network = network or f"{config.model.backbone}, {weights}"
    where = "rendered cells" if config.data.source == "synthetic" else Path(config.data.root).name
    text = f"{where} at {config.data.image_size} pixels; {network}"
    text += ", frozen, on cached features" if config.features.cached else ", end to end"
    return f"{text}; {' + '.join(str(stage.epochs) for stage in config.stages)} epochs"


def sweep_cells(s: Settings, config: Config, changes: Sequence[dict[str, Any]]) -> list[Entry]:
    """Trains a cell for each of the changes, but for those that are there already; their entries, in order."""
    from bmjax.analysis.sweep.cells import cells_of
    from bmjax.analysis.sweep.run import run_sweep

    # Only the best checkpoint is read from here on, and each holds the whole backbone.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, keep_last=False))
    cells = cells_of(config, list(changes))
    at_once = s.at_once if config.features.cached else None
    rows = run_sweep(config, cells, at_once=at_once).rows
    return [_entry(s, dict(change), row) for change, row in zip(changes, rows, strict=True)]


def _entry(s: Settings, fields: dict[str, Any], row: dict[str, Any]) -> Entry:
    run = Path(row["run_dir"])
    error = "" if row["status"] == "finished" else str(row["error"] or row["status"]).split(" Images of the batch")[0]
    fields.pop("name", None)
    return Entry(str(run.relative_to(s.out)), fields, error=error)


def facts_of(run: Path) -> dict[str, Any]:
    """What a run's tables need and its folder does not hold."""
    from bmjax.analysis.study.cost import network_facts

    return network_facts(run)


def finish(s: Settings, part: Part, began: float) -> Part:
    """Records the part and prints its tables as Markdown."""
    from bmjax.analysis.study.tables import markdown, tables

    before = read_part(s.out, part.name)
    seconds = time.monotonic() - began + (before.seconds if before else 0.0)
    part = dataclasses.replace(part, seconds=seconds, device=s.device, command=command(part.name, s))
    write_part(s.out, part)
    print(markdown(tables(s.out, part)), flush=True)
    return part


def command(name: str, s: Settings) -> str:
    """The part's command, without the places of this machine."""
    if s.smoke:
        return f"python experiments/study/{name}.py --smoke"
    weights = s.weights if s.weights in ("", "imagenet") else Path(s.weights).name
    return f"python experiments/study/{name}.py --data {Path(s.data).name} --weights {weights or 'none'}"
