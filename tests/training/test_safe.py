"""A run loses nothing to an error, to time between epochs, or to a damaged checkpoint; and it says so."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import bmjax
from bmjax.config import StageConfig
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.records import read_records
from bmjax.training.keeper import Keeper
from tests.helpers.records import without_clocks


@pytest.fixture
def config(quick_config):
    """One short stage on images."""
    train = dataclasses.replace(quick_config.train, accumulate=1, devices=1)
    return dataclasses.replace(quick_config, stages=(StageConfig(epochs=2, train=("attention", "head")),), train=train)


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def whole(config, kept, tmp_path_factory):
    """The run that nothing happened to, trained once."""
    if not kept:
        kept["run"] = tmp_path_factory.mktemp("whole") / "run"
        bmjax.train(dataclasses.replace(config, run_dir=str(kept["run"])))
    return kept["run"]


def same_end(a, b):
    one, other = (Checkpoints(Path(run) / "checkpoints/last") for run in (a, b))
    assert one.latest() == other.latest()
    left, right = (c.raw(c.steps()[0]) for c in (one, other))
    for path, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)
    for kind in ("train", "epoch"):
        left, right = (list(map(without_clocks, read_records(run, kind))) for run in (a, b))
        assert left == right


class OnceOrAlways:
    """A callback that fails at a step."""

    def __init__(self, step, always=False):
        self.step, self.always = step, always

    def __call__(self, event):
        if event.kind == "step" and (event.step == self.step or (self.always and event.step > self.step)):
            raise RuntimeError("the callback fails")


@pytest.mark.parametrize("always", [False, True])
def test_an_error_within_an_epoch_costs_no_step(config, whole, caplog, always):
    with pytest.raises(RuntimeError, match="the callback fails"):
        bmjax.train(config, callbacks=[OnceOrAlways(3, always)])
    assert Checkpoints(Path(config.run_dir) / "checkpoints/last").latest() == (None if always else 4)
    assert ("came at step 4, which is saved" in caplog.text) is not always
    bmjax.train(config, resume=True)
    same_end(whole, config.run_dir)


def test_an_error_in_an_evaluation_costs_no_step(config, whole, monkeypatch):
    from bmjax.training.predict import Predictor

    monkeypatch.setattr(Predictor, "metrics", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bmjax.train(config)
    monkeypatch.undo()
    per_epoch = Checkpoints(whole / "checkpoints/last").steps()[0] // 2
    assert Checkpoints(Path(config.run_dir) / "checkpoints/last").latest() == per_epoch
    bmjax.train(config, resume=True)
    same_end(whole, config.run_dir)


def test_a_checkpoint_is_written_where_one_is_due_by_time(config, whole, monkeypatch):
    saved, original = [], Keeper.last

    def last(self, state, progress):
        saved.append(int(state.step))
        original(self, state, progress)

    monkeypatch.setattr(Keeper, "last", last)
    often = dataclasses.replace(config.train, checkpoint_minutes=1e-9)
    result = bmjax.train(dataclasses.replace(config, train=often))
    assert sorted(set(saved)) == list(range(1, result.steps + 1))
    same_end(whole, config.run_dir)


def test_a_damaged_checkpoint_is_said_and_the_run_goes_on_from_the_one_before(config, whole, caplog):
    first = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint_steps=3))
    with pytest.raises(RuntimeError, match="the callback fails"):
        bmjax.train(first, callbacks=[OnceOrAlways(8)])
    folder = Path(config.run_dir) / "checkpoints/last"
    newest, before = Checkpoints(folder).steps()
    for path in (folder / str(newest)).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    bmjax.train(config, resume=True)
    assert f"{folder}/{newest} is damaged: " in caplog.text
    assert f"the checkpoint before it, of step {before}, is used" in caplog.text
    same_end(whole, config.run_dir)
    for path in (Path(config.run_dir) / "checkpoints/best").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints/best/\d+ is damaged: .*train it again"):
        bmjax.load_run(config.run_dir)
