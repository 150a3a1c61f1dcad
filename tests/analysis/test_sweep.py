"""bmjax sweep: resumable cell by cell, chosen on validation, one table."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from bmjax.analysis.sweep import work
from bmjax.analysis.sweep.cells import cells_of, grid
from bmjax.analysis.sweep.halving import promoted
from bmjax.analysis.sweep.run import run_sweep
from bmjax.cli.main import main
from bmjax.config import to_json
from bmjax.config.training import OPTIMIZERS
from bmjax.runs.folder import owned
from bmjax.runs.records import read_records
from bmjax.training.run import train_run
from tests.helpers.sweeps import table, tiny
from tests.helpers.wandb_files import inspect


@pytest.fixture
def config(quick_config, tmp_path):
    return tiny(quick_config, tmp_path)


@pytest.fixture
def file(config, tmp_path):
    path = tmp_path / "lab.json"
    path.write_text(to_json(config))
    return str(path)


@pytest.mark.slow
def test_a_cell_is_the_ordinary_run_with_every_optimizer(config, tmp_path):
    """Two at a time, beside each other's programs, against runs by themselves."""
    found = run_sweep(config, cells_of(config, grid({"optim.name": OPTIMIZERS})), at_once=2)
    assert found.fields == ("optim.name",)
    for row in found.rows:
        alone = dataclasses.replace(
            config,
            run_dir=str(tmp_path / row["optim.name"]),
            optim=dataclasses.replace(config.optim, name=row["optim.name"]),
        )
        result = train_run(alone)
        for split in ("train", "val"):
            for name in ("accuracy", "accuracy_low", "macro_f1_high", "loss", "n"):
                assert row[f"{split}/{name}"] == result.metrics[split][name], row["optim.name"]
        losses = [[r["loss"] for r in read_records(folder, "train")] for folder in (row["run_dir"], alone.run_dir)]
        assert losses[0] == losses[1]
        epochs = read_records(alone.run_dir, "epoch")
        assert row["best_epoch"] == 1 + max(range(len(epochs)), key=lambda i: epochs[i]["val/accuracy"])
        assert row["score"] == max(record["val/accuracy"] for record in epochs)
    assert found.best["val/accuracy"] == max(row["val/accuracy"] for row in found.rows)


FLAGS = ["--grid", "optim.lr=0.01,1e30", "seed=0:2", "--at-once", "1"]


def test_a_failed_cell_is_a_row_and_finished_cells_stay(file, tmp_path, monkeypatch, capsys):
    trained, real = [], train_run

    def interrupted(config, **options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(Path(config.run_dir).name)
        return real(config, **options)

    monkeypatch.setattr(work, "train_run", interrupted)
    assert main(["sweep", file, *FLAGS]) == 130
    assert len(table(tmp_path)) == 3, "the table grows with each cell"
    assert main(["sweep", file, *FLAGS]) == 130, "three were trained already, and the fourth stops again"
    trained.clear()
    capsys.readouterr()
    assert main(["sweep", file, *FLAGS]) == 1
    assert len(trained) == 1, "the others were finished or had failed"
    out = capsys.readouterr()
    rows = table(tmp_path)
    assert [(row["optim.lr"], row["status"]) for row in rows] == [("0.01", "finished")] * 2 + [("1e+30", "failed")] * 2
    assert all("FloatingPointError: step 2: loss" in row["error"] for row in rows[2:])
    assert "1e+30" in out.out
    assert "best on validation: lr=0.01,seed=" in out.out
    assert float(rows[0]["val/accuracy_low"]) <= float(rows[0]["val/accuracy"]) <= float(rows[0]["val/accuracy_high"])
    assert not any("test" in name for name in rows[0])
    assert not list((tmp_path / "lab").glob("*/openings.jsonl"))
    # A failed cell is trained again when asked for, and a run of another configuration is never taken for a cell.
    trained.clear()
    assert main(["sweep", file, *FLAGS, "--retry"]) == 1
    assert [name.startswith("lr=1e+30") for name in trained] == [True, True]
    assert main(["sweep", file, *FLAGS, "--train.batch_size", "8"]) == 2
    assert "fields that differ: train.batch_size" in capsys.readouterr().err


def test_a_sweep_refuses_to_read_the_test_split(config, file, tmp_path, capsys):
    assert main(["sweep", file, *FLAGS, "--train.final_test", "true"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "train.final_test is true; a sweep chooses between its cells on validation and refuses" in err
    assert main(["sweep", file, "--grid", "train.final_test=true,false"]) == 2
    assert main(["sweep", file, "--grid", "seed=0:2", "--wandb", "--train.final_test", "true"]) == 2
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "train.monitor=loss,accuracy"], "train.monitor is accuracy, loss; expected one figure"),
        (["--random", "3"], "--random draws from a space; expected --grid"),
        (["--optuna", "--grid", "seed=0:2"], "and --random N trials"),
        (["--grid", "seed=0:2", "--halving", "1"], "--halving is 1; expected at least 2"),
        (["--grid", "seed=0:2", "--workers", "99"], "--workers is 99; expected 1 to"),
        (["--grid", "seed=0:2", "--at-once", "0"], "--at-once is 0; expected at least 1"),
        (["--grid", "model.attention=simma"], "unknown attention 'simma'; did you mean 'simam'"),
        ([], "has no sweep()"),
    ],
)
def test_wrong_input_is_said_before_anything_is_trained(file, tmp_path, capsys, flags, message):
    assert main(["sweep", file, *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("lab/*/config.json"))


def test_halving_trains_the_best_on_and_is_the_plain_run_for_them(config, tmp_path):
    config = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], epochs=4),))
    cells = cells_of(config, grid({"optim.lr": [0.01, 1e-5, 1e30], "seed": [0, 1]}))
    found = run_sweep(config, cells, halving=2)
    assert sorted(row["status"] for row in found.rows) == ["failed"] * 2 + ["finished"] * 2 + ["paused"] * 2
    epochs = sorted(row["epochs"] for row in found.rows)
    assert epochs == [0, 0, 1, 2, 4, 4], "of six, three go on after epoch 1, and two of them after 2"
    best = found.best
    assert promoted([c for c in cells if "1e+30" not in c.name], 2, 100)[0].name == best["cell"]
    plain = dataclasses.replace(next(c.config for c in cells if c.name == best["cell"]), run_dir=str(tmp_path / "p"))
    result = train_run(plain)
    assert best["val/loss"] == result.metrics["val"]["loss"]
    waiting = next(row for row in found.rows if row["status"] == "paused")
    assert waiting["val/accuracy_low"] <= waiting["val/accuracy"] <= waiting["val/accuracy_high"]
    # The same cells without halving: what was paused goes on.
    whole = run_sweep(config, cells)
    assert [row["epochs"] for row in whole.rows if row["status"] == "finished"] == [4] * 4


