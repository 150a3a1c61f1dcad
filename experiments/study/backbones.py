"""The study's five networks under one protocol: the same split, head, optimizer, epochs and size of image.

    python experiments/study/backbones.py --data FOLDER --weights FILE [--out OUT] [--smoke]

Small images and few epochs show that the networks train and what they cost, not which is best in the end; a network
without weights starts from random ones, and the table says so. Figures are of validation: the test split stays shut.
docs/study.md has the result. `bmjax sweep experiments/study/backbones.py --data.root FOLDER` runs the same cells.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from common import DEFAULT, HEAD, Settings, about, base, choices, facts_of, finish, networks, start, sweep_cells

from bmjax.analysis.study.records import Part
from bmjax.config import AugmentConfig, Config, FeaturesConfig, OptimConfig, StageConfig, TrainConfig

NOTES = (
    "One seed each: the order of networks that are within each other's intervals is not known.",
    "MobileNetV2's norms keep 0.999 of their statistics a step, as Keras's do: after few steps they lag, and accuracy "
    "in evaluation is below what has been learnt.",
)


def config(s: Settings = DEFAULT) -> Config:
    plain = base(s, "backbones")
    # Ours: the new head first, as transfer learning does, then everything at a third of the rate.
    stages = (StageConfig(epochs=1, train=("attention", "head")), StageConfig(epochs=2, lr_scale=0.3))
    return dataclasses.replace(
        plain,
        # Ours: 75 pixels, the least that Xception takes; what is possible on two cores.
        data=dataclasses.replace(plain.data, image_size=32 if s.smoke else 75),
        augment=AugmentConfig(flip=True, right_angles=True),
        model=dataclasses.replace(plain.model, attention="none", head=HEAD),
        optim=OptimConfig(name="adamax", preset="keras"),
        stages=stages[1:] if s.smoke else stages,
        # Small batches, so that the norms' statistics have seen enough steps.
        train=TrainConfig(batch_size=16, train_eval_epochs=0),
        features=FeaturesConfig(),
    )


def sweep(s: Settings = DEFAULT) -> Iterator[dict[str, Any]]:
    for backbone, weights in networks(s):
        yield {"name": backbone, "model.backbone": backbone, "model.weights": weights}


def run(s: Settings) -> Part:
    """Trains what is not trained yet, and writes the part."""
    began, plan = time.monotonic(), config(s)
    entries = [
        dataclasses.replace(entry, roles=("backbone",), facts={} if entry.error else facts_of(s.out / entry.run))
        for entry in sweep_cells(s, plan, list(sweep(s)))
    ]
    replaced = [n for n, weights in networks(s) if weights and n.startswith("densenet") and n != "densenet121"]
    notes = (*NOTES, *(f"{name} stands for DenseNet121, whose file was not there." for name in replaced))
    left_open = choices(plan, {"model.weights"})
    return finish(s, Part("backbones", about(plan, "five networks"), "", tuple(entries), left_open, notes), began)


if __name__ == "__main__":
    start(run, __doc__)
