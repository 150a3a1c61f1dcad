"""What is wrong with a configuration is said before an image is read, and before anything is written."""

import dataclasses
from pathlib import Path

import pytest

from bmjax.config import AugmentConfig, ModelConfig
from bmjax.training import run
from bmjax.training.run import train, train_run

HEAD = """
import flax.linen as nn


class Wrong(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train=False, **more):
        return nn.Dense(self.num_classes + 2)(x)
"""


def changed(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("train", {"dtype": "float64"}, "'train.dtype' is 'float64', and jax computes in float32"),
        ("optim", {"momentum": 0.5, "name": "adamax"}, "'optim.momentum' is 0.5"),
        ("data", {"manifest": "none.csv"}, "'data.manifest' is 'none.csv'; there is no such file"),
        ("data", {"duplicates": "none.csv"}, "'data.duplicates' is 'none.csv'; there is no such file"),
    ],
)
def test_it_is_refused_before_an_image_is_read(quick_config, monkeypatch, section, fields, message):
    monkeypatch.setattr(run, "_plan", lambda *_: pytest.fail("the data were asked for"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(changed(quick_config, section, **fields))


def test_a_stage_that_would_train_nothing_is_refused(quick_config):
    stages = (dataclasses.replace(quick_config.stages[0], train=("attention",)),)
    with pytest.raises(ValueError, match=r"'stages\.0\.train' is .* 'none': nothing would be trained"):
        train(dataclasses.replace(quick_config, stages=stages))


def test_a_head_of_other_outputs_is_refused_before_anything_is_written(quick_config, tmp_path):
    (tmp_path / "wrong.py").write_text(HEAD)
    head = dataclasses.replace(quick_config.model.head, name=str(tmp_path / "wrong.py"))
    with pytest.raises(ValueError, match=r"wrong\.py', whose head gives \[9\] for an image; expected .* \[7\]"):
        train(changed(quick_config, "model", head=head))
    assert not Path(quick_config.run_dir).exists()


def test_a_metric_called_like_a_figure_of_every_run_is_refused(quick_config, tmp_path):
    (tmp_path / "accuracy.py").write_text("def accuracy(labels, probs):\n    return 0.123\n")
    with pytest.raises(ValueError, match=r"'accuracy' is a figure of every run; expected another name"):
        train(changed(quick_config, "train", metrics=(str(tmp_path / "accuracy.py"),)))


def test_what_is_no_callback_is_refused(quick_config):
    with pytest.raises(TypeError, match=r"callbacks\[0\]"):
        train_run(quick_config, callbacks=[5])


@pytest.mark.parametrize(
    ("name", "value"), [("brightness", 20), ("contrast", 5), ("shift", 10), ("hue", 30), ("hed", 50)]
)
def test_pixels_and_degrees_are_not_taken_for_shares(name, value):
    with pytest.raises(ValueError, match=rf"'augment\.{name}' is {value}.*; expected a share"):
        AugmentConfig(**{name: value})


def test_attention_needs_a_place():
    with pytest.raises(ValueError, match=r"'model\.attach' is \(\); expected at least one stage"):
        ModelConfig(attention="soft", attach=())
    assert ModelConfig(attention="none", attach=()).attach == ()
