"""The leaderboard's best variants with the backbone trained, too: DenseNet169, real marrow cells, small images.

    bmjax compare experiments/leaderboard_end_to_end.py --variants none se double global_context soft --seeds 3 \\
        --data.root FOLDER --model.weights FILE

FOLDER has one sub-folder of images per class. As experiments/leaderboard.py, but everything trains, and there is one
split. Two epochs are what an hour on 2 cores allows five variants of three seeds; with more, all would be better, and
their order may be another. docs/attention.md shows what it printed.
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
        name="leaderboard_end_to_end",
        data=DataConfig(source="folder", image_size=128, stratify=True),
        augment=AugmentConfig(flip=True, right_angles=True, brightness=0.05, contrast=0.1, hue=0.02),
        model=ModelConfig(
            backbone="densenet169", weights="imagenet", attention="none", head=HeadConfig(widths=(256,), dropout=0.5)
        ),
        optim=OptimConfig(name="adam", lr=3e-4, schedule=ScheduleConfig(kind="cosine", warmup_epochs=0.25)),
        stages=(StageConfig(epochs=2),),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1),
    )
