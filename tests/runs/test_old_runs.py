"""Runs of version 0.1 as it stood before the package had its rooms: they load, evaluate, predict and resume.

tests/fixtures/run_of_0_1.zip holds two of them, of one configuration: `whole` is finished, `part` was stopped by a
signal at step 6 of 21.
"""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import bmjax
from bmjax.config.experiment import load_experiment
from bmjax.runs.records import read_records

FIXTURE = Path(__file__).parents[1] / "fixtures/run_of_0_1.zip"


@pytest.fixture
def old(tmp_path):
    with zipfile.ZipFile(FIXTURE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_it_loads_evaluates_and_predicts(old):
    run = bmjax.load_run(old / "whole")
    recorded = json.loads((old / "whole/results.json").read_text())
    assert run.step == recorded["val"]["step"]
    with np.load(old / "whole/predictions_val.npz") as saved:
        probs, index = saved["probs"], saved["index"]
    again = bmjax.evaluate(old / "whole", "val")
    assert again["accuracy"] == recorded["val"]["accuracy"]
    assert again["loss"] == pytest.approx(recorded["val"]["loss"], abs=1e-5)
    images = bmjax.load_dataset(run.config.data).images[index]
    np.testing.assert_allclose(bmjax.predict_probs(run, images), probs, atol=1e-5)


def test_it_resumes_to_where_it_would_have_ended(old):
    config, _ = load_experiment(str(old / "part"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, devices=1))
    result = bmjax.train(config, resume=True)
    assert result.steps == 21
    records = read_records(old / "part", "train")
    assert [r["step"] for r in records] == list(range(1, 22)), "every step once"
    whole = read_records(old / "whole", "train")
    np.testing.assert_allclose([r["loss"] for r in records], [r["loss"] for r in whole], rtol=1e-3)
    assert read_records(old / "part", "epoch")[0]["epoch"] == 1
