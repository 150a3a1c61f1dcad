"""A run of seconds that a part of one's own joins."""

import dataclasses

import pytest

from bmjax.config import AugmentConfig, HeadConfig, OptimConfig, StageConfig, TrainConfig, to_json


@pytest.fixture
def small(quick_config):
    """One epoch of two convolutions on few rendered cells."""
    data = dataclasses.replace(quick_config.data, image_size=32, synthetic_per_class=10, stratify=True)
    model = dataclasses.replace(quick_config.model, head=HeadConfig(order=(), widths=()))
    return dataclasses.replace(
        quick_config,
        data=data,
        augment=AugmentConfig(),
        model=model,
        optim=OptimConfig(name="adam"),
        stages=(StageConfig(epochs=1),),
        train=TrainConfig(
            batch_size=16, eval_batch_size=16, train_eval_epochs=0, recompute_statistics="never", devices=1
        ),
    )


@pytest.fixture
def experiment(small, tmp_path):
    """Writes an experiment file of that run: experiment(further lines) -> its path."""

    def write(lines=""):
        path = tmp_path / "small_experiment.py"
        path.write_text(
            f"from bmjax.config import from_json\n{lines}\n\ndef config():\n    return from_json({to_json(small)!r})\n"
        )
        return str(path)

    return write
