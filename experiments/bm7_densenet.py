"""The study's best network on a folder of real marrow cells: DenseNet, ImageNet weights, attention, frozen first.

    bmjax train experiments/bm7_densenet.py --data.root FOLDER

FOLDER has one sub-folder of images per class. What the study leaves open is ours: the split, 128 pixels, soft
attention, the head's sizes, the rates and the two stages (the new parts on frozen features first, then the whole
network). README.md shows what the run printed with DenseNet169, and where.
"""

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


def config() -> Config:
    return Config(
        name="bm7_densenet",
        data=DataConfig(source="folder", image_size=128),
        augment=AugmentConfig(flip=True, right_angles=True, brightness=0.05, contrast=0.1, hue=0.02),
        model=ModelConfig(
            backbone="densenet121", weights="imagenet", attention="soft", head=HeadConfig(widths=(256,), dropout=0.5)
        ),
        optim=OptimConfig(name="adam", lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_epochs=0.5)),
        stages=(
            StageConfig(epochs=2, train=("attention", "head")),
            StageConfig(epochs=5, lr_scale=0.3),
        ),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1, final_test=True),
    )
