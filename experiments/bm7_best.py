"""The recipe for a folder of real marrow cells: what to train for the best accuracy, here and in another laboratory.

    bmjax train experiments/bm7_best.py --data.root FOLDER [--model.backbone NAME --model.weights FILE]

FOLDER has one sub-folder of images per class. To train on all of its cells, with nothing left to report on:

    bmjax train experiments/bm7_best.py --data.root FOLDER --data.split 1 0 0

Three seeds are one classifier, which is worth most on cells of another laboratory:

    bmjax sweep experiments/bm7_best.py --grid seed=0:3 --data.root FOLDER
    bmjax predict runs/bm7_best/seed=0 runs/bm7_best/seed=1 runs/bm7_best/seed=2 OTHER_FOLDER --adapt

As experiments/bm7_densenet.py, but for: the middle of the image alone, since neighbouring cells distract; the
augmentation between laboratories; a moving average of the parameters; a longer training, with lower rates in earlier
layers. All choices are ours; docs/recipe.md shows what is measured of them.
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
        name="bm7_best",
        # Micrometres to a pixel of the collection's files, which give none: red cells are some 85 pixels wide here,
        # judged by eye, and about 7.3 um. Cells of another scale are named with --pixel-size.
        data=DataConfig(source="folder", image_size=128, pixel_size=0.086, field_size=16.125, stratify=True),
        augment=AugmentConfig(preset="other_laboratory"),
        model=ModelConfig(
            backbone="densenet121", weights="imagenet", attention="soft", head=HeadConfig(widths=(256,), dropout=0.5)
        ),
        optim=OptimConfig(
            name="adam", lr=1e-3, layer_decay=0.8, schedule=ScheduleConfig(kind="cosine", warmup_epochs=0.5)
        ),
        stages=(StageConfig(epochs=1, train=("attention", "head")), StageConfig(epochs=20, lr_scale=0.3)),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, label_smoothing=0.1, ema_decay=0.995),
    )
