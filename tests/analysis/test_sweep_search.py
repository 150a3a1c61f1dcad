"""Sweeps that W&B's agents or Optuna draw."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from bmjax.analysis.sweep import work
from bmjax.analysis.sweep.agents import configuration, space_of
from bmjax.analysis.sweep.cells import cells_of, grid, parse_space
from bmjax.cli.main import main
from bmjax.config import Config, to_json
from bmjax.runs.identity import read_environment
from bmjax.runs.records import read_records
from bmjax.training.run import train_run
from tests.helpers.sweeps import table, tiny
from tests.helpers.wandb_files import inspect


@pytest.fixture
def file(quick_config, tmp_path):
    path = tmp_path / "lab.json"
    path.write_text(to_json(tiny(quick_config, tmp_path)))
    return str(path)


def test_a_sweep_for_wandb_has_values_distributions_and_the_figure_that_runs_log():
    config = Config(name="lab")
    words = [
        "optim.name=sgd,adam",
        "optim.lr=1e-4..1e-1",
        "model.head.dropout=0.1..0.5",
        "seed=0..4",
        "augment.flip=true",
    ]
    tree = configuration(config, parse_space(words), ["e.py", "--seed", "3"])
    assert tree["command"] == [
        "${env}",
        "${program}",
        "train",
        "e.py",
        "--seed",
        "3",
        "--tracking.wandb=auto",
        "${args}",
    ]
    assert tree["program"] == "bmjax"
    assert tree["metric"] == {"name": "val/best_accuracy", "goal": "maximize"}
    assert tree["parameters"] == {
        "optim.name": {"values": ["sgd", "adam"]},
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "model.head.dropout": {"distribution": "uniform", "min": 0.1, "max": 0.5},
        "seed": {"distribution": "int_uniform", "min": 0, "max": 4},
        "augment.flip": {"value": True},
    }
    assert tree["method"] == "bayes"
    assert tree["early_terminate"] == {"type": "hyperband", "min_iter": 1, "eta": 3}
    drawn = configuration(config, parse_space(words[:2]), ["e.py"], runs=7)
    assert (drawn["method"], drawn["run_cap"]) == ("random", 7)
    falls = dataclasses.replace(config, train=dataclasses.replace(config.train, monitor="loss"))
    whole = configuration(falls, {"seed": [0, 1]}, ["e.py", "--tracking.wandb", "online"])
    assert (whole["method"], whole["metric"]["goal"]) == ("grid", "minimize")
    assert "early_terminate" not in whole
    assert "--tracking.wandb=auto" not in whole["command"]


def test_only_a_grid_can_be_told_to_wandb():
    config = Config()
    whole = cells_of(config, grid({"optim.name": ["sgd", "adam"], "seed": [0, 1]}))
    assert space_of(whole) == {"optim.name": ["sgd", "adam"], "seed": [0, 1]}
    with pytest.raises(ValueError, match="no grid of values"):
        space_of(whole[:3])


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """A stand-in for W&B's agent: it reads the sweep's file and calls its command as W&B's own code builds it."""
    import wandb
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))

    def call(path, run_id, values):
        tree = yaml.safe_load(Path(path).read_text())
        assert values.keys() <= tree["parameters"].keys()
        flags = create_sweep_command_args({"args": {field: {"value": value} for field, value in values.items()}})
        parts = {"${env}": [], "${program}": [], "${args}": flags["args"]}
        command = [word for part in tree["command"] for word in parts.get(part, [part])]
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        monkeypatch.setenv("WANDB_MODE", "offline")
        wandb.teardown()  # an agent starts a process, in which W&B reads the environment
        code = main(command)
        wandb.teardown()
        monkeypatch.delenv("WANDB_SWEEP_ID")
        monkeypatch.delenv("WANDB_RUN_ID")
        return code

    return call


