"""Damaged records of a run are named, with what to do; what a killed process left half written goes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bmjax.config import Config, to_json
from bmjax.data.dataset import Dataset
from bmjax.runs.folder import load_run, owned, read_config, recorded_split, saved_results
from bmjax.runs.identity import read_environment

IMAGES = Dataset.from_arrays(np.zeros((4, 4, 4, 3), np.uint8), ["A", "B"] * 2)
READ = {
    "config.json": read_config,
    "dataset.json": lambda run_dir: recorded_split(run_dir, IMAGES),
    "results.json": saved_results,
    "environment.json": read_environment,
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[1]", b"null"])
def test_a_damaged_record_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*expected|{name}: "):
        READ[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", "{}"),
        ("dataset.json", '{"fingerprint": 3}'),
        ("results.json", '{"val": 3}'),
        ("results.json", '{"val": {}}'),
        ("environment.json", '{"files": {"a": {}}}'),
        ("environment.json", '{"files": [1]}'),
        ("environment.json", '{"resolved": {"data.root": ["a"]}}'),
    ],
)
def test_a_record_that_lacks_an_entry_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        READ[name](tmp_path)


@pytest.mark.parametrize("classes", [["A", 2], ["A", "A"], ["B", "A"], ["A"], [], "AB", None])
def test_damaged_classes_are_named_before_the_network_is_made(tmp_path, classes):
    """They name the outputs, so that another order would give each cell another's name."""
    (tmp_path / "config.json").write_text(to_json(Config()))
    counts = {split: {"A": 1, "B": 1} for split in ("train", "val", "test")}
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": classes, "counts": counts}))
    with pytest.raises(ValueError, match=r"dataset\.json is damaged: its .*classes.*as `bmjax train` wrote"):
        load_run(tmp_path, trust=True)
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["A", "B"], "counts": counts}))
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load_run(tmp_path, trust=True)


def test_what_a_dead_process_left_half_written_goes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, live, other = (tmp_path / f".results.json.{end}" for end in (dead.pid, os.getpid(), "copy"))
    for path in (left, live, other):
        path.touch()
    with owned(tmp_path):
        assert [path.exists() for path in (left, live, other)] == [False, True, True]


def test_what_a_kill_within_a_write_left_goes(tmp_path):
    die = "import os, pathlib, sys; from bmjax.files import write_text; os.replace = lambda *_: os._exit(9); "
    die += "write_text(pathlib.Path(sys.argv[1]), 'half')"
    assert subprocess.run([sys.executable, "-c", die, tmp_path / "results.json"], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with owned(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
