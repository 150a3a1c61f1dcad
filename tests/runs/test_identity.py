"""A run is identified by all that made it: versions, devices, the command, and the user's own files."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import bmjax
from bmjax.cli.main import main
from bmjax.config import to_json
from bmjax.files import checksum
from bmjax.runs.folder import read_config
from bmjax.runs.identity import part_names, read_environment

VARIANT = """
import flax.linen as nn

class Half(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        self.sow("intermediates", "map", nn.sigmoid(x.mean((1, 2))))
        return x * {factor} * self.param("scale", nn.initializers.ones_init(), (1, 1, 1, x.shape[-1]))
"""
SECRETS = {"WANDB_API_KEY": "0" * 39 + "secret", "AWS_SECRET_ACCESS_KEY": "very-secret", "HF_TOKEN": "hf_secret"}


@pytest.fixture
def trained(quick_config, tmp_path, monkeypatch):
    """A run of one epoch with an attention of one's own, keys planted in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    variant = tmp_path / "half.py"
    variant.write_text(VARIANT.format(factor=0.5))
    model = dataclasses.replace(quick_config.model, attention=str(variant))
    config = dataclasses.replace(quick_config, model=model, stages=quick_config.stages[1:])
    config = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], epochs=1),))
    return bmjax.train(config), variant


def probabilities(run_dir):
    run = bmjax.load_run(run_dir)
    return bmjax.predict_probs(run, bmjax.load_dataset(run.config.data).images[:8])


def test_environment_names_what_made_the_run(trained):
    result, variant = trained
    found = read_environment(result.run_dir)
    session = found["sessions"][0]
    assert set(session["versions"]) >= {"bmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    assert all(session["versions"][name] for name in ("jax", "jaxlib", "flax", "optax"))
    assert len(session["devices"]) == 4
    assert session["hosts"] == 1
    assert session["command"]
    assert session["kernels"]
    assert "xla_force_host_platform_device_count" in session["flags"]["XLA_FLAGS"]
    entry = found["files"][str(variant)]
    assert entry["sha256"] == checksum(variant, "sha256")
    assert (result.run_dir / entry["copy"]).read_bytes() == variant.read_bytes()
    assert len(found["run_id"]) == 12


def test_no_secret_is_written(trained):
    result, _ = trained
    for path in result.run_dir.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(value.encode() in data for value in SECRETS.values()), path


def test_a_changed_file_does_not_change_the_run(trained, caplog):
    result, variant = trained
    before = probabilities(result.run_dir)
    variant.write_text(VARIANT.format(factor=7.0))
    after = probabilities(result.run_dir)
    np.testing.assert_array_equal(before, after)
    assert "has changed since the run was trained; the run's own copy is used" in caplog.text
    variant.unlink()
    np.testing.assert_array_equal(probabilities(result.run_dir), before)
    assert "is not there any more" in caplog.text


def test_a_copy_that_is_not_the_recorded_one_is_refused(trained):
    result, variant = trained
    (copy,) = (result.run_dir / "code").rglob("half.py")
    copy.write_text(VARIANT.format(factor=3.0))
    variant.write_text(VARIANT.format(factor=7.0))
    with pytest.raises(ValueError, match=r"half\.py is not as the run recorded it"):
        bmjax.load_run(result.run_dir)


def test_a_resume_adds_its_session_and_keeps_the_id(trained):
    result, _ = trained
    first = read_environment(result.run_dir)
    shutil.rmtree(result.run_dir / "checkpoints")
    (result.run_dir / "results.json").unlink()
    config = read_config(result.run_dir)
    bmjax.train(dataclasses.replace(config, run_dir=str(result.run_dir)), resume=True)
    again = read_environment(result.run_dir)
    assert again["run_id"] == first["run_id"]
    assert len(again["sessions"]) == 2


def test_a_run_is_read_from_any_folder_on_any_number_of_devices(quick_config, tmp_path, monkeypatch):
    """Data by a relative root, two devices; then from elsewhere, on one and on all four."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "cells" / name).mkdir(parents=True)
        for i in range(24):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"cells/{name}/{i}.png")
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(quick_config.data, source="folder", root="cells")
    train = dataclasses.replace(quick_config.train, devices=2)
    stages = (dataclasses.replace(quick_config.stages[1], epochs=1),)
    result = bmjax.train(dataclasses.replace(quick_config, data=data, train=train, stages=stages))
    assert json.loads((result.run_dir / "config.json").read_text())["data"]["root"] == "cells"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    expected = result.metrics["val"]
    for devices in (1, None):
        again = bmjax.evaluate(result.run_dir, "val", devices=devices)
        assert again["accuracy"] == expected["accuracy"]
        assert again["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    shutil.move(tmp_path / "cells", tmp_path / "moved")
    assert bmjax.evaluate(result.run_dir, "val", data_root=str(tmp_path / "moved"))["n"] == expected["n"]
    config = read_config(result.run_dir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(tmp_path / "moved")))
    bmjax.train(dataclasses.replace(config, run_dir=str(result.run_dir)), resume=True)
    assert read_config(result.run_dir).data.root == str(tmp_path / "moved"), "also of a finished run"
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "own"))
    (tmp_path / "file").touch()
    data = dataclasses.replace(read_config(result.run_dir).data, cache_dir=str(tmp_path / "file/cache"))
    (result.run_dir / "config.json").write_text(to_json(dataclasses.replace(config, data=data)))
    assert bmjax.evaluate(result.run_dir, "val", trust=True)["n"] == expected["n"]
    assert (tmp_path / "own/images").is_dir(), "the training machine's cache folder can't be made here"


def test_code_of_a_run_from_elsewhere_runs_only_when_trusted(trained, tmp_path, monkeypatch):
    result, variant = trained
    marker = tmp_path / "ran"
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "another_user"))
    variant.write_text(f"open({str(marker)!r}, 'w').close()\n" + VARIANT.format(factor=0.5))
    with pytest.raises(PermissionError, match=r"runs code of its own \(.*half\.py.*\).*expected --trust"):
        bmjax.load_run(result.run_dir)
    with pytest.raises(PermissionError):
        bmjax.evaluate(result.run_dir)
    assert main(["predict", str(result.run_dir), str(tmp_path), "--out", str(tmp_path / "x.csv")]) == 2
    assert not marker.exists()
    assert bmjax.load_run(result.run_dir, trust=True).step > 0
    assert not marker.exists(), "the changed file is not run either: the run has its own copy"


def test_every_kind_of_part_is_recorded():
    config = bmjax.Config()
    model = dataclasses.replace(config.model, attention="se+a.py", backbone="b:Net", head="c.py:Head", weights=None)
    config = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, source="d:listing"),
        optim=dataclasses.replace(config.optim, name="e.py", lr=0.1),
        train=dataclasses.replace(config.train, loss="f.py", metrics=("g:kappa",)),
        augment=dataclasses.replace(config.augment, extra=("h.py:blur",)),
    )
    assert part_names(config) == ["a.py", "b:Net", "c.py:Head", "d:listing", "f.py", "e.py", "g:kappa", "h.py:blur"]