def test_the_sweep_itself_takes_less_than_a_second_a_cell(config, caplog, capsys):
    with caplog.at_level("INFO", "bmjax.analysis.sweep"):
        run_sweep(config, cells_of(config, grid({"seed": [0, 1, 2]})), at_once=1)
    (said,) = [record.args for record in caplog.records if "beside training" in record.msg]
    with capsys.disabled():
        print(f"\nbeside training: {said[0]:.2f} s a cell, at most {said[1]:.2f}")
    assert said[0] < 1


def test_every_run_of_a_sweep_is_in_one_group_of_wandb(config, tmp_path, monkeypatch):
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, wandb="offline"))
    found = run_sweep(config, cells_of(config, grid({"optim.name": ["sgd", "adam"]})))
    for row in found.rows:
        (folder,) = Path(row["run_dir"]).glob("wandb/offline-run-*")
        (start, *_) = inspect(folder, "run")
        assert start["run_group"] == "lab"
        assert start["config"]["update"]["optim"]["name"] == row["optim.name"]
        summary = {key for record in inspect(folder, "summary") for key in record.get("update", {})}
        assert {"val/accuracy", "train/accuracy", "val/best_accuracy"} <= summary
        assert not any(key.startswith("test") for key in summary), "the test split was not opened"
        best = [r["item"]["val/best_accuracy"] for r in inspect(folder, "history") if "epoch/epoch" in r["item"]]
        assert best[-1] == row["score"] == row["val/accuracy"]


def test_a_run_is_told_that_its_folder_has_no_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with owned(tmp_path):
        pass
    assert "no lock can be held here" in caplog.text
    assert "start one process at a time" in caplog.text


def test_an_experiments_own_sweep_and_callback(config, tmp_path, capsys):
    saved = json.dumps(to_json(config))
    (tmp_path / "e.py").write_text(
        f"from bmjax.config import from_json\ndef config(): return from_json({saved})\n"
        "def sweep():\n    yield {'optim.name': 'sgd'}\n    yield {'optim.name': 'adam', 'name': 'second'}\n"
        "def on_event(event): return event.kind == 'epoch'\n"
    )
    assert main(["sweep", str(tmp_path / "e.py")]) == 0
    rows = table(tmp_path)
    assert [row["cell"] for row in rows] == ["name=sgd", "second"]
    assert [row["epochs"] for row in rows] == ["1", "1"], "the callback ended both after the first of two epochs"
    assert list((tmp_path / "lab/second/code").glob("*/e.py"))
