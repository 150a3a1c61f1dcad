"""The verbs, from a configuration to predictions; wrong input is one clear line and status 2."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bmjax.cli.main import main
from bmjax.config import from_json
from bmjax.data.load import load_dataset
from bmjax.data.sources.folder import image_files
from bmjax.runs.records import read_records
from tests.helpers.experiments import write_experiment


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, made by the command line, with the test split opened once."""
    folder = tmp_path_factory.mktemp("cli")
    fields = "stages=(StageConfig(epochs=3),), train=TrainConfig(batch_size=16, final_test=True)"
    report = "def report(result):\n    print('reported', result.run_dir)\n"
    experiment = write_experiment(folder, fields, report)
    assert main(["train", str(experiment), "--stages.0.epochs", "1"]) == 0
    return folder


def test_train_leaves_a_whole_run(trained):
    run = trained / "run"
    config = from_json((run / "config.json").read_text())
    assert config.stages[0].epochs == 1
    names = "config.json dataset.json split.csv metrics.jsonl results.json report.html model_card.md openings.jsonl"
    for name in names.split():
        assert (run / name).stat().st_size > 0, name
    results = json.loads((run / "results.json").read_text())
    assert results.keys() == {"train", "val", "test"}
    assert len((run / "openings.jsonl").read_text().splitlines()) == 1
    waits = [r["input_wait"] for r in read_records(run, "epoch")]
    assert len(waits) == 1
    assert 0 < waits[0] < 1
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 2, "a sheet of cells, and mistakes"
    assert f"{results['test']['accuracy']:.3f}" in page


