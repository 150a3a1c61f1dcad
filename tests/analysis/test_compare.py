"""bmjax compare: equal terms, resumable run by run, one table."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.analysis.compare import compare as comparing
from bmjax.analysis.compare.compare import configurations
from bmjax.cli.main import main
from bmjax.config import AugmentConfig, BatchNormConfig, FeaturesConfig, StageConfig, from_json, to_json
from bmjax.training.cached import check
from bmjax.training.progress import Recorder

FLAGS = ["--variants", "se", "none", "--seeds", "2"]
IN_TURN = ["--at-once", "1"]


@pytest.fixture
def experiment(tiny_config, tmp_path):
    """A frozen tiny network on cached features, as a file for the command line."""
    config = dataclasses.replace(
        tiny_config,
        name="lab",
        run_dir=str(tmp_path / "lab"),
        augment=AugmentConfig(flip=False, right_angles=False),
        stages=(StageConfig(epochs=1, train=("attention", "head")),),
        features=FeaturesConfig(cached=True),
        train=dataclasses.replace(tiny_config.train, accumulate=1, ema_decay=None),
    )
    path = tmp_path / "lab.json"
    path.write_text(to_json(config))
    return path


def test_a_killed_comparison_goes_on_where_it_was(experiment, tmp_path, monkeypatch, capsys):
    trained = []
    train_run = comparing.train_run

    def killed(config, **options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(config.run_dir)
        return train_run(config, **options)

    monkeypatch.setattr(comparing, "train_run", killed)
    assert main(["compare", str(experiment), *FLAGS, *IN_TURN]) == 130
    folder = tmp_path / "lab"
    runs = [folder / variant / f"seed{seed}" for variant in ("se", "none") for seed in (0, 1)]
    assert trained == [str(run) for run in runs[:3]]
    assert not (folder / "comparison.md").exists()
    before = {run: (run / "metrics.jsonl").read_bytes() for run in runs[:3]}
    assert not any((run / "openings.jsonl").exists() for run in runs[:3]), (
        "the test split is opened at the end, for all"
    )
    monkeypatch.setattr(comparing, "train_run", train_run)
    capsys.readouterr()
    assert main(["compare", str(experiment), *FLAGS]) == 0
    for run, results in before.items():
        assert (run / "metrics.jsonl").read_bytes() == results, "a finished run stays as it is"
    out = capsys.readouterr()
    assert "4 of 4: " in out.err
    table = (folder / "comparison.md").read_text()
    assert table in out.out
    saved = json.loads((folder / "comparison.json").read_text())
    assert [row["variant"] for row in saved["rows"]] == ["se", "none"]
    for row in saved["rows"]:
        found = [
            json.loads((run / "results.json").read_text())["test"] for run in runs if run.parent.name == row["variant"]
        ]
        assert row["accuracy"] == pytest.approx(np.mean([f["accuracy"] for f in found]))
        assert saved["n"] == found[0]["n"]
    assert "se: no verdict with 2 seeds; at least 3 are needed" in table
    assert all(row["shown"] is None for row in saved["rows"])
    assert "on cached features of the images as they are" in table
    for opened in (folder, *runs):
        assert len((opened / "openings.jsonl").read_text().splitlines()) == 1 == saved["openings"]
    assert "The test split was opened once" in " ".join(table.split())
    # One seed's table is another comparison of the same runs; nothing is trained for it.
    monkeypatch.setattr("bmjax.training.loop.end_epoch", None)
    assert main(["compare", str(experiment), *FLAGS[:-1], "1"]) == 0
    assert "1 seed (0)" in (folder / "comparison.md").read_text()
    # Runs of other terms don't mix.
    assert main(["compare", str(experiment), *FLAGS, "--optim.lr", "0.5"]) == 2
    assert "fields that differ: optim.lr" in capsys.readouterr().err
    params = {name: cost["parameters"] for name, cost in saved["costs"].items()}
    assert params["none"] == 0 < params["se"]
    assert saved["costs"]["se"]["flops"] > saved["costs"]["none"]["flops"] > 0


@pytest.fixture
def trainer(monkeypatch):
    """Counts how many runs train at once, and on which device."""
    train_run, now, most, devices, lock = comparing.train_run, [], [], set(), threading.Lock()

    def counted(config, **options):
        with lock:
            now.append(config.run_dir)
            most.append(len(now))
        meeting.wait(60)
        try:
            devices.update(jnp.zeros(()).devices())
            return train_run(config, **options)
        finally:
            now.remove(config.run_dir)

    monkeypatch.setattr(comparing, "train_run", counted)
    meeting = threading.Barrier(2)
    return SimpleNamespace(most=most, devices=devices)


def test_two_runs_at_once_are_the_runs_in_turn(experiment, tmp_path, trainer, capsys, monkeypatch):
    assert main(["compare", str(experiment), *FLAGS, "--at-once", "2", "--tracking.wandb", "offline"]) == 0
    assert max(trainer.most) == 2
    assert len(trainer.devices) == 2, "each has a device of its own"
    at_once = json.loads((tmp_path / "lab/comparison.json").read_text())
    monkeypatch.undo()
    other = ["--run_dir", str(tmp_path / "in_turn")]
    assert main(["compare", str(experiment), *FLAGS, *IN_TURN, *other]) == 0
    in_turn = json.loads((tmp_path / "in_turn/comparison.json").read_text())
    assert at_once["accuracies"] == in_turn["accuracies"]
    for run in ("se/seed0", "none/seed1"):
        one, two = (
            [json.loads(line) for line in (tmp_path / folder / run / "metrics.jsonl").read_text().splitlines()]
            for folder in ("lab", "in_turn")
        )
        assert [r.get("loss") for r in one] == [r.get("loss") for r in two]
        # Each has a W&B run of its own.
        logs = list((tmp_path / "lab" / run / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(logs) == 1
        assert logs[0].stat().st_size > 1000


def test_one_of_two_runs_fails(experiment, tmp_path, monkeypatch, capsys):
    train_run = comparing.train_run

    def fails(config, **options):
        if config.seed == 1 and config.model.attention == "se":
            raise FloatingPointError("step 3: the loss is nan")
        return train_run(config, **options)

    monkeypatch.setattr(comparing, "train_run", fails)
    assert main(["compare", str(experiment), *FLAGS, "--at-once", "2"]) != 0
    assert "the loss is nan" in capsys.readouterr().err
    assert not (tmp_path / "lab/comparison.md").exists()
    assert (tmp_path / "lab/se/seed0/results.json").exists(), "what was under way has ended"


def test_a_signal_stops_both(experiment, tmp_path, trainer, monkeypatch, capsys):
    step, sent = Recorder.step, []

    def stopping(self, *args, **options):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(0.5)
        return step(self, *args, **options)

    monkeypatch.setattr(Recorder, "step", stopping)
    assert main(["compare", str(experiment), *FLAGS, "--at-once", "2", "--stages.0.epochs", "2"]) == 143
    assert len(trainer.most) == 2, "no further run began"
    assert not (tmp_path / "lab/comparison.md").exists()


def test_end_to_end_comparison(experiment, tmp_path, capsys):
    flags = [
        "--variants",
        "se",
        "--seeds",
        "1",
        "--end-to-end",
        "--train.devices",
        "1",
        "--model.attach",
        "conv2",
        "last",
    ]
    assert main(["compare", str(experiment), *flags]) == 0
    table = capsys.readouterr().out
    assert "end to end" in table
    assert "| none |" in table, "the baseline is trained too"
    saved = json.loads((tmp_path / "lab/comparison.json").read_text())
    assert saved["costs"]["se"]["flops"] > saved["costs"]["none"]["flops"] > 0
    assert not from_json((tmp_path / "lab/se/seed0/config.json").read_text()).features.cached


def test_runs_differ_in_attention_and_seed_alone(experiment):
    config = from_json(experiment.read_text())
    options = {"ratio": 4}
    config = dataclasses.replace(
        config, seed=3, model=dataclasses.replace(config.model, attention="se", attention_options=options)
    )
    configs = configurations(config, ["none", "se", "cbam"], 2)
    assert [c.seed for c in configs["cbam"]] == [3, 4]
    assert configs["se"][0].model.attention_options == options
    assert configs["cbam"][0].model.attention_options == {}
    flat = [c for runs in configs.values() for c in runs]
    assert len({c.run_dir for c in flat}) == len({c.name for c in flat}) == 6
    assert {c.tracking.group for c in flat} == {"lab"}
    same = {
        to_json(
            dataclasses.replace(
                c, name="", run_dir="", seed=0, model=dataclasses.replace(c.model, attention="", attention_options={})
            )
        )
        for c in flat
    }
    assert len(same) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants", "simma"], "unknown attention 'simma'; did you mean 'simam'"),
        (["--variants", "se", "se"], "--variants is none se se; expected each once"),
        (["--variants", "se", "--seeds", "0"], "--seeds is 0; expected at least 1"),
        (["--variants", "se", "--at-once", "0"], "--at-once is 0; expected at least 1"),
        (["--variants", "se", "--end-to-end", "--at-once", "2"], "--at-once is 2; expected 1 end to end"),
        (["--variants", "se", "--stages.0.train", "backbone", "head"], "cached features need it frozen"),
    ],
)
def test_wrong_input_is_said_before_anything_is_trained(experiment, tmp_path, capsys, flags, message):
    assert main(["compare", str(experiment), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path(tmp_path / "lab").exists()


def test_a_backbone_whose_norms_move_is_not_frozen(experiment):
    config = from_json(experiment.read_text())
    stage = StageConfig(train=("head",), batch_norm=BatchNormConfig("train", "auto", "auto"))
    with pytest.raises(ValueError, match=r"'stages\.0\.batch_norm\.backbone' is 'train'"):
        check(dataclasses.replace(config, stages=(stage,)))
