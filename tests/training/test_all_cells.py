"""Training without a test or a validation split: nothing is reported on what was trained on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import bmjax
from bmjax.analysis.compare.compare import compare
from bmjax.analysis.report.report import figure_result, write_report, write_reports
from bmjax.analysis.sweep.cells import cells_of
from bmjax.analysis.sweep.run import run_sweep
from bmjax.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from bmjax.data.load import check_sides
from bmjax.runs.records import read_records


def config(folder, split, **train):
    return Config(
        name="all",
        run_dir=str(folder / "run"),
        data=DataConfig(
            image_size=32, synthetic_per_class=6, split=split, stratify=True, cache_dir=str(folder / "cache")
        ),
        model=ModelConfig(backbone="densenet_tiny", weights=None, head=HeadConfig(widths=(8,))),
        stages=(StageConfig(epochs=2),),
        train=TrainConfig(batch_size=16, devices=1, **train),
    )


def test_on_all_cells_the_last_epoch_is_kept_and_nothing_reported(tmp_path):
    one = config(tmp_path, (1.0, 0.0, 0.0))
    result = bmjax.train(one)
    assert result.metrics == {}
    assert not (result.run_dir / "results.json").exists()
    assert not list(result.run_dir.glob("predictions_*"))
    records = read_records(result.run_dir, "epoch")
    assert len(records) == 2
    assert not any(key.startswith("val/") or key == "train/accuracy_eval_mode" for r in records for key in r)
    best, last = (bmjax.load_run(result.run_dir, which) for which in ("best", "last"))
    assert best.step == last.step == result.steps
    jax.tree.map(np.testing.assert_array_equal, best.variables, last.variables)
    assert bmjax.predict_probs(best, np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 7)
    assert "no results yet" not in write_report(result.run_dir).read_text()
    bmjax.evaluate(result.run_dir, "train")
    for page in (write_report(result.run_dir), result.run_dir / "model_card.md"):
        assert "nothing is reported on the images that were trained on" in page.read_text()
        assert "95 % interval" not in page.read_text()
    with pytest.raises(FileNotFoundError, match="a split that it was not trained on"):
        figure_result(result.run_dir, np.zeros((1, 32, 32, 3), np.uint8), tmp_path / "a.png")
    other = bmjax.train(dataclasses.replace(one, run_dir=str(tmp_path / "other"), seed=1)).run_dir
    bmjax.evaluate(other, "train")
    write_reports([result.run_dir, other], tmp_path / "both.html")
    beside = (tmp_path / "both.html").read_text()
    assert "not all evaluated on validation, or all on test" in beside
    (result.run_dir / "results.json").unlink()
    again = bmjax.train(one, resume=True)
    assert (again.steps, again.metrics) == (result.steps, {})
    counts = json.loads((result.run_dir / "dataset.json").read_text())["counts"]
    assert sum(counts["train"].values()) == 42
    with pytest.raises(ValueError, match="holds no image"):
        bmjax.evaluate(result.run_dir, "val")


def test_with_a_validation_split_alone_it_chooses_as_ever(tmp_path):
    result = bmjax.train(config(tmp_path, (0.8, 0.2, 0.0)))
    assert set(result.metrics) == {"train", "val"}


@pytest.mark.parametrize("split", [(1.0, 0.0, 0.0), (0.8, 0.0, 0.2)])
def test_a_sweep_and_a_comparison_need_validation_before_they_train(tmp_path, split):
    one = config(tmp_path, split)
    with pytest.raises(ValueError, match=r"data\.split.* leaves no image to val.*a sweep goes by val"):
        run_sweep(one, cells_of(one, [{"seed": 0}]))
    with pytest.raises(ValueError, match=r"leaves no image to val.*a comparison goes by val and test"):
        compare(one, ["se"], seeds=1)
    with pytest.raises(ValueError, match=r"leaves no image to test"):
        compare(config(tmp_path, (0.85, 0.15, 0.0)), ["se"], seeds=1)
    check_sides(dataclasses.replace(config(tmp_path, (0.85, 0.15, 0.0)).data, folds=5), ("val", "test"), "folds")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ((0.8, 0.2, 0.0), {"train": {"final_test": True}}, r"train\.final_test.*holds no image"),
        ((1.0, 0.0, 0.0), {"train": {"early_stop_epochs": 2}}, r"train\.early_stop_epochs"),
        ((1.0, 0.0, 0.0), {"optim": OptimConfig(schedule=ScheduleConfig("plateau"))}, r"optim\.schedule\.kind"),
    ],
)
def test_what_needs_a_split_is_refused_before_anything_is_written(tmp_path, split, changes, message):
    one = config(tmp_path, split, **changes.pop("train", {}))
    with pytest.raises(ValueError, match=message):
        bmjax.train(dataclasses.replace(one, **changes))
    assert not (tmp_path / "run").exists()
