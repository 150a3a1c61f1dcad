"""`bmjax differential` counts a folder, lists what is undecided, and says what its intervals rest on."""

import csv

import numpy as np
import pytest
from PIL import Image

from bmjax.analysis.evaluate.looks import looks
from bmjax.analysis.evaluate.reference import Reference, write_reference
from bmjax.cli.main import main
from bmjax.runs.folder import save_arrays, save_results
from bmjax.runs.records import read_predictions
from bmjax.training.predict import predict_probs
from tests.helpers.small_run import CLASSES, SIZE, keep_calibration, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("differential") / "run")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """12 images, and a file that is none."""
    folder = tmp_path_factory.mktemp("smear")
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d} <i>.png")
    (folder / "bad.png").write_bytes(b"none")
    return folder


def count(monkeypatch, run, cells, out, *more):
    monkeypatch.setattr("bmjax.runs.folder.load_run", lambda *arguments, **options: run)
    return main(["differential", str(run.run_dir), str(cells), "--out", str(out), *more])


def table(path):
    with path.open(newline="", errors="surrogateescape") as f:
        return list(csv.DictReader(f))


def test_a_row_for_each_class_and_for_each_undecided_cell(run, cells, tmp_path, monkeypatch, capsys):
    out = tmp_path / "d.csv"
    assert count(monkeypatch, run, cells, out, "--undecided", "1") == 0
    rows = table(out)
    assert [row["class"] for row in rows] == list(CLASSES)
    assert sum(int(row["count"]) for row in rows) == 12
    assert sum(float(row["raw_percent"]) for row in rows) == pytest.approx(100, abs=0.02)
    assert sum(float(row["adjusted_percent"]) for row in rows) == pytest.approx(100, abs=0.02)
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["adjusted_percent"]) <= float(row["high"]) <= 100
        assert row["undecided"] == row["count"]
    review = table(tmp_path / "d_review.csv")
    assert len(review) == 12
    sure = [float(row["probability"]) for row in review]
    assert sure == sorted(sure)
    assert all(float(row["second_probability"]) <= p for row, p in zip(review, sure, strict=True))
    told = capsys.readouterr()
    assert "confusion matrix of val: n 90, accuracy 0." in told.out
    assert "12 of 12 cells are undecided (probability below 1.000)" in told.out
    assert "1 of 13 images can't be read" in told.err


def test_a_cell_counts_once_however_often_it_is_given(run, cells, tmp_path, monkeypatch, capsys):
    once, again = tmp_path / "once.csv", tmp_path / "again.csv"
    (tmp_path / "link").symlink_to(cells, target_is_directory=True)
    assert count(monkeypatch, run, cells, once) == 0
    assert "again" not in capsys.readouterr().err
    assert count(monkeypatch, run, cells, again, str(cells / "bad.png"), str(tmp_path / "link")) == 0
    assert table(again) == table(once)
    assert "14 files were given again, and are counted once" in capsys.readouterr().err


def test_the_test_split_goes_first_where_it_was_opened(run, cells, tmp_path, monkeypatch, capsys):
    probs = np.eye(3, dtype=np.float32)
    named = {"index": np.arange(3), "ids": np.array(["a", "b", "c"]), "classes": CLASSES}
    save_arrays(run.run_dir, "test", probs=probs, labels=np.arange(3), **named)
    save_results(run.run_dir, "test", {"step": 7})
    assert count(monkeypatch, run, cells, tmp_path / "d.csv") == 0
    told = capsys.readouterr().out
    assert "of test: n 3, accuracy 1.000" in told
    assert "Fewer than 10 labelled cells" in told
    save_results(run.run_dir, "test", {"step": 8})  # of another checkpoint
    assert count(monkeypatch, run, cells, tmp_path / "d.csv") == 0
    assert "of val: n 90" in capsys.readouterr().out


def test_a_threshold_for_an_error_rate_and_a_calibration(run, cells, tmp_path, monkeypatch, capsys):
    assert count(monkeypatch, run, cells, tmp_path / "d.csv", "--error-rate", "0.4") == 0
    assert "(probability below 0.800)" in capsys.readouterr().out, "all of validation has 0.8"
    keep_calibration(run)
    assert count(monkeypatch, run, cells, tmp_path / "d.csv", "--error-rate", "0.4") == 0
    calibrated = 0.8**0.5 / (0.8**0.5 + 2 * 0.1**0.5)
    assert f"(probability below {calibrated:.3f})" in capsys.readouterr().out
    assert count(monkeypatch, run, cells, tmp_path / "d.csv", "--error-rate", "0.01") == 2
    assert "90 validation images show no threshold" in capsys.readouterr().err


def test_foreign_looking_cells_are_told(run, cells, tmp_path, monkeypatch, capsys):
    plain = looks(np.full((20, SIZE, SIZE, 3), 200, np.uint8))
    write_reference(run.run_dir, Reference.of_looks(plain))
    assert count(monkeypatch, run, cells, tmp_path / "d.csv") == 0
    assert "these images look unlike those of training" in capsys.readouterr().err
    (run.run_dir / "reference.npz").unlink()


def test_several_runs_count_as_their_mean(run, cells, tmp_path, monkeypatch, capsys):
    """The matrix that adjusts is that of the mean, too."""
    runs = [small_run(tmp_path / f"run{seed}", seed=seed) for seed in (0, 1)]
    labels = read_predictions(runs[0].run_dir, "val").labels
    sure = np.eye(3, dtype=np.float32)[labels]
    named = {"index": np.arange(90), "ids": np.array([f"{i}.png" for i in range(90)]), "classes": CLASSES}
    save_arrays(runs[1].run_dir, "val", probs=sure, labels=labels, **named)
    given = {str(one.run_dir): one for one in runs}
    monkeypatch.setattr("bmjax.runs.folder.load_run", lambda path, *arguments, **options: given[path])
    out = tmp_path / "d.csv"
    assert main(["differential", *given, str(cells), "--out", str(out), "--undecided", "1"]) == 0
    assert "of val: n 90, accuracy 1.000" in capsys.readouterr().out
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(cells.glob("*<i>.png"))])
    mean = np.mean([predict_probs(one, images) for one in runs], axis=0).max(1)
    found = [float(row["probability"]) for row in table(tmp_path / "d_review.csv")]
    np.testing.assert_allclose(found, np.sort(mean), atol=1e-3)
    assert main(["differential", *given, "--out", str(out)]) == 2
    assert "expected a folder of cells, or images, after the runs" in capsys.readouterr().err


def test_wrong_input_is_one_line(run, cells, tmp_path, monkeypatch, capsys):
    out = tmp_path / "d.csv"
    (tmp_path / "empty").mkdir()
    other = small_run(tmp_path / "never evaluated")
    save_results(other.run_dir, "val", {"step": 1})
    for given, folder, more, message in (
        (run, tmp_path / "empty", (), "no image; expected a folder of cells"),
        (run, cells, ("--pixel-size", "0"), "--pixel-size is 0.0; expected micrometres to a pixel"),
        (run, cells, ("--undecided", "2"), "--undecided is 2.0; expected a probability"),
        (run, cells, ("--undecided", "0.5", "--error-rate", "0.1"), "expected one of them"),
        (run, cells, ("--out", str(tmp_path / "d.txt")), "expected a name ending in .csv"),
        (other, cells, (), "has no predictions of val by step 7"),
    ):
        assert count(monkeypatch, given, folder, out, *more) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    assert count(monkeypatch, run, tmp_path / "empty", out) == 1, "no file can be read"
    assert not out.exists()