def test_eval_prints_n_and_interval_and_counts_openings(trained, capsys):
    assert main(["eval", str(trained / "run"), "--split", "test"]) == 0
    out = capsys.readouterr().out
    results = json.loads((trained / "run/results.json").read_text())["test"]
    assert f"n {results['n']}, accuracy {results['accuracy']:.3f} ({results['accuracy_low']:.3f} to" in out
    assert "rows: true" in out
    assert len((trained / "run/openings.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predict_names_each_file_and_keeps_the_row_of_a_bad_one(trained, tmp_path, capsys, ending):
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
    assert [row["path"].rsplit("/", 1)[1] for row in table] == [*(f"{i}.png" for i in range(5)), "bad.png"]
    bad = table.pop()
    assert "not an image" in bad["error"]
    assert not any(bad[name] for name in ("predicted", *dataset.classes))
    assert not any(row["error"] for row in table)
    got = [[float(row[c]) for c in dataset.classes] for row in table]
    np.testing.assert_allclose(got, probs, atol=1e-5)
    assert [row["predicted"] for row in table] == [dataset.classes[i] for i in probs.argmax(-1)]
    assert main(["predict", str(trained / "run"), str(tmp_path), "--out", str(out), "--strict"]) == 1


def test_predict_of_one_file_pads_no_further(trained, tmp_path, capsys):
    path = tmp_path / "one.png"
    Image.fromarray(np.full((40, 50), 200, np.uint8)).save(path)  # grey, and no square
    out = tmp_path / "o.csv"
    assert main(["predict", str(trained / "run"), str(path), "--out", str(out), "--which", "last"]) == 0
    (row,) = list(csv.DictReader(out.read_text().splitlines()))
    assert row["path"] == str(path)
    assert sum(float(v) for k, v in row.items() if k not in ("path", "predicted")) == pytest.approx(1, abs=1e-4)
    path.write_text("no image")
    assert main(["predict", str(trained / "run"), str(path), "--out", str(out)]) == 1
    assert "1 of 1 images can't be read" in capsys.readouterr().err
    assert [row["path"] for row in csv.DictReader(out.read_text().splitlines())] == [str(path)]


def test_image_files_pass_over_hidden_ones_and_take_what_is_named(tmp_path):
    for name in ("b.PNG", "a/c.jpg", ".hidden.png", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in image_files([str(tmp_path)])] == ["a/c.jpg", "b.PNG"]
    assert image_files([str(tmp_path / "notes.txt")]) == [tmp_path / "notes.txt"], "named, so it is tried"
    with pytest.raises(ValueError, match="holds no image"):
        image_files(
            [str(tmp_path / ".cache"), str(tmp_path / "a"), str((tmp_path / "empty").mkdir() or tmp_path / "empty")]
        )


def test_show_prints_layers_norms_and_cost_without_training(trained, capsys):
    assert main(["show", str(trained / "experiment.py"), "--train.batch_size", "8"]) == 0
    out = capsys.readouterr().out
    for text in (
        '"batch_size": 8',
        "backbone/conv1",
        "batch-norm: backbone train",
        "GFLOP",
        "MB temporary",
        "train.precision default, float32 on this cpu",
    ):
        assert text in out
    assert "7 classes (rendered cells)" in out


def test_show_tells_what_trains_in_each_stage(trained, capsys):
    flags = ["--stages.0.train", "head", "--stages.0.batch-norm.backbone", "stats_frozen", "--no-compile"]
    assert main(["show", str(trained / "experiment.py"), *flags, "--classes", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 classes (given)" in out
    assert "GFLOP" not in out
    rows = {
        line.split()[0]: [w.replace(",", "") for w in line.split()[1:]] for line in out.splitlines() if line.strip()
    }
    assert rows["head/logits"] == ["27", "0", "0", "27"]  # 8 widths and a bias, three times
    assert rows["backbone/conv1"][3] == "0"
    assert int(rows["all"][3]) == sum(int(v[3]) for k, v in rows.items() if k.startswith("head/"))
    assert "batch-norm: backbone stats_frozen, attention frozen, head train" in out


def test_a_run_folder_is_an_experiment(trained, capsys):
    assert main(["show", str(trained / "run"), "--no-compile"]) == 0
    assert f'"run_dir": "{trained / "run"}"' in capsys.readouterr().out


def test_resume_of_a_finished_run_by_its_folder(trained):
    assert main(["train", str(trained / "run"), "--resume", "--train.final-test", "false"]) == 0


def test_eval_rewrites_the_report(trained, capsys):
    (trained / "run/report.html").unlink()
    assert main(["eval", str(trained / "run"), "--split", "val", "--which", "last"]) == 0
    assert "(last checkpoint, step " in capsys.readouterr().out
    assert (trained / "run/report.html").exists()


def test_report_adds_maps_and_sets_runs_side_by_side(trained, capsys):
    run, page = str(trained / "run"), trained / "run/report.html"
    openings = (trained / "run/openings.jsonl").read_text()
    assert main(["report", run]) == 0
    assert "over the cell in grey" in page.read_text()
    assert main(["report", run, run, "--no-maps", "--out", str(trained / "two.html")]) == 0
    assert "over the cell in grey" not in (trained / "two.html").read_text()
    assert "Paired differences" in (trained / "two.html").read_text()
    assert (trained / "run/openings.jsonl").read_text() == openings, "a report opens no split"
    assert main(["report", run, "--no-images"]) == 0
    assert "data:image" not in page.read_text()
    assert main(["report", run, "--out", str(trained / "none" / "r.html")]) == 2
    assert main(["report", str(trained)]) == 2
    assert "config.json is not there; expected the folder of a run" in capsys.readouterr().err


def test_a_report_without_its_data_says_so(trained, tmp_path, capsys):
    for name in ("config.json", "environment.json", "results.json", "predictions_test.npz"):
        shutil.copyfile(trained / "run" / name, tmp_path / name)
    shutil.copytree(trained / "run/checkpoints/best", tmp_path / "checkpoints/best")
    record = json.loads((trained / "run/dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path}: no cells are shown (" in said
    assert "the run began with data 0000000000000000" in said
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_help_and_usage_of_verbs(capsys):
    for verb in ("train", "show"):
        assert main([verb, "--help"]) == 0
        assert f"bmjax {verb} EXPERIMENT --help" in " ".join(capsys.readouterr().out.split())
        with pytest.raises(SystemExit, match="2"):
            main([verb])
        assert "expected an experiment, as in" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["list", "attention", "--all"])
    assert "unrecognized arguments: --all" in capsys.readouterr().err


def test_errors_keep_their_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("BMJAX_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="no such experiment"):
        main(["train", "nowhere.py"])


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


def test_predict_checks_its_output_before_it_works(trained, capsys):
    assert main(["predict", str(trained / "run"), str(trained), "--out", "/nowhere/x.csv"]) == 2
    assert "there is no folder /nowhere" in capsys.readouterr().err


def test_train_names_the_verb_that_sweeps(trained, capsys):
    assert main(["train", str(trained / "experiment.py"), "--sweep"]) == 2
    assert "has become a verb of its own; expected: bmjax sweep " in capsys.readouterr().err


def test_version_and_help_need_no_jax():
    code = "import sys; from bmjax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run, which a test may change."""
    return shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))


def test_explain_draws_and_scores_the_most_wrong_cells(copied, capsys):
    assert main(["explain", str(copied), "--n", "5", "--target", "true"]) == 0
    out = capsys.readouterr().out
    record = json.loads((copied / "explain_val_wrong.json").read_text())
    assert record["rule"] in out
    assert record["maps"].keys() == {"attention", "Grad-CAM", "Grad-CAM++", "edges", "constant", "centre"}
    for name in ("edges", "constant", "centre"):
        assert not record["maps"][name]["passes"]
        assert record["maps"][name]["rank_correlation"] == pytest.approx({"head": 1, "whole": 1})
    with np.load(copied / "predictions_val.npz") as saved:
        probs, labels, ids, classes = (saved[k] for k in ("probs", "labels", "ids", "classes"))
    assert len(record["cells"]) == 5
    for cell in record["cells"]:
        i = int(np.flatnonzero(ids == cell["id"])[0])
        assert (cell["true"], cell["target"]) == (classes[labels[i]],) * 2
        assert cell["predicted"] == classes[probs[i].argmax()] != cell["true"]
        assert cell["probability"] == pytest.approx(probs[i, labels[i]], abs=1e-5)
    with Image.open(copied / "explain_val_wrong.png") as picture:
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("RGB")).std() > 10


def test_explain_opens_the_test_split_only_when_told_and_records_it(copied, capsys):
    def openings():
        return len((copied / "openings.jsonl").read_text().splitlines())

    before = openings()
    assert main(["explain", str(copied), "--n", "2", "--cells", "confident", "--no-scores"]) == 0
    assert openings() == before
    assert main(["explain", str(copied), "--n", "2", "--split", "test", "--no-scores"]) == 0
    assert openings() == before + 1
    assert f"the test split is opened for time {before + 1}" in capsys.readouterr().err


def test_explain_opens_no_test_split_without_its_data(copied, capsys, monkeypatch):
    def gone(run, root):
        raise FileNotFoundError(f"{root} is not there")

    monkeypatch.setattr("bmjax.training.predict.data_of", gone)
    before = (copied / "openings.jsonl").read_text()
    assert main(["explain", str(copied), "--n", "2", "--split", "test", "--no-scores", "--data.root", "WRONG"]) == 2
    assert "WRONG is not there" in capsys.readouterr().err
    assert (copied / "openings.jsonl").read_text() == before, "an opening is recorded, and nothing was read"


def test_explain_takes_files_and_another_stage(copied, tmp_path, capsys):
    path = tmp_path / "cell.png"
    Image.fromarray(np.full((40, 50, 3), 200, np.uint8)).save(path)
    out = tmp_path / "out"
    out.mkdir()
    assert main(["explain", str(copied), str(path), "--stage", "conv2", "--out", str(out), "--no-scores"]) == 0
    record = json.loads((out / "explain_images.json").read_text())
    assert (record["stage"], record["split"], record["cells"][0]["true"]) == ("conv2", None, None)
    assert [cell["id"] for cell in record["cells"]] == [str(path)]
    for arguments, message in (
        ([str(path), "--target", "true"], "--target true is for cells of a split"),
        (["--stage", "conv9"], "unknown stage of the backbone 'conv9'"),
        (["--n", "0"], "--n is 0; expected at least 1"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
        (["--out", str(out / "nowhere")], "there is no such folder"),
    ):
        assert main(["explain", str(copied), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_explain_wants_the_predictions_of_its_checkpoint(copied, capsys):
    results = json.loads((copied / "results.json").read_text())
    results["val"]["step"] += 1
    (copied / "results.json").write_text(json.dumps(results))
    assert main(["explain", str(copied)]) == 2
    assert f"`bmjax eval {copied} --split val --which best` makes them" in capsys.readouterr().err
    (copied / "predictions_train.npz").unlink()
    assert main(["explain", str(copied), "--split", "train"]) == 2
    assert "holds no predictions of train" in capsys.readouterr().err
