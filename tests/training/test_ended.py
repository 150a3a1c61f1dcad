"""What a resume takes for ended, what it still reports, and what it refuses to go on with."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from bmjax.config import FeaturesConfig
from bmjax.data.load import load_dataset
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.folder import load_run, saved_results
from bmjax.runs.records import read_records
from bmjax.training.features import FeatureMaps
from bmjax.training.predict import evaluate
from bmjax.training.progress import StepLog
from bmjax.training.run import train

AUGMENT = """
def level(image, key):
    return image * 0 + {value}
"""
LOSS = """
import optax


def weighted(counts):
    def loss(logits, labels):
        return {factor} * optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    return loss
"""
METRIC = """
CALLS = []


def late(labels, probs):
    CALLS.append(1)
    return float("nan") if len(CALLS) < 4 else 1.0 / len(CALLS)
"""
BARE = """
import flax.linen as nn


class Bare(nn.Module):
    stages: tuple[str, ...] = ("only",)

    @nn.compact
    def __call__(self, x, *, train=False, mode="train", tap=lambda stage, x: x):
        return tap("only", nn.relu(nn.Conv(8, (3, 3), strides=(4, 4))(x)))
"""


def stopped_at(config, step, monkeypatch):
    """A run that a signal stops after so many steps."""
    original = StepLog.__call__

    def stop(self, at, *arguments):
        original(self, at, *arguments)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as m:
        m.setattr(StepLog, "__call__", stop)
        return train(config)


def test_a_run_that_was_evaluated_before_its_end_is_not_taken_for_ended(quick_config, tmp_path, monkeypatch):
    whole = train(dataclasses.replace(quick_config, run_dir=str(tmp_path / "whole")))
    per_epoch = whole.steps // 4
    assert stopped_at(quick_config, 2 * per_epoch, monkeypatch).interrupted == "SIGTERM"
    for split in ("train", "val"):
        evaluate(quick_config.run_dir, split)
    assert saved_results(Path(quick_config.run_dir)).keys() == {"train", "val"}
    end = train(quick_config, resume=True)
    assert end.steps == whole.steps
    assert end.metrics["val"]["loss"] == whole.metrics["val"]["loss"]
    again = train(quick_config, resume=True)
    assert again.steps == whole.steps, "the steps done, not those of the best checkpoint"


def test_the_test_split_of_an_ended_run_is_opened_without_training_again(quick_config):
    config = dataclasses.replace(quick_config, train=dataclasses.replace(quick_config.train, keep_last=False))
    result = train(config)
    folder = Path(config.run_dir)
    before = Checkpoints(folder / "checkpoints/best").steps()
    records = read_records(folder, "train")
    opening = dataclasses.replace(config, train=dataclasses.replace(config.train, final_test=True))
    found = train(opening, resume=True)
    assert found.steps == result.steps
    assert set(found.metrics) == {"train", "val", "test"}
    assert found.metrics["test"]["step"] == before[0] == load_run(folder).step
    assert found.metrics["val"]["loss"] == pytest.approx(result.metrics["val"]["loss"])
    assert Checkpoints(folder / "checkpoints/best").steps() == before
    assert read_records(folder, "train") == records


def test_a_resume_refuses_code_that_has_changed(quick_config, tmp_path, monkeypatch):
    loss = tmp_path / "weighted.py"
    loss.write_text(LOSS.format(factor=1.0))
    config = dataclasses.replace(quick_config, train=dataclasses.replace(quick_config.train, loss=str(loss)))
    per_epoch = stopped_at(config, 1, monkeypatch).steps
    assert per_epoch == 1
    loss.write_text(LOSS.format(factor=2.0))
    with pytest.raises(ValueError, match=r"weighted\.py has changed since the run in .* began; expected it as it was"):
        train(config, resume=True)
    loss.write_text(LOSS.format(factor=1.0))
    assert train(config, resume=True).interrupted is None


def test_cached_views_are_those_of_the_code_that_augments(quick_config, tmp_path):
    own = tmp_path / "level.py"
    augment = dataclasses.replace(quick_config.augment, extra=(str(own),))
    config = dataclasses.replace(quick_config, augment=augment, features=FeaturesConfig(cached=True, views=1))
    dataset, rows, means = load_dataset(config.data), np.arange(4), []
    for value in (0, 255):
        own.write_text(AUGMENT.format(value=value))
        maps = FeatureMaps(config, dataset)
        means.append((maps.fingerprint(rows, 0), float(maps.maps(rows, 0).mean()), maps.fingerprint(rows)))
    assert means[0][0] != means[1][0]
    assert abs(means[0][1] - means[1][1]) > 1e-3
    assert means[0][2] == means[1][2], "images as they are do not depend on it"


def test_a_backbone_without_norms_is_cached(quick_config, tmp_path):
    (tmp_path / "bare.py").write_text(BARE)
    model = dataclasses.replace(quick_config.model, backbone=str(tmp_path / "bare.py"), weights=None)
    config = dataclasses.replace(quick_config, model=model, features=FeaturesConfig(cached=True))
    stages = (dataclasses.replace(config.stages[0], train=("attention", "head")),)
    result = train(dataclasses.replace(config, stages=stages))
    assert math.isfinite(result.metrics["val"]["loss"])
    assert "backbone" in load_run(result.run_dir).variables["params"]


def test_a_figure_that_is_no_number_at_first_is_not_the_best(quick_config, tmp_path):
    (tmp_path / "late.py").write_text(METRIC)
    name = str(tmp_path / "late.py")
    own = dataclasses.replace(quick_config.train, metrics=(name,), monitor="late")
    result = train(dataclasses.replace(quick_config, train=own))
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = [line["val/late"] for line in lines if line["kind"] == "epoch"]
    assert math.isnan(figures[0])
    best = next(line["step"] for line in lines if line["kind"] == "epoch" and not math.isnan(line["val/late"]))
    assert load_run(result.run_dir).step == best
