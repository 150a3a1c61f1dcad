"""Attention variants on equal terms: DenseNet169's ImageNet features of real marrow cells, frozen and cached.

    bmjax compare experiments/attention_lab.py --variants none se cbam soft --seeds 5 \\
        --data.root FOLDER --model.weights imagenet

or of one variant alone:

    bmjax train experiments/attention_lab.py --data.root FOLDER --model.attention soft

FOLDER has one sub-folder of images per class. The features of four augmented views of each training image, and of the
images of validation and test as they are, are computed once; attention and head then train on them. The budget, the
rate and the head are ours, the same for every variant.
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
        name="attention_lab",
        data=DataConfig(source="folder", image_size=224),
        augment=AugmentConfig(flip=True, right_angles=True, brightness=0.05, contrast=0.1, hue=0.02),
        model=ModelConfig(
            backbone="densenet169", weights="imagenet", attention="none", head=HeadConfig(widths=(256,), dropout=0.5)
        ),
        optim=OptimConfig(name="adam", lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_epochs=1)),
        stages=(StageConfig(epochs=15, train=("attention", "head")),),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1, final_test=True),
        features=FeaturesConfig(cached=True, views=4),
    )
