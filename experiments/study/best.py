"""The model that the other parts select on validation, trained longer and end to end, and tested once.

    python experiments/study/best.py --data FOLDER --weights FILE [--out OUT] [--smoke]

Network, head, attention, optimizer, batch size and rate are each those with the highest validation accuracy in their
part of the study in OUT; where a part has not run, the value in `config()` stands. Two rates for the whole network are
tried; the run that is better on validation is tested, once, and its folder records the opening (openings.jsonl).
docs/study.md has the result.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

from common import DEFAULT, Settings, about, base, choices, facts_of, finish, start, sweep_cells

from bmjax.analysis.study.records import Entry, Part, read_part, results_of
from bmjax.analysis.study.tables import grouped, mean_of
from bmjax.config import (
    AugmentConfig,
    BatchNormConfig,
    Config,
    FeaturesConfig,
    OptimConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from bmjax.config.override import changed

log = logging.getLogger("bmjax.study")
SCALES = (0.3, 0.03)  # Ours: shares of the selected rate that the whole network trains at.
FEWEST_STEPS = 300  # With fewer, a norm's new statistics would lag, and the network keeps those of its weights.
# Part, role in it, and the fields that it decides.
DECIDED_BY = (
    ("backbones", ("backbone",), ("model.backbone", "model.weights")),
    ("head", ("head",), ("model.head.order", "model.head.widths")),
    ("optimizers", ("default", "tuned"), ("optim.name", "train.batch_size", "optim.lr")),
    ("attention", ("attention",), ("model.attention",)),
)


def config(s: Settings = DEFAULT) -> Config:
    plain = base(s, "best")
    return dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, image_size=32 if s.smoke else 128),  # Ours: what two cores can do.
        augment=AugmentConfig(flip=True, right_angles=True, brightness=0.05, contrast=0.1, hue=0.02),
        model=dataclasses.replace(plain.model, attention="soft"),
        optim=OptimConfig(name="adamax", preset="keras", schedule=ScheduleConfig(kind="cosine", warmup_epochs=0.5)),
        # Ours: new parts first, then everything.
        stages=(StageConfig(epochs=1 if s.smoke else 2, train=("attention", "head")), StageConfig(epochs=5)),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1),
        features=FeaturesConfig(),
    )


def sweep(s: Settings = DEFAULT) -> Iterator[dict[str, Any]]:
    for scale in SCALES[: 1 if s.smoke else None]:
        yield {"stages.1.lr_scale": scale}


def selected(s: Settings) -> tuple[dict[str, Any], list[str]]:
    """The fields that the parts decide, and a sentence on each."""
    found: dict[str, Any] = {}
    said = []
    for name, roles, fields in DECIDED_BY:
        part = read_part(s.out, name)
        entries = list({e.run: e for role in roles for e in (part.of(role) if part else [])}.values())
        if not entries:
            said.append(f"{name}: this part has not run; the value of best.py stands.")
            continue
        groups = grouped(entries, ["head"] if name == "head" else fields)
        means = {key: mean_of(s.out, group) for key, group in groups.items()}
        best = max(means, key=lambda key: means[key].accuracy)
        chosen = {field: groups[best][0].fields[field] for field in fields}
        found |= chosen
        values = ", ".join(str(value) for value in best if value is not None)
        said.append(
            f"{name}: {values.replace(s.weights, s.weights.rsplit('/', 1)[-1]) if s.weights else values}, "
            f"with {means[best]} on validation the highest of {len(means)}."
        )
    return found, said


def with_selected(s: Settings, config: Config, fields: dict[str, Any]) -> Config:
    """The configuration with the fields that the parts decided."""
    config = changed(config, fields)
    steps = sum(stage.epochs for stage in config.stages[1:]) * _train_images(s) // config.train.batch_size
    if config.model.weights and steps < FEWEST_STEPS:
        kept = dataclasses.replace(config.stages[1], batch_norm=BatchNormConfig(backbone="stats_frozen"))
        config = dataclasses.replace(config, stages=(config.stages[0], kept))
    return config


def _train_images(s: Settings) -> int:
    from bmjax.data import list_source

    plain = base(s, "best").data
    n = 7 * plain.synthetic_per_class if plain.source == "synthetic" else len(list_source(plain))
    return int(plain.split[0] * n)


def test_once(s: Settings, entry: Entry) -> None:
    """Opens the test split for the chosen run, unless that has been done."""
    import bmjax
    from bmjax.analysis.report.report import write_report
    from bmjax.data import load_dataset
    from bmjax.runs.folder import read_config
    from bmjax.runs.lock import waiting_for

    folder = s.out / entry.run
    # Several processes may run one study, and share its runs.
    with waiting_for(folder / "opening.lock", 1.0):
        if "test" not in results_of(folder):
            log.info("%s: opening the test split", entry.run)
            bmjax.evaluate(folder, "test")
    write_report(folder, load_dataset(read_config(folder).data).images)


def run(s: Settings) -> Part:
    """Trains what is not trained yet, tests the better run, and writes the part."""
    began = time.monotonic()
    fields, said = selected(s)
    plan = with_selected(s, config(s), fields)
    found = sweep_cells(s, plan, list(sweep(s)))
    finished = [entry for entry in found if not entry.error]
    if not finished:
        raise SystemExit(f"{plan.run_dir}: no run finished: {'; '.join(entry.error for entry in found)}")
    best = max(finished, key=lambda entry: results_of(s.out / entry.run)["val"]["accuracy"])
    test_once(s, best)
    roles = {best.run: ("candidate", "best")}
    entries = [dataclasses.replace(entry, roles=roles.get(entry.run, ("candidate",))) for entry in found]
    entries = [dataclasses.replace(e, facts=facts_of(s.out / e.run)) if "best" in e.roles else e for e in entries]
    notes = (
        *said,
        f"The whole network at {best.fields['stages.1.lr_scale']:g} of the rate, better on validation than "
        f"the other of {len(found)} tried."
        if len(found) > 1
        else "One rate for the whole network was tried.",
    )
    return finish(s, Part("best", about(plan), "", tuple(entries), choices(plan), notes), began)


if __name__ == "__main__":
    start(run, __doc__)
