"""A run of two laboratories in one colour: trained, resumed, evaluated, and what it says of other images."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bmjax
from bmjax.cli.main import main
from bmjax.config import Config, DataConfig, HeadConfig, ModelConfig, StageConfig, TrainConfig
from bmjax.data.load import load_dataset
from bmjax.data.sources.synthetic import render
from bmjax.runs.records import read_predictions

SAID = "in the colours of all (data.match_colours)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laboratories")
    rows = ["path,label,laboratory"]
    for i in range(160):
        name, dark = ("EOS", "LYT")[i // 2 % 2], i % 2
        image = (render(name, 32, 0, i) * (0.7 if dark else 1.0)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{name},{'theirs' if dark else 'ours'}")
    (folder / "cells.csv").write_text("\n".join(rows))
    config = Config(
        name="both",
        run_dir=str(folder / "run"),
        data=DataConfig(source="table", root=str(folder / "cells.csv"), image_size=32, match_colours=True,
                        split=(0.5, 0.3, 0.2), stratify=True, cache_dir=str(folder / "cache")),
        model=ModelConfig(backbone="densenet_tiny", weights=None, attention="soft", head=HeadConfig(widths=(8,))),
        stages=(StageConfig(epochs=2),),
        train=TrainConfig(batch_size=16, devices=1, train_eval_epochs=0),
    )  # fmt: skip
    bmjax.train(config)
    return config


def test_it_is_evaluated_and_resumed_in_the_colours_it_was_trained_in(run):
    data = load_dataset(run.data)
    assert json.loads(Path(run.run_dir, "dataset.json").read_text())["fingerprint"] == data.fingerprint
    before = bmjax.evaluate(run.run_dir, "val")
    rows = {name: i for i, name in enumerate(data.ids)}
    found = read_predictions(run.run_dir, "val")
    probs = bmjax.predict_probs(bmjax.load_run(run.run_dir), data.images[[rows[name] for name in found.ids]])
    np.testing.assert_allclose(found.probs, probs, atol=1e-5)
    assert bmjax.train(run, resume=True).metrics["val"]["accuracy"] == before["accuracy"]
    table = Path(run.data.root).read_text()
    Path(run.data.root).write_text(table.replace("1.png,EOS,theirs", "1.png,EOS,ours", 1))
    with pytest.raises(ValueError, match="the run began with data"):
        bmjax.evaluate(run.run_dir, "val")
    Path(run.data.root).write_text(table)


def test_data_from_python_are_trained_on_as_they_are(run, tmp_path):
    data = load_dataset(run.data)
    result = bmjax.train(dataclasses.replace(run, run_dir=str(tmp_path / "run")), data=data)
    assert result.metrics["val"]["n"] > 0


def test_other_images_in_their_own_colours_are_said(run, tmp_path, capsys):
    folder = tmp_path / "cells"
    folder.mkdir()
    (tmp_path / "explained").mkdir()
    for i in range(3):
        Image.fromarray(render("EOS", 32, 1, i)).save(folder / f"{i}.png")
    for arguments in (
        ["eval", run.run_dir, "--unseen", str(folder)],
        ["explain", run.run_dir, str(folder), "--out", str(tmp_path / "explained")],
        ["export", run.run_dir, "--out", str(tmp_path / "model.zip")],
        ["differential", run.run_dir, str(folder), "--out", str(tmp_path / "count.csv")],
        ["predict", run.run_dir, str(folder), "--error-rate", "0.4", "--out", str(tmp_path / "a.csv")],
    ):
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        assert code == 0, (arguments, said.err)
        assert SAID in said.err, arguments
    assert "those of validation were matched" in said.err