def test_an_agents_runs_are_of_the_sweep_and_log_what_it_goes_by(file, tmp_path, agent, capsys):
    space = [
        "optim.name=sgd,adam",
        "train.batch_size=8,16",
        "model.head.widths=[8],[16]",
        "augment.flip=false",
        "optim.lr=none",
    ]
    assert main(["sweep", file, "--grid", *space, "--wandb"]) == 0
    out = capsys.readouterr().out
    path = tmp_path / "lab/wandb-sweep.yaml"
    assert f"wandb sweep --project bmjax {path}" in out
    tree = yaml.safe_load(path.read_text())
    assert not list((tmp_path / "lab").glob("*/config.json")), "nothing is trained"
    drawn = [
        {"optim.name": "sgd", "train.batch_size": 8, "model.head.widths": [8], "augment.flip": False, "optim.lr": None},
        {
            "optim.name": "adam",
            "train.batch_size": 16,
            "model.head.widths": [16],
            "augment.flip": False,
            "optim.lr": None,
        },
    ]
    for run_id, values in zip(("aaa111", "bbb222"), drawn, strict=True):
        assert agent(path, run_id, values) == 0
        folder = tmp_path / "lab" / run_id
        config = json.loads((folder / "config.json").read_text())
        assert (config["optim"]["name"], config["train"]["batch_size"]) == (
            values["optim.name"],
            values["train.batch_size"],
        )
        assert config["model"]["head"]["widths"] == values["model.head.widths"]
        assert read_environment(folder)["run_id"] == run_id
        (logged,) = folder.glob("wandb/offline-run-*")
        assert logged.name.endswith(run_id)
        (start, *_) = inspect(logged, "run")
        assert (start["run_id"], start["sweep_id"]) == (run_id, "sweep1")
        figures = [r["item"][tree["metric"]["name"]] for r in inspect(logged, "history") if "epoch/epoch" in r["item"]]
        assert figures == [r["val/best_accuracy"] for r in read_records(folder, "epoch")]
    assert agent(path, "aaa111", drawn[0]) == 0, "called again, the agent's run is whole already"
    assert len(list((tmp_path / "lab/aaa111").glob("wandb/offline-run-*"))) == 1


FLAGS = [
    "--grid",
    "optim.lr=1e-4..1e-1",
    "optim.name=sgd,adam",
    "model.head.widths=[8],[16]",
    "--random",
    "4",
    "--optuna",
]


def trials_of(optuna, folder):
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'lab/optuna.db'}")
    trials = optuna.load_study(study_name="lab", storage=storage).get_trials()
    storage.engine.dispose()
    return trials


def test_optuna_draws_prunes_and_goes_on_after_a_kill(file, tmp_path, monkeypatch, capsys):
    optuna = pytest.importorskip("optuna", reason='needs pip install -e ".[tune]"')
    real, calls = train_run, []

    def killed(config, **options):
        calls.append(Path(config.run_dir).name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(config, **options)

    monkeypatch.setattr(work, "train_run", killed)
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: self.number == 2)
    flags = [*FLAGS, "--at-once", "1"]
    assert main(["sweep", file, *flags]) == 130
    assert main(["sweep", file, *flags]) == 0
    assert calls == ["trial0", "trial1", "trial1", "trial2", "trial3"], "the trial that was killed goes on"
    rows = table(tmp_path)
    assert [row["cell"] for row in rows] == ["trial0", "trial1", "trial2", "trial3"]
    assert [row["status"] for row in rows] == ["finished", "finished", "pruned", "finished"]
    assert rows[2]["epochs"] == "1"
    trials = trials_of(optuna, tmp_path)
    states = [trial.state.name for trial in trials]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    for trial, row in zip(trials, rows, strict=True):
        assert float(row["optim.lr"]) == trial.params["optim.lr"]
        assert json.loads(row["model.head.widths"]) == json.loads(trial.params["model.head.widths"])
        assert trial.value == float(row["score"])
    capsys.readouterr()
    calls.clear()
    assert main(["sweep", file, *flags]) == 0
    assert calls == []
    assert "best on validation: trial" in capsys.readouterr().out


@pytest.mark.slow
def test_optunas_workers_share_a_study(file, tmp_path):
    optuna = pytest.importorskip("optuna", reason='needs pip install -e ".[tune]"')
    assert main(["sweep", file, *FLAGS, "--workers", "2"]) == 0
    rows = table(tmp_path)
    assert [row["cell"] for row in rows] == ["trial0", "trial1", "trial2", "trial3"]
    assert len({row["optim.lr"] for row in rows}) == 4, "no draw is made twice"
    assert len(trials_of(optuna, tmp_path)) == 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("garbage", "--optuna is 'garbage': Could not parse SQLAlchemy URL"),
        ("nosuch://me:secret@x/y", "--optuna is 'nosuch://me:***@x/y': Can't load plugin"),
        ("sqlite:////nonexistent/a.db", "--optuna is 'sqlite:////nonexistent/a.db': (sqlite3.OperationalError) unable"),
        ("sqlite:///lab.json", "--optuna is 'sqlite:///lab.json': (sqlite3.DatabaseError) file is not a database"),
        ("sqlite:///x?timeout=abc", "--optuna is 'sqlite:///x?timeout=abc': could not convert string to float"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_said(file, tmp_path, monkeypatch, capsys, url, message):
    pytest.importorskip("optuna", reason='needs pip install -e ".[tune]"')
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", file, *FLAGS, url]) == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "expected a database as SQLAlchemy takes it" in " ".join(err.split())
    assert "Traceback" not in err
    assert "secret" not in err
    assert not list(tmp_path.glob("lab/*/config.json")), "nothing is trained"


def test_without_optuna_the_extra_is_named(file, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["sweep", file, *FLAGS]) == 2
    assert "bmjax[tune]" in capsys.readouterr().err
