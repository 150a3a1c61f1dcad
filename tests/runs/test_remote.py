"""A run that W&B keeps is read by its name, as the folder it was; its code runs only when it is trusted."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bmjax
from bmjax.cli import main
from bmjax.runs import identity
from bmjax.runs.tables import run_files
from bmjax.runs.tracking import local_run
from tests.helpers.experiments import write_experiment
from tests.helpers.wandb_files import inspect

NAME = "wandb:lab/bmjax/best-a1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, made by the command line, whose W&B is offline."""
    folder = tmp_path_factory.mktemp("remote")
    fields = "stages=(StageConfig(epochs=1),), train=TrainConfig(batch_size=16, devices=1)"
    experiment = write_experiment(folder, f"{fields}, tracking=TrackingConfig(wandb='offline')")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / name.lower()))
        assert main(["train", str(experiment)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def logged(trained):
    """The files of the model that W&B was given, by their names in the artifact: where W&B keeps them."""
    (folder,) = trained.glob("wandb/offline-run-*")
    (artifact,) = [a for a in inspect(folder, "artifact") if a["name"].startswith("best-")]
    assert artifact["type"] == "model"
    return {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}


@pytest.fixture
def store(logged, monkeypatch, tmp_path):
    """A stand-in for W&B's store: one artifact, with the files that W&B was given. Returns it."""
    import wandb

    files, asked = dict(logged), []

    def download(root):
        for name, path in files.items():
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / root / name)
        return root

    artifact = types.SimpleNamespace(digest="d1", manifest=types.SimpleNamespace(entries=files), download=download)
    api = types.SimpleNamespace(artifact=lambda name: asked.append(name) or artifact)
    monkeypatch.setattr(wandb, "Api", lambda: api)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "bmjax_cache"))
    return types.SimpleNamespace(files=files, asked=asked, download=download)


def test_training_hands_over_the_whole_run_and_its_page(trained, logged):
    names = set(logged)
    assert names == {path.relative_to(trained).as_posix() for path in run_files(trained)}
    assert {"config.json", "split.csv", "report.html", "model_card.md", "predictions_val.npz", "reference.npz"} <= names
    assert any(name.startswith("checkpoints/best/") for name in names)
    assert not any(name.startswith(("checkpoints/last", "wandb", "profile")) for name in names)
    assert list(trained.glob("wandb/offline-run-*/files/media/html/report*.html"))


def test_predict_reads_a_run_by_its_name(trained, store, tmp_path, capsys):
    images = tmp_path / "cells"
    images.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(images / f"{i}.png")
    store.download(tmp_path / "by hand")  # as `wandb artifact get` does
    for run, out in ((trained, "here.csv"), (NAME, "there.csv"), (tmp_path / "by hand", "by hand.csv")):
        assert main(["predict", str(run), str(images), "--out", str(tmp_path / out)]) == 0
        assert (tmp_path / out).read_text() == (tmp_path / "here.csv").read_text()
    assert store.asked == ["lab/bmjax/best-a1:latest"]
    assert main(["report", NAME + ":v3", "--no-maps", "--out", str(tmp_path / "r.html")]) == 0
    assert store.asked[-1] == "lab/bmjax/best-a1:v3"
    assert (tmp_path / "r.html").stat().st_size > 50_000
    capsys.readouterr()


def test_a_downloaded_run_vouches_for_nothing(store, monkeypatch, tmp_path):
    """Its id and checksums are known to whoever may read it: they are no proof that this user made it."""
    folder = local_run(NAME)
    assert folder.is_relative_to(identity.downloads())
    config = json.loads((folder / "config.json").read_text())
    config["model"]["attention"] = str(folder / "evil.py")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    identity._vouch(identity.read_environment(folder))
    monkeypatch.setitem(store.files, "config.json", folder / "config.json")
    monkeypatch.setattr(shutil, "copyfile", lambda *_: None)
    refused = pytest.raises(PermissionError, match=r"evil\.py\), and you did not train it here; expected --trust")
    with refused:
        bmjax.load_run(NAME)
    folder.rename(tmp_path / "downloaded by hand")  # its configuration names code that was not recorded with the id
    with refused:
        bmjax.load_run(tmp_path / "downloaded by hand")


@pytest.mark.parametrize("name", ["../evil.py", "/etc/passwd", "a\\..\\b"])
def test_a_file_outside_the_folder_is_refused(store, name):
    store.files[name] = None
    with pytest.raises(ValueError, match=r"wandb:lab/bmjax/best-a1: .* expected names within a run's folder"):
        local_run(NAME)


def test_a_file_that_stands_elsewhere_is_refused(store):
    store.files["config.json"] = types.SimpleNamespace(ref="file:///etc/passwd")
    with pytest.raises(ValueError, match=r"its file 'config\.json' stands elsewhere, at 'file:///etc/passwd'"):
        local_run(NAME)


def test_what_is_no_run_is_said(store, monkeypatch, tmp_path):
    del store.files["config.json"]
    with pytest.raises(ValueError, match=r"it holds no config\.json; expected a run that bmjax logged as a model"):
        local_run(NAME)
    for name in ("wandb:best", "wandb:a/b/c/d", "wandb:a/b/c:v1:v2", "wandb:"):
        with pytest.raises(ValueError, match="names no artifact; expected wandb:ENTITY/PROJECT/NAME"):
            local_run(name)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="there is no key of W&B; expected WANDB_API_KEY"):
        local_run(NAME)
