"""Where a run, a cache and a file can't be kept is said before any work, in one line, with the path."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bmjax import environment
from bmjax.cli.output import check_out
from bmjax.runs.checkpoint import Checkpoints, Damaged
from bmjax.training.run import train
from tests.runs.test_checkpoint import read, save

ROOT = Path(__file__).resolve().parents[2]
LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lr[1e-3]", r"lr\[1e-3\]', which has a '\['.*expected a path without \* \? \[ .*: give another --run_dir"),
        ("a*", r"a\*', which has a '\*'"),
        ("what?", r"what\?', which has a '\?'"),
        (LATIN, r"caf\\xe9', which is not UTF-8; expected a path that is"),
    ],
    ids=["bracket", "star", "question", "bytes"],
)
def test_a_run_is_refused_where_no_checkpoint_can_be_kept(tiny_config, tmp_path, monkeypatch, name, says, resume):
    config = dataclasses.replace(tiny_config, run_dir=str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"^run_dir is '{tmp_path}/{says}") as e:
        train(config, resume=resume)
    assert "\n" not in str(e.value)
    assert str(e.value).isascii()
    assert not (tmp_path / name).exists()
    # The folder above it, or where a link leads.
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    for run_dir in ("runs/x", str(tmp_path / "link")):
        with pytest.raises(ValueError, match=rf"^run_dir is '{tmp_path}/"):
            train(dataclasses.replace(tiny_config, run_dir=run_dir), resume=resume)
    assert list((tmp_path / name).iterdir()) == []


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*", "what?", "50% {a} #1"])
def test_a_finished_run_is_read_in_any_folder_of_utf8(tmp_path, name):
    save(tmp_path / "last", 3)
    shutil.copytree(tmp_path / "last", tmp_path / name / "last")
    assert read(tmp_path / name / "last")[0] == 3


def test_what_is_saved_in_a_folder_that_is_not_refused_is_read(tmp_path):
    save(tmp_path / "50% {a} #1" / "last", 3)
    assert read(tmp_path / "50% {a} #1" / "last")[0] == 3


def test_a_run_in_a_folder_that_is_not_utf8_is_not_called_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"caf\\xe9/last', which is not UTF-8") as e:
        Checkpoints(tmp_path / LATIN / "last")
    assert not isinstance(e.value, Damaged)


def test_a_cache_that_is_not_utf8_is_refused_and_jax_is_not_told_of_it(tmp_path):
    code = "import os, bmjax; print(os.environ.get('JAX_COMPILATION_CACHE_DIR')); bmjax.environment.cache_folder()"
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    for given, told in ((tmp_path / LATIN, None), (tmp_path / "own", tmp_path / "own/jax")):
        env |= {"PYTHONPATH": str(ROOT), "BMJAX_CACHE": str(given)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout == f"{told}\n", done.stderr
        said = f"ValueError: the cache (BMJAX_CACHE) is '{tmp_path}/caf\\xe9', which is not UTF-8"
        assert (said in done.stderr) == (told is None), done.stderr


def test_the_default_cache_counts_too(tmp_path, monkeypatch):
    monkeypatch.delenv("BMJAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / LATIN))
    with pytest.raises(ValueError, match=r"caf\\xe9/\.cache/bmjax', which is not UTF-8"):
        environment.cache_folder()


def test_a_file_is_refused_whose_library_takes_utf8_alone(tmp_path):
    for ending in (".parquet", ".onnx", ".PARQUET"):
        with pytest.raises(ValueError, match=rf"^--out is '{tmp_path}/caf\\xe9\{ending}', which is not UTF-8"):
            check_out(tmp_path / f"{LATIN}{ending}")
    for ending in (".csv", ".zip", ".json", ".html"):
        check_out(tmp_path / f"{LATIN}{ending}")
