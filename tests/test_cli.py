"""The verbs, from a configuration to predictions; wrong input is one clear line and status 2."""

import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bmjax.cli import load_experiment, main, override
from bmjax.config import Config, from_json, to_json
from bmjax.data import load_dataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, made by the command line, with the test split opened once."""
    folder = tmp_path_factory.mktemp("cli")
    experiment = folder / "experiment.py"
    experiment.write_text(
        "from bmjax.config import *\n"
        "def config():\n"
        f"    return Config(name='cli', run_dir={str(folder / 'run')!r},\n"
        f"        data=DataConfig(image_size=32, synthetic_per_class=20, cache_dir={str(folder / 'cache')!r}),\n"
        "        model=ModelConfig(backbone='densenet_tiny', weights=None, head=HeadConfig(widths=(8,))),\n"
        "        stages=(StageConfig(epochs=3),), train=TrainConfig(batch_size=16, final_test=True))\n"
        "def report(result):\n"
        "    print('reported', result.run_dir)\n"
        "def sweep():\n"
        "    yield {'optim.lr': 0.01, 'name': 'a'}\n"
        "    yield {'optim.lr': 0.1, 'name': 'b'}\n"
    )
    assert main(["train", str(experiment), "--stages.0.epochs", "1"]) == 0
    return folder


def test_train_leaves_a_whole_run(trained):
    run = trained / "run"
    config = from_json((run / "config.json").read_text())
    assert config.stages[0].epochs == 1
    names = "config.json dataset.json split.csv metrics.jsonl results.json report.html openings.jsonl"
    for name in names.split():
        assert (run / name).stat().st_size > 0, name
    results = json.loads((run / "results.json").read_text())
    assert results.keys() == {"train", "val", "test"}
    assert len((run / "openings.jsonl").read_text().splitlines()) == 1
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert f"{results['test']['accuracy']:.3f}" in page


def test_eval_prints_n_and_interval_and_counts_openings(trained, capsys):
    assert main(["eval", str(trained / "run"), "--split", "test"]) == 0
    out = capsys.readouterr().out
    results = json.loads((trained / "run/results.json").read_text())["test"]
    assert f"n {results['n']}, accuracy {results['accuracy']:.3f} ({results['accuracy_low']:.3f} to" in out
    assert "rows: true" in out
    assert len((trained / "run/openings.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predict_names_each_file_and_skips_bad_ones(trained, tmp_path, capsys, ending):
    import pyarrow.parquet

    config = from_json((trained / "run/config.json").read_text())
    dataset = load_dataset(config.data)
    with np.load(trained / "run/predictions_val.npz") as saved:
        rows, probs = saved["index"][:5], saved["probs"][:5]
    for i, row in enumerate(rows):
        Image.fromarray(np.asarray(dataset.images[row])).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_text("no image")
    out = tmp_path / f"out.{ending}"
    assert main(["predict", str(trained / "run"), str(tmp_path), "--out", str(out)]) == 0
    assert "bad.png" in capsys.readouterr().err
    if ending == "csv":
        with out.open() as f:
            table = list(csv.DictReader(f))
    else:
        table = pyarrow.parquet.read_table(out).to_pylist()
    assert [row["path"].rsplit("/", 1)[1] for row in table] == [f"{i}.png" for i in range(5)]
    got = [[float(row[c]) for c in dataset.classes] for row in table]
    np.testing.assert_allclose(got, probs, atol=1e-5)
    assert [row["predicted"] for row in table] == [dataset.classes[i] for i in probs.argmax(-1)]
    assert main(["predict", str(trained / "run"), str(tmp_path), "--out", str(out), "--strict"]) == 1


def test_show_prints_layers_norms_and_cost_without_training(trained, capsys):
    assert main(["show", str(trained / "experiment.py"), "--train.batch_size", "8"]) == 0
    out = capsys.readouterr().out
    for text in ('"batch_size": 8', "backbone/conv1", "batch-norm: backbone train", "GFLOP", "MB temporary"):
        assert text in out


def test_list_and_doctor(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("soft", "cbam", "densenet169", "adadelta", "densenet121-keras"):
        assert name in out
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "OK    jaxlib" in out
    assert "FAIL" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.py"], "nowhere.py: no such experiment"),
        (["eval", "nowhere"], "nowhere/config.json is not there"),
        (["predict", "nowhere", "x", "--out", "x.txt"], "--out is 'x.txt'"),
        (["train", "EXPERIMENT", "--model.attention", "cban"], "unknown attention 'cban'; did you mean 'cbam'"),
        (["train", "EXPERIMENT", "--model.backbone", "densenet12"], "did you mean 'densenet121'"),
        (["train", "EXPERIMENT", "--model.attach", "conv9"], "unknown stage of densenet_tiny"),
        (["train", "EXPERIMENT", "--train.batch-size", "0"], "'train.batch_size' is 0; expected >= 1"),
        (["train", "EXPERIMENT"], "holds a run already"),
    ],
)
def test_wrong_input_is_one_clear_line(trained, capsys, arguments, message):
    arguments = [str(trained / "experiment.py") if a == "EXPERIMENT" else a for a in arguments]
    try:
        code = main(arguments)
    except SystemExit as e:
        code = e.code
    assert code == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--optim.lrr", "1"], "optim.lr"), (["--optim.lr", "fast"], "could not convert"), (["--seed", "x"], "invalid")],
)
def test_wrong_fields_are_refused_with_a_suggestion(capsys, arguments, message):
    with pytest.raises(SystemExit):
        override(Config(), arguments, "bmjax train x.py")
    assert message in capsys.readouterr().err


def test_every_kind_of_field_is_overridden():
    config = override(
        Config(),
        [
            "--seed",
            "3",
            "--data.strict",
            "True",
            "--data.split",
            "0.5",
            "0.25",
            "0.25",
            "--model.weights",
            "None",
            "--model.attach",
            "conv4",
            "last",
            "--optim.lr",
            "0.1",
            "--stages.0.train",
            "head",
            "--augment.rotate",
            "10",
            "--train.early-stop-epochs",
            "4",
            "--stages.0.batch-norm.head",
            "stats_frozen",
            "--model.head.widths",
            "64",
        ],
        "bmjax",
    )
    assert (config.seed, config.data.strict, config.data.split) == (3, True, (0.5, 0.25, 0.25))
    assert (config.model.weights, config.model.attach) == (None, ("conv4", "last"))
    assert (config.optim.lr, config.stages[0].train, config.train.early_stop_epochs) == (0.1, ("head",), 4)
    assert config.stages[0].batch_norm.head == "stats_frozen"
    assert from_json(to_json(config)) == config


def test_sweep_runs_each_override(trained, monkeypatch):
    from bmjax import cli

    seen = []
    monkeypatch.setattr(cli, "_train_one", lambda config, module, resume: seen.append(config) or 0)
    assert main(["train", str(trained / "experiment.py"), "--sweep", "--seed", "7"]) == 0
    assert [(c.name, c.optim.lr, c.seed) for c in seen] == [("a", 0.01, 7), ("b", 0.1, 7)]
    assert len({c.run_dir for c in seen}) == 2


def test_shipped_experiments_round_trip_to_json():
    import pathlib

    folder = pathlib.Path(__file__).parents[1] / "experiments"
    files = sorted(folder.glob("*.py"))
    assert len(files) >= 2
    for file in files:
        config, module = load_experiment(str(file))
        assert from_json(to_json(config)) == config
        assert module is not None
        assert f"bmjax train experiments/{file.name}" in (module.__doc__ or "")
        assert dataclasses.is_dataclass(config)


def test_version_and_help_need_no_jax():
    code = "import sys; from bmjax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
