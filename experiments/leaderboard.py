"""All attention variants on equal terms, over folds: frozen DenseNet169 features of real marrow cells, small images.

    python tools/leaderboard.py --data FOLDER --weights FILE

trains it in one command of a few hours and writes docs/leaderboard.md; the same by hand, of some variants:

    bmjax compare experiments/leaderboard.py --variants none se soft --folds 5 --seeds 2 --tune 3 \\
        --data.root FOLDER --model.weights FILE

FOLDER has one sub-folder of images per class. Folds have each class's exact share. The images are small (128 pixels,
4 x 4 places), because the costliest variants take 50 times as long as the cheapest and all have the same budget.
"""

from bmjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)


def config() -> Config:
    return Config(
        name="leaderboard",
        data=DataConfig(source="folder", image_size=128, stratify=True),
        augment=AugmentConfig(flip=True, right_angles=True, brightness=0.05, contrast=0.1, hue=0.02),
        model=ModelConfig(
            backbone="densenet169", weights="imagenet", attention="none", head=HeadConfig(widths=(256,), dropout=0.5)
        ),
        optim=OptimConfig(name="adam", lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_epochs=1)),
        stages=(StageConfig(epochs=8, train=("attention", "head")),),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1),
        features=FeaturesConfig(cached=True, views=4),
    )
