"""Folds share caches, go on where they stopped, and their interval covers."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bmjax.analysis.compare.statistics import corrected_resampled_interval, corrected_resampled_t
from bmjax.analysis.evaluate import folds
from bmjax.cli.main import main
from bmjax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    HeadConfig,
    ModelConfig,
    StageConfig,
    TrainConfig,
    to_json,
)
from bmjax.training.features import FeatureMaps


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    return Config(
        name="folds",
        run_dir=str(folder / "run"),
        data=DataConfig(image_size=32, synthetic_per_class=12, stratify=True, cache_dir=str(folder / "cache")),
        augment=AugmentConfig(flip=False, right_angles=False),
        model=ModelConfig(backbone="densenet_tiny", weights=None, head=HeadConfig(widths=(8,))),
        stages=(StageConfig(epochs=1, train=("attention", "head")),),
        features=FeaturesConfig(cached=True),
        train=TrainConfig(batch_size=16, devices=1, train_eval_epochs=0),
    )


def test_one_command_trains_every_fold_once(config, capsys, monkeypatch, tmp_path):
    computed = []
    write = FeatureMaps._write
    monkeypatch.setattr(
        FeatureMaps,
        "_write",
        lambda self, path, rows, *rest: computed.append(len(rows)) or write(self, path, rows, *rest),
    )
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    assert main(["folds", str(file), "--k", "2", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert computed == [84], "the maps of all images once for all folds and repetitions"
    kept = json.loads((tmp_path.parent / config.run_dir / "folds.json").read_text())
    assert [(row["repeat"], row["fold"]) for row in kept["rows"]] == [(r, f) for r in (0, 1) for f in (0, 1)]
    assert sum(row["n"] for row in kept["rows"]) == 2 * 84
    mean, low, high = kept["means"]["accuracy"]
    assert mean == pytest.approx(np.mean([row["accuracy"] for row in kept["rows"]]))
    ratio = 1 * (0.7 + 0.15) / 0.7  # images tested by over images trained on, without those of validation
    expected = corrected_resampled_interval([row["accuracy"] for row in kept["rows"]], ratio)
    assert (low, high) == pytest.approx((max(expected[0], 0), min(expected[1], 1)))
    assert f"accuracy           {mean:.3f} ({low:.3f} to {high:.3f})" in out
    assert "all 84 images of the first repetition" in out
    every = folds.left_out(folds.Folds(**kept))
    np.testing.assert_array_equal(every.index, np.arange(84))
    assert folds.groups_of(folds.Folds(**kept), every) == []
    # Again: everything is read, nothing trained.
    monkeypatch.setattr("bmjax.training.run.fit", None)
    assert folds.run_folds(config, 2, 2).rows == kept["rows"]
    # Of data with groups, split.csv has them; here as if it had.
    manifest = Path(kept["rows"][0]["run_dir"]) / "split.csv"
    rows = list(csv.DictReader(manifest.read_text().splitlines()))
    with manifest.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"group": row["path"][-5]} for row in rows)
    assert folds.groups_of(folds.Folds(**kept), every) == [str(name)[-5] for name in every.ids]


def test_folds_that_fail_in_training_are_named_and_the_others_trained(config, capsys, monkeypatch, tmp_path):
    train_run, run = folds.train_run, tmp_path / "run"

    def fails(one, **options):
        if one.data.fold == 0:
            one = dataclasses.replace(one, optim=dataclasses.replace(one.optim, lr=1e30))
            options["prepared"] = None  # whose programs have the other rate
        return train_run(one, **options)

    monkeypatch.setattr(folds, "train_run", fails)
    file = tmp_path / "config.json"
    file.write_text(to_json(dataclasses.replace(config, run_dir=str(run))))
    assert main(["folds", str(file), "--k", "2"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"1 of 2 folds failed in training: repetition 0, fold 0 ({run}/repeat0-fold0): step 2: loss" in err
    assert "What helps: other settings, under another --name" in err
    assert (run / "repeat0-fold1/results.json").exists(), "the other went on"
    assert not (run / "folds.json").exists()
    # A folder of other settings fails before its first step: the fold is named all the same.
    monkeypatch.setattr(folds, "train_run", train_run)
    assert main(["folds", str(file), "--k", "2"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"repetition 0, fold 0 ({run}/repeat0-fold0): " in err
    assert "fields that differ: optim.lr" in err


def test_wrong_numbers_are_named(config):
    for k, repeats, message in ((1, 1, "--k is 1"), (3, 0, "--repeats is 0")):
        with pytest.raises(ValueError, match=message):
            folds.fold_configs(config, k, repeats)
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, folds=4))
    with pytest.raises(ValueError, match="folds' is 4; expected 0"):
        folds.fold_configs(own, 3, 1)


def test_the_interval_covers_the_accuracy_of_such_training_sets():
    """A nearest-mean classifier of 60 images over 5 folds twice: 95 % or more, and Student's t would fall short."""

    def draw(rng, n):
        labels = rng.integers(0, 2, n)
        return labels, rng.normal(size=(n, 10)) + 0.45 * labels[:, None] * (np.arange(10) < 4)

    def accuracy(train, test):
        means = np.stack([train[1][train[0] == c].mean(0) for c in (0, 1)])
        return (((test[1][:, None] - means) ** 2).sum(-1).argmin(1) == test[0]).mean()

    rng = np.random.default_rng(0)
    test = draw(rng, 20_000)
    truth = np.mean([accuracy(draw(rng, 48), test) for _ in range(300)])
    held, plain, repeats = 0, 0, 200
    for _ in range(repeats):
        labels, x = draw(rng, 60)
        values = []
        for _ in range(2):
            fold = rng.permutation(60) % 5
            values += [accuracy((labels[fold != f], x[fold != f]), (labels[fold == f], x[fold == f])) for f in range(5)]
        low, high = corrected_resampled_interval(values, 1 / 4)
        held += low <= truth <= high
        low, high = corrected_resampled_interval(values, 0)
        plain += low <= truth <= high
    assert held / repeats >= 0.93
    assert plain < held


def test_the_interval_and_the_test_agree():
    values = np.array([0.02, 0.05, -0.01, 0.04, 0.03])
    for level in (0.8, 0.95, 0.99):
        low, high = corrected_resampled_interval(values.tolist(), 0.25, level)
        assert (corrected_resampled_t(values, 0.25) < 1 - level) == (low > 0 or high < 0)
    with pytest.raises(ValueError, match="expected at least two"):
        corrected_resampled_interval([0.5], 0.25)
