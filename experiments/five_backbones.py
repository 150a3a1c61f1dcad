"""The study's five networks on one folder of cells, each first with its backbone frozen, then whole.

    bmjax sweep experiments/five_backbones.py --data.root FOLDER

FOLDER has one sub-folder of images per class. Every run has the same split, seed, head and schedule. Two epochs of each
stage show that a network trains, not how well it does: fork this file for that, with more epochs, several seeds and
larger images.

On the 2,800 cells of the README with `--model.weights None` (random weights), on 2 cores beside another training, the
five took 37 minutes; validation accuracy of the best epoch (n 423): DenseNet121 0.265, EfficientNetB5 0.203,
ResNet50 0.305, Xception 0.270, MobileNetV2 0.210. Chance is one in seven.
"""

from collections.abc import Iterator
from typing import Any

from bmjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TrainConfig,
)


def config() -> Config:
    return Config(
        name="five_backbones",
        data=DataConfig(source="folder", image_size=75),
        augment=AugmentConfig(flip=True, right_angles=True),
        model=ModelConfig(weights="imagenet", attention="soft", head=HeadConfig(widths=(256,), dropout=0.5)),
        optim=OptimConfig(name="adamax", lr=1e-3),
        stages=(StageConfig(epochs=2, train=("attention", "head")), StageConfig(epochs=2, lr_scale=0.3)),
        train=TrainConfig(batch_size=32, train_eval_epochs=0),
    )


def sweep() -> Iterator[dict[str, Any]]:
    for backbone in ("densenet121", "efficientnetb5", "resnet50", "xception", "mobilenet_v2"):
        yield {"model.backbone": backbone}
