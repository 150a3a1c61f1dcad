"""The loop's stretches, its callbacks, and how both engines resume."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bmjax
from bmjax.config import AugmentConfig, FeaturesConfig, StageConfig
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.identity import read_environment
from bmjax.runs.records import read_records
from bmjax.training.progress import Recorder
from bmjax.training.stages import Stretch, stretches
from tests.helpers.records import without_clocks

PLANS = [SimpleNamespace(start=0, end=8), SimpleNamespace(start=8, end=12)]


def test_stretches_cover_every_step_once():
    plain = list(stretches(PLANS, 4, 0, 0))
    assert plain == [Stretch(0, 0, 4, True), Stretch(0, 4, 8, True), Stretch(1, 8, 12, True)]
    assert list(stretches(PLANS, 4, 8, 2)) == plain[2:]
    # Stopped between an epoch's last step and its evaluation.
    assert list(stretches(PLANS, 4, 8, 1)) == [Stretch(0, 8, 8, True), Stretch(1, 8, 12, True)]
    assert list(stretches(PLANS, 4, 12, 2)) == [Stretch(1, 12, 12, True)]
    assert list(stretches(PLANS, 4, 12, 3)) == []
    for every in (1, 2, 3, 5, 100):
        for start in range(13):
            found = list(stretches(PLANS, 4, start, start // 4, every))
            assert [k for s in found for k in range(s.start, s.end)] == list(range(start, 12))
            assert all(s.ends_epoch == (s.end % 4 == 0) for s in found)
            assert all(s.end % every == 0 or s.ends_epoch for s in found)


@pytest.fixture
def maps_config(tiny_config):
    """Cached features, two stages, everything that a resume must bring back."""
    stages = (StageConfig(epochs=2, train=("attention", "head")), StageConfig(epochs=2, train=("head",), lr_scale=0.3))
    train = dataclasses.replace(tiny_config.train, accumulate=1, final_test=True)
    off = AugmentConfig(flip=False, right_angles=False)
    return dataclasses.replace(tiny_config, stages=stages, train=train, augment=off, features=FeaturesConfig(True))


def arrays(run_dir):
    checkpoints = Checkpoints(run_dir / "checkpoints/last")
    found = checkpoints.raw(checkpoints.latest())
    checkpoints.close()
    return found


def test_cached_features_resume_as_images_do(maps_config, tmp_path, monkeypatch):
    """Stopped by a signal in every epoch: the same record, the same arrays, the same run id."""
    monkeypatch.setattr("bmjax.training.run._MAPS_CHECKPOINT_SECONDS", 0.0)
    whole = bmjax.train(dataclasses.replace(maps_config, run_dir=str(tmp_path / "whole")))
    per_epoch = whole.steps // 4
    stops = [per_epoch, 2 * per_epoch, 3 * per_epoch]
    original = Recorder.step

    def stop_at(self, step, *arguments):
        original(self, step, *arguments)
        if stops and step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "step", stop_at)
    ids = set()
    for expected in list(stops):
        part = bmjax.train(maps_config, resume=True)
        assert (part.interrupted, part.steps) == ("SIGTERM", expected)
        ids.add(read_environment(part.run_dir)["run_id"])
    end = bmjax.train(maps_config, resume=True)
    assert end.steps == whole.steps
    assert len(ids) == 1
    one, other = arrays(whole.run_dir), arrays(end.run_dir)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)
    for kind in ("train", "epoch"):
        pair = [list(map(without_clocks, read_records(run, kind))) for run in (whole.run_dir, end.run_dir)]
        assert pair[0] == pair[1]
    assert json.loads((whole.run_dir / "results.json").read_text()) == json.loads(
        (end.run_dir / "results.json").read_text()
    )
    # The last checkpoint, too, is that of a whole network.
    assert bmjax.evaluate(end.run_dir, "val", "last")["n"] == whole.metrics["val"]["n"]


@pytest.mark.parametrize("name", ["maps_config", pytest.param("tiny_config", marks=pytest.mark.slow)])
def test_a_finished_run_keeps_its_best_checkpoint_alone_where_told_to(name, request, tmp_path, monkeypatch):
    config = request.getfixturevalue(name)
    train = dataclasses.replace(config.train, keep_last=False)
    whole = bmjax.train(dataclasses.replace(config, run_dir=str(tmp_path / "whole")))
    step = Recorder.step

    def stop_at(self, at, *arguments):
        step(self, at, *arguments)
        if at == whole.steps // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "step", stop_at)
    config = dataclasses.replace(config, train=train)
    assert bmjax.train(config).interrupted == "SIGTERM"
    run = Path(config.run_dir)
    assert (run / "checkpoints/last").is_dir()
    monkeypatch.undo()
    assert bmjax.train(config, resume=True).metrics == whole.metrics
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["best"]
    # Again, it is finished; and one killed before its results were there is trained again.
    assert bmjax.train(config, resume=True).metrics == whole.metrics
    (run / "results.json").unlink()
    assert bmjax.train(config, resume=True).metrics == whole.metrics
    assert len(read_records(run, "epoch")) == len(read_records(whole.run_dir, "epoch"))
    assert bmjax.evaluate(run, "val")["accuracy"] == whole.metrics["val"]["accuracy"]


def test_a_map_run_is_resumed_within_an_epoch(maps_config, tmp_path, monkeypatch):
    monkeypatch.setattr("bmjax.training.run._MAPS_CHECKPOINT_SECONDS", 0.0)
    whole = bmjax.train(dataclasses.replace(maps_config, run_dir=str(tmp_path / "whole")))
    train = dataclasses.replace(maps_config.train, checkpoint_steps=2)
    other = bmjax.train(dataclasses.replace(maps_config, train=train))
    losses = [[r["loss"] for r in read_records(run.run_dir, "train")] for run in (whole, other)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_callbacks_see_the_run_and_can_end_it(tiny_config):
    seen = []

    def watch(event):
        seen.append((event.kind, event.step))
        if event.kind == "step":
            assert {"loss", "lr", "images_per_second"} <= event.figures.keys()
            with pytest.raises(RuntimeError, match="has no variables"):
                event.variables()
        else:
            assert event.variables()["params"].keys() == {"backbone", "attention", "head"}
        return event.kind == "epoch" and event.figures["epoch"] == 2

    result = bmjax.train(tiny_config, callbacks=[watch])
    per_epoch = result.steps // 2
    assert [s for kind, s in seen if kind == "step"] == list(range(1, result.steps + 1))
    assert [s for kind, s in seen if kind == "epoch"] == [per_epoch, 2 * per_epoch]
    assert seen[0] == ("start", 0)
    assert seen[-1] == ("end", result.steps)
    assert result.metrics.keys() == {"train", "val"}
    # Ended so, the run is finished: a resume leaves it as it is.
    again = bmjax.train(tiny_config, resume=True)
    assert (again.steps, again.metrics) == (result.steps, result.metrics)


def kappa(labels, probs):
    """A metric of one's own."""
    return float((probs.argmax(-1) == labels).mean() * 2 - 1)


