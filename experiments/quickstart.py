"""Rendered cells, a small DenseNet with soft attention: the whole system in a few minutes, nothing downloaded.

    bmjax train experiments/quickstart.py

Prints the test accuracy of the network beside that of a linear model on the pixels of the same split. README.md
shows what it printed, and where.
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
        name="quickstart",
        data=DataConfig(source="synthetic", image_size=64, synthetic_per_class=200),
        augment=AugmentConfig(flip=True, right_angles=True, brightness=0.1, contrast=0.1, hue=0.02),
        model=ModelConfig(
            backbone="densenet_small", weights=None, attention="soft", head=HeadConfig(widths=(64,), dropout=0.2)
        ),
        optim=OptimConfig(name="adam", lr=2e-3, schedule=ScheduleConfig(kind="cosine", warmup_epochs=1)),
        stages=(StageConfig(epochs=20),),
        train=TrainConfig(batch_size=32, train_eval_epochs=0, final_test=True),
    )


def report(result) -> None:
    """Prints a linear model on the pixels, trained and tested on the same split."""
    from bmjax.analysis.baseline import linear_pixels

    dataset, splits = result.data
    images, labels = dataset.images, dataset.labels
    linear = linear_pixels(images[splits.train], labels[splits.train], images[splits.test], labels[splits.test], seed=0)
    for name, m in (("network", result.metrics["test"]), ("linear model on pixels", linear)):
        low, high = m["accuracy_low"], m["accuracy_high"]
        print(f"test accuracy, {name}: {m['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, n = {m['n']})")
