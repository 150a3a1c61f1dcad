"""Nothing is lost: a run that is killed, or stopped by a signal, ends as if it had never been."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import OptimConfig, to_json
from bmjax.data.dataset import Dataset
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.folder import load_data, load_run
from bmjax.runs.state import TrainState
from bmjax.training.predict import evaluate, predict_probs
from bmjax.training.progress import StepLog
from bmjax.training.run import train
from tests.helpers.records import without_clocks

PROGRAM = "import sys; from pathlib import Path; import bmjax; from bmjax.config import from_json; "
PROGRAM += "bmjax.train(from_json(Path(sys.argv[1]).read_text()), resume=True)"


def final_leaves(run_dir):
    """Every array of the last checkpoint, by path, read without a template."""
    checkpoints = Checkpoints(Path(run_dir) / "checkpoints/last")
    arrays = checkpoints.raw(checkpoints.latest())
    checkpoints.close()
    return arrays


def assert_same_end(a, b):
    left, right = final_leaves(a), final_leaves(b)
    assert left.keys() == right.keys()
    assert len(left) > 50
    for path, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)
    for split in ("train", "val"):
        with np.load(Path(a) / f"predictions_{split}.npz") as p, np.load(Path(b) / f"predictions_{split}.npz") as q:
            np.testing.assert_array_equal(p["probs"], q["probs"])


def records(run_dir, kind):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def assert_same_record(a, b, steps):
    for kind in ("train", "epoch"):
        left, right = records(a, kind), records(b, kind)
        assert list(map(without_clocks, left)) == list(map(without_clocks, right))
    assert [r["step"] for r in records(a, "train")] == list(range(1, steps + 1)), "every step once, in order"


@pytest.fixture
def tiny_config(tiny_config):
    """Of two convolutions, with statistics recomputed after each epoch, which a resume has to do too."""
    model = dataclasses.replace(tiny_config.model, backbone="tests.helpers.net:Net", preprocess="tf")
    train = dataclasses.replace(tiny_config.train, recompute_statistics="always")
    return dataclasses.replace(tiny_config, model=model, train=train)


@pytest.fixture
def whole_run(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, run_dir=str(tmp_path / "whole"))
    return config, train(config)


def test_stopped_by_a_signal_at_any_point_and_resumed_is_bit_for_bit_one_run(tiny_config, whole_run, monkeypatch):
    whole, result = whole_run
    per_epoch = result.steps // 4
    # In the middle of an epoch, at its last step, at the end of the first stage, and in the second.
    stops = [per_epoch // 2, per_epoch, 2 * per_epoch, 3 * per_epoch + 1]
    original = StepLog.__call__

    def stop_at(self, step, *arguments):
        original(self, step, *arguments)
        if stops and step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepLog, "__call__", stop_at)
    for expected in list(stops):
        part = train(tiny_config, resume=True)
        assert part.interrupted == "SIGTERM"
        assert part.steps == expected
    end = train(tiny_config, resume=True)
    assert end.interrupted is None
    assert end.steps == result.steps
    assert_same_end(whole.run_dir, tiny_config.run_dir)
    assert_same_record(whole.run_dir, tiny_config.run_dir, result.steps)


def test_killed_at_random_steps_and_resumed_is_bit_for_bit_one_run(tiny_config, whole_run, tmp_path):
    whole, result = whole_run
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, checkpoint_steps=3))
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    seed = random.randrange(2**31)
    kills = sorted(random.Random(seed).sample(range(2, result.steps), 2))
    print(f"killed at {kills} (seed {seed})")
    log = Path(config.run_dir) / "metrics.jsonl"
    for at in kills:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)])
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count('"kind": "train"') >= at:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(config, resume=True)
    assert_same_end(whole.run_dir, config.run_dir)
    assert_same_record(whole.run_dir, config.run_dir, result.steps)


def test_resume_refuses_another_run(tiny_config):
    short = dataclasses.replace(tiny_config, stages=tiny_config.stages[:1])
    train(short)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(short)
    with pytest.raises(ValueError, match=r"fields that differ: seed, optim\.lr"):
        train(dataclasses.replace(short, seed=5, optim=dataclasses.replace(short.optim, lr=0.5)), resume=True)
    record = Path(short.run_dir) / "dataset.json"
    record.write_text(record.read_text().replace(json.loads(record.read_text())["fingerprint"], "0" * 64))
    with pytest.raises(ValueError, match="the run began with data 0000"):
        train(short, resume=True)


def test_a_loss_that_is_not_finite_stops_with_step_and_images(tiny_config, monkeypatch):
    config = dataclasses.replace(tiny_config, optim=OptimConfig(name="sgd", lr=1e30))
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*Images of the batch: .+"):
        train(config)


def test_a_finished_run_that_is_resumed_does_not_open_the_test_split_again(tiny_config):
    opening = dataclasses.replace(tiny_config.train, final_test=True)
    config = dataclasses.replace(tiny_config, stages=tiny_config.stages[:1], train=opening)
    first, again = train(config), train(config, resume=True)
    assert again.metrics == first.metrics
    assert len((first.run_dir / "openings.jsonl").read_text().splitlines()) == 1


def test_what_is_read_is_what_was_trained(tiny_config):
    result = train(dataclasses.replace(tiny_config, stages=tiny_config.stages[:1]))
    run = load_run(result.run_dir)
    again = evaluate(result.run_dir, "val")
    assert {k: v for k, v in again.items() if k in result.metrics["val"]} == result.metrics["val"]
    assert not (result.run_dir / "openings.jsonl").exists(), "training opened the test split"
    evaluate(result.run_dir, "test")
    assert len((result.run_dir / "openings.jsonl").read_text().splitlines()) == 1
    with np.load(result.run_dir / "predictions_test.npz") as saved:
        dataset = load_data(result.run_dir, run.config)[0]
        assert isinstance(dataset, Dataset)
        probs = predict_probs(run, np.asarray(dataset.images[saved["index"]]))
        np.testing.assert_allclose(probs, saved["probs"], atol=1e-6)


def test_threads_write_checkpoints_at_the_same_time(tmp_path):
    params = {"kernel": np.arange(40_000, dtype=np.float32)}

    def save(folder):
        for step in range(15):
            state = TrainState(jnp.int32(step), params, {}, (), None, jnp.zeros(2, jnp.uint32))
            checkpoints = Checkpoints(tmp_path / folder / str(step), one_at_a_time=True)
            checkpoints.save(state, {"step": step})
            checkpoints.close()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(save, "abc"))
    for folder in "abc":
        for step in range(15):
            checkpoints = Checkpoints(tmp_path / folder / str(step))
            assert checkpoints.meta(step) == {"step": step}
            checkpoints.close()


def test_frozen_backbone_stays_bit_equal_in_a_whole_stage(tiny_config):
    import jax

    from bmjax.model.create import create
    from bmjax.runs.folder import new_variables

    config = dataclasses.replace(tiny_config, stages=tiny_config.stages[:1])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=None))
    result = train(config)
    before = new_variables(config, create(config.model, 7))
    after = load_run(result.run_dir, "last").variables
    for kind in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, before[kind]["backbone"], after[kind]["backbone"])
        pairs = zip(jax.tree.leaves(before[kind]["head"]), jax.tree.leaves(after[kind]["head"]), strict=True)
        assert any(not np.array_equal(x, y) for x, y in pairs), kind