def test_a_metric_of_ones_own_is_computed_recorded_and_selects(tiny_config):
    train = dataclasses.replace(tiny_config.train, metrics=(kappa,), monitor="-kappa")
    assert train.metrics == (f"{__name__}:kappa",)
    result = bmjax.train(dataclasses.replace(tiny_config, train=train, stages=tiny_config.stages[1:]))
    values = [r["val/kappa"] for r in read_records(result.run_dir, "epoch")]
    assert result.metrics["val"]["kappa"] == min(values), "the smallest is the best after a minus sign"
    for m in result.metrics.values():
        assert m["kappa"] == pytest.approx(2 * m["accuracy"] - 1)


def test_statistics_that_lag_behind_few_steps_are_said_with_the_remedy():
    from bmjax.config.training import BatchNormConfig
    from bmjax.training.stages import StagePlan
    from bmjax.training.statistics import statistics_lag

    def plan(start, end, mode="train"):
        return StagePlan(start, end, BatchNormConfig(mode, mode, mode), lambda path: True, None)

    # 402 images, 3 epochs: accuracy 0.14 beside 0.38 running.
    said = statistics_lag([plan(0, 39)], 39, 0.38, 0.14)
    assert "accuracy is 0.38 in training and 0.14 in evaluation: after 39 steps" in said
    assert "hold 68 %" in said
    assert "(train.recompute_statistics always), train for 299 steps or more" in said
    assert "stages.batch_norm.backbone stats_frozen" in said
    for plans, running, evaluated in (
        ([plan(0, 39)], 0.38, 0.30),  # no gap worth a word
        ([plan(0, 39)], 0.38, 0.60),
        ([plan(0, 400)], 0.9, 0.3),  # enough steps: it is something else
        ([plan(0, 39, "stats_frozen")], 0.38, 0.14),
        ([plan(0, 10, "frozen"), plan(10, 400)], 0.9, 0.3),
    ):
        assert statistics_lag(plans, plans[-1].end, running, evaluated) is None
    assert "after 29 steps" in statistics_lag([plan(0, 10, "frozen"), plan(10, 400)], 39, 0.9, 0.3)
