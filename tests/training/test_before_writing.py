"""Nothing is written, and nothing trains, before everything is checked."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

import bmjax
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
from bmjax.data.dataset import Dataset


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageConfig(epochs=1, train=("head")), r"'stages\.train' is 'head'; expected a tuple.*comma"),
        (lambda: Config(tracking=bmjax.Config().tracking.__class__(tags="mytag")), r"'tracking\.tags' is 'mytag'"),
        (lambda: TrainConfig(sampling="balance"), r"'train\.sampling' is 'balance'; .*did you mean 'balanced'"),
        (lambda: TrainConfig(monitor="val_loss"), r"'train\.monitor' is 'val_loss': unknown figure"),
        (lambda: OptimConfig(name="lion"), r"'optim\.name' is 'lion'"),
        (lambda: OptimConfig(name="Adam"), r"'optim\.name' is 'Adam'.*did you mean 'adam'"),
        (lambda: HeadConfig(widths=(16)), r"'model\.head\.widths' is 16; expected a tuple"),
        (lambda: Config(stages=(StageConfig())), r"'stages' is StageConfig"),
        (lambda: TrainConfig(batch_size="32"), r"'train\.batch_size' is '32'; expected a whole number"),
        (lambda: TrainConfig(batch_size=True), r"'train\.batch_size' is True; expected a whole number"),
        (lambda: DataConfig(root=Path("x")), r"'data\.root' is .*; expected text"),
        (
            lambda: ModelConfig(attention=Path("x.py")),
            r"'model\.attention' is .*; expected text, as str\(\) of it is 'x\.py'",
        ),
        (lambda: ModelConfig(attention_options={"f": print}), r"'model\.attention_options\.f' is .*: a run records it"),
        (lambda: Config(name=""), r"'name' is ''; expected a name, for the run's folder is runs/<name>"),
        (lambda: Config(name="../x"), r"'name' is '\.\./x'; expected a name"),
        (lambda: OptimConfig(lr=float("nan")), r"'optim\.lr' is nan; expected a number or None"),
        (lambda: AugmentConfig(flip=1), r"'augment\.flip' is 1; expected True or False"),
        (lambda: Config(data={"root": "x"}), r"'data' is \{'root': 'x'\}; expected a DataConfig"),
        (lambda: ModelConfig(attention_options=[("ratio", 4)]), r"'model\.attention_options' is .*; expected a dict"),
        (lambda: TrainConfig(loss=lambda counts: None), r"'train\.loss'.*has no name to find it by"),
    ],
)
def test_a_wrong_field_is_said_when_it_is_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_list_becomes_a_tuple():
    assert HeadConfig(widths=[8, 4], order=["dense", "dense"]).widths == (8, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "folder", "root": "/no/such/folder"}}, "expected a folder with one sub-folder a class"),
        ({"model": {"weights": "/no/such.h5"}}, "no such weight file"),
        ({"data": {"synthetic_per_class": 3}}, "has none in the"),
        ({"train": {"devices": 99}}, "expected at most 4"),
        ({"optim": {"name": "adam", "momentum": 0.5}}, r"optim\.momentum"),
        ({"train": {"accumulate": 16}}, r"'train\.accumulate' is 16.*would see one image at a time"),
        ({"train": {"metrics": ("nowhere:kappa",)}}, "cannot import 'nowhere'"),
        ({"augment": {"extra": ("/no/such.py",)}}, "no such file"),
        ({"train": {"loss": "nowhere:loss"}}, "cannot import 'nowhere'"),
    ],
)
def test_a_wrong_run_leaves_no_folder_and_the_corrected_command_works(tiny_config, changes, message):
    wrong = tiny_config
    for section, fields in changes.items():
        wrong = dataclasses.replace(wrong, **{section: dataclasses.replace(getattr(wrong, section), **fields)})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bmjax.train(wrong)
    assert not Path(tiny_config.run_dir).exists()


def test_a_name_that_is_taken_gets_a_number(quick_config, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    stages = (dataclasses.replace(quick_config.stages[1], epochs=1),)
    config = dataclasses.replace(quick_config, run_dir="", stages=stages)
    with caplog.at_level(logging.WARNING):
        folders = [bmjax.train(config).run_dir for _ in range(2)]
    assert [str(f) for f in folders] == ["runs/tiny", "runs/tiny-2"]
    assert "named 'tiny-2'" in caplog.text
    resumed = bmjax.train(config, resume=True)
    assert str(resumed.run_dir) == "runs/tiny"


def test_devices_that_are_not_used_are_named(tiny_config, caplog):
    from bmjax.training.parallel import Parallel

    with caplog.at_level(logging.WARNING):
        assert Parallel.create("jit", None, 10).size == 2
    assert "2 of 4 devices are used" in caplog.text


def test_arrays_train_and_their_faults_are_named(quick_config):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (60, 32, 32, 3), np.uint8), rng.integers(0, 3, 60)
    data = Dataset.from_arrays(images, labels, groups=np.arange(60) // 2)
    assert data.classes == ("0", "1", "2")
    stages = (dataclasses.replace(quick_config.stages[1], epochs=1),)
    result = bmjax.train(dataclasses.replace(quick_config, stages=stages), data=data)
    again = bmjax.evaluate(result.run_dir, "val", data=result.data)
    assert again["n"] == result.metrics["val"]["n"]
    with pytest.raises(ValueError, match="expected them as `data`"):
        bmjax.evaluate(result.run_dir, "val")
    for wrong, message in (
        ((images / 255, labels), "images are float64; expected uint8"),
        ((images[..., :1], labels), r"shape \[60, 32, 32, 1\]; expected \[n, h, w, 3\]"),
        ((images[:0], labels[:0]), "n >= 1"),
        ((images, labels[:-1]), r"labels have shape \[59\]"),
        ((images, np.zeros(60)), "expected at least two"),
        ((images, np.where(labels == 0, np.nan, labels)), "is not a number"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset.from_arrays(*wrong)
