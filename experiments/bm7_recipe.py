"""What each part of a recipe is worth on real marrow cells: changes to one short training, over seeds, on validation.

    bmjax sweep experiments/bm7_recipe.py --data.root FOLDER --model.weights FILE --run_dir OUT
    python tools/ablation.py OUT

FOLDER has one sub-folder of images per class. Each change is made alone, to `config()`, and trained with the same seeds
on the same split; the test split stays shut. Short trainings of small images: what they order is a guess for long
ones. Stopped, the first command goes on where it was.
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

SEEDS = 3
# Micrometres to a pixel of the collection's files, estimated as in experiments/bm7_best.py; a side is 250 pixels.
PIXEL_SIZE = 0.086

# The preset `other_laboratory` as it was when these were measured, without the lamp's and the camera's colours.
FILES: dict[str, Any] = {
    f"augment.{name}": value
    for name, value in {
        "hed": 0.05, "zoom": 0.35, "blur": 0.008, "brightness": 0.1, "contrast": 0.2, "hue": 0.02, "jpeg": 40,
    }.items()
}  # fmt: skip

# Name: fields. In the order in which they run.
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "middle, three quarters": {"data.field_size": 16.125},
    "other laboratory's colours": FILES,
    "the same, colours twice as far": FILES
    | {
        "augment.hed": 0.1,
        "augment.hue": 0.04,
        "augment.brightness": 0.2,
        "augment.contrast": 0.4,
    },
    "128 pixels": {"data.image_size": 128},
    "twice the epochs": {"stages.1.epochs": 4},
    "layer-wise rates": {"optim.layer_decay": 0.7},
    "middle, three fifths": {"data.field_size": 12.9},
    "no attention": {"model.attention": "none"},
    "mixup": {"augment.mixup": 0.2},
    "free rotation, zoom": {"augment.rotate": 180.0, "augment.zoom": 0.15},
    "norms keep ImageNet's statistics": {"stages.1.batch_norm.backbone": "stats_frozen"},
    "moving average": {"train.ema_decay": 0.98},
    "labels not smoothed": {"train.label_smoothing": 0.0},
    "cutmix": {"augment.cutmix": 1.0},
    "trivialaugment": {"augment.policy": "trivialaugment"},
    "se": {"model.attention": "se"},
    "macenko": {"data.stain": "macenko"},
    "attention after conv4": {"model.attach": ("conv4",)},
    "attention after conv4 and the last": {"model.attach": ("conv4", "last")},
    "se after every stage": {"model.attention": "se", "model.attach": ("conv2", "conv3", "conv4", "last")},
}


def config() -> Config:
    return Config(
        name="bm7_recipe",
        data=DataConfig(source="folder", image_size=96, pixel_size=PIXEL_SIZE, stratify=True),
        augment=AugmentConfig(flip=True, right_angles=True, brightness=0.05, contrast=0.1, hue=0.02),
        model=ModelConfig(
            backbone="densenet169", weights="imagenet", attention="soft", head=HeadConfig(widths=(256,), dropout=0.5)
        ),
        optim=OptimConfig(name="adam", lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_epochs=0.5)),
        stages=(StageConfig(epochs=1, train=("attention", "head")), StageConfig(epochs=2, lr_scale=0.3)),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1),
    )


def sweep() -> Iterator[dict[str, Any]]:
    for name, fields in CHANGES.items():
        for seed in range(SEEDS):
            yield fields | {"name": f"{name}-{seed}", "seed": seed}
