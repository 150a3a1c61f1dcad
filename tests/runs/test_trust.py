"""Caches, kernels and copies of code are used only where they are this user's own, and as they were written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmjax import environment
from bmjax.config import DataConfig
from bmjax.data.images import cache
from bmjax.data.load import load_dataset
from bmjax.environment import why_foreign

ROOT = Path(__file__).resolve().parents[2]
IMAGE = np.ones((4, 4, 3), np.uint8)


def test_whose_a_folder_is(tmp_path, monkeypatch):
    assert why_foreign(tmp_path / "none") is None
    tmp_path.chmod(0o755)
    assert why_foreign(tmp_path) is None
    tmp_path.chmod(0o777)
    assert why_foreign(tmp_path) == "can be written by others"
    tmp_path.chmod(0o775)
    assert why_foreign(tmp_path) is None
    monkeypatch.setattr(os, "getgid", lambda: tmp_path.stat().st_gid + 1)
    assert why_foreign(tmp_path) == "can be written by others"
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert why_foreign(tmp_path) == f"belongs to another user (uid {tmp_path.stat().st_uid})"
    with pytest.raises(PermissionError, match=r"belongs to another user .*set BMJAX_CACHE or data\.cache_dir"):
        environment.check_own_cache(tmp_path)


def test_a_cache_that_others_may_write_is_not_read(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match=r"cache can be written by others, .*\(chmod go-w\)"):
        load_dataset(DataConfig(image_size=32, synthetic_per_class=2, cache_dir=str(folder)))


def test_a_part_of_the_cache_that_others_may_write_is_made_again(tmp_path, caplog):
    read = [cache.cached(tmp_path, "k" * 64, 1, 4, [IMAGE], progress=False)[0] for _ in range(2)]
    assert caplog.text == ""
    (tmp_path / ("k" * 32)).chmod(0o777)
    read.append(cache.cached(tmp_path, "k" * 64, 1, 4, [2 * IMAGE], progress=False)[0])
    assert "can be written by others" in caplog.text
    assert [int(images.max()) for images in read] == [1, 1, 2]


@pytest.mark.parametrize("place", [0, 130, -1, -9, -50])
def test_one_flipped_bit_of_the_cache_is_seen(tmp_path, caplog, place):
    cache.cached(tmp_path, "k" * 64, 1, 4, [IMAGE], progress=False)
    path = tmp_path / ("k" * 32) / "images.npy"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    images, _ = cache.cached(tmp_path, "k" * 64, 1, 4, [IMAGE], progress=False)
    assert np.array_equal(images, IMAGE[None])
    assert "damaged" in caplog.text
    assert "rebuilt" in caplog.text


def test_inverted_bytes_of_the_cache_are_seen(tmp_path, caplog):
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    cache.cached(tmp_path, "k" * 64, 1, 128, [image], progress=False)
    path = tmp_path / ("k" * 32) / "images.npy"
    data = np.fromfile(path, np.uint8)
    data[1000:21000] ^= 255
    data.tofile(path)
    images, _ = cache.cached(tmp_path, "k" * 64, 1, 128, [image], progress=False)
    np.testing.assert_array_equal(images, image[None])
    assert "damaged" in caplog.text


def prepared(folder):
    """What a process says that prepares the kernels from this folder."""
    code = "import logging, sys; logging.basicConfig(level=30, stream=sys.stdout, format='%(message)s')\n"
    code += (
        "from bmjax.layers import prepare; prepare()\nfrom bmjax.layers.dispatch import described; print(described())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_kernels_of_others_and_damaged_ones_are_not_loaded(tmp_path):
    from bmjax.cpu.build import build

    if (whole := build().path) is None:
        pytest.skip("no compiler here")
    native = tmp_path / "native"
    shutil.copytree(whole.parent, native)
    native.chmod(0o700)
    assert prepared(tmp_path).startswith("kernels, ")
    native.chmod(0o777)
    said = prepared(tmp_path)
    assert "can be written by others, so nothing is loaded from it" in said
    assert "not used: " in said.splitlines()[-1]


def test_a_kernel_that_is_not_as_it_was_compiled_is_compiled_again(tmp_path, monkeypatch, caplog):
    from bmjax.cpu import build

    library = tmp_path / "kernels-1.so"
    assert not build._is_own(library)
    library.write_bytes(b"code")
    assert not build._is_own(library), "one of a version before the digests"
    library.with_suffix(".sha256").write_text(build.checksum(library, "sha256"))
    assert build._is_own(library)
    library.write_bytes(b"cods")
    assert not build._is_own(library)
    assert "kernels-1.so is not as it was compiled" in caplog.text


def test_a_copy_of_code_lies_in_the_runs_folder(tmp_path):
    from bmjax.config import Config, ModelConfig
    from bmjax.runs.identity import as_recorded

    (tmp_path / "run/code").mkdir(parents=True)
    (tmp_path / "evil.py").write_text("raise SystemExit\n")
    entry = {"file": "/nowhere/mine.py", "sha256": "0", "copy": "../evil.py"}
    (tmp_path / "run/environment.json").write_text(json.dumps({"files": {"/nowhere/mine.py": entry}}))
    config = Config(model=ModelConfig("densenet_tiny", None, attention="/nowhere/mine.py"))
    with pytest.raises(
        ValueError, match=r"environment\.json: the copy of /nowhere/mine\.py is '\.\./evil\.py'; expected in code/"
    ):
        as_recorded(config, tmp_path / "run")
