"""Damaged records of a run are named, with what to do; what a killed process left half written goes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from bmjax.data.dataset import Dataset
from bmjax.runs.folder import owned, read_config, recorded_split, saved_results
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
