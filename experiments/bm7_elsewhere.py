"""How far colours should stray in training for cells of another laboratory: short trainings, judged on drawn ones.

    bmjax sweep experiments/bm7_elsewhere.py --data.root FOLDER --model.weights FILE --run_dir OUT
    python -m tools.shift "OUT/camera-0" --kinds laboratory [--adapt]

FOLDER has one sub-folder of images per class. The second command prints one run's accuracy on the validation images as
six other laboratories might have them. The test split stays shut. Stopped, the first command goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bmjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)

SEEDS = 2

# Name: fields of `augment`. `files` is without the lamp's and the camera's colours; `camera` is what the preset
# `other_laboratory` became by this.
FILES: dict[str, float] = {
    "hed": 0.05, "zoom": 0.35, "blur": 0.008, "brightness": 0.1, "contrast": 0.2, "hue": 0.02, "jpeg": 40,
}  # fmt: skip
CHANGES: dict[str, dict[str, float]] = {
    "files": FILES,
    "camera": FILES | {"balance": 0.15, "gamma": 0.2, "saturation": 0.3},
    "far": FILES
    | {"hed": 0.1, "balance": 0.25, "gamma": 0.4, "saturation": 0.5, "brightness": 0.15, "zoom": 0.4, "blur": 0.012},
}


def config() -> Config:
    return Config(
        name="bm7_elsewhere",
        # As experiments/bm7_best.py reads files; smaller, to be short.
        data=DataConfig(source="folder", image_size=96, pixel_size=0.086, field_size=16.125, stratify=True),
        augment=AugmentConfig(),
        model=ModelConfig(
            backbone="densenet169", weights="imagenet", attention="soft", head=HeadConfig(widths=(256,), dropout=0.5)
        ),
        optim=OptimConfig(name="adam", lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_epochs=0.5)),
        stages=(StageConfig(epochs=1, train=("attention", "head")), StageConfig(epochs=4, lr_scale=0.3)),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1),
    )


def sweep() -> Iterator[dict[str, Any]]:
    for seed in range(SEEDS):
        for name, fields in CHANGES.items():
            yield {f"augment.{field}": value for field, value in fields.items()} | {
                "name": f"{name}-{seed}",
                "seed": seed,
            }
