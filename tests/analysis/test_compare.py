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

from bmjax.analysis import several
from bmjax.analysis.compare import compare as comparing
from bmjax.analysis.compare.compare import Cost, configurations
from bmjax.cli.main import main
from bmjax.config import AugmentConfig, BatchNormConfig, FeaturesConfig, StageConfig, from_json, to_json
from bmjax.training.cached import check
from bmjax.training.progress import Recorder
from bmjax.training.signals import Interrupted

FLAGS = ["--variants", "se", "none", "--seeds", "2"]
IN_TURN = ["--at-once", "1"]


@pytest.fixture
def experiment(quick_config, tmp_path):
    """A frozen tiny network on cached features, as a file for the command line."""
    config = dataclasses.replace(
        quick_config,
        name="lab",
        run_dir=str(tmp_path / "lab"),
        augment=AugmentConfig(flip=False, right_angles=False),
        stages=(StageConfig(epochs=1, train=("attention", "head")),),
        features=FeaturesConfig(cached=True),
        train=dataclasses.replace(quick_config.train, accumulate=1, ema_decay=None),
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


def test_the_pace_is_of_runs_trained_now(quick_config, tmp_path, monkeypatch):
    """Runs that had finished before take no time; counted, they make the rest look short."""
    runs = [dataclasses.replace(quick_config, seed=seed, run_dir=str(tmp_path / str(seed))) for seed in range(4)]
    for done in (0, 1):
        (tmp_path / str(done)).mkdir()
        (tmp_path / str(done) / "results.json").touch()
    crew, clock, said = comparing._Runs({"none": runs}), [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def train(run, **options):
        said.append(crew._state())
        clock[0] += 600.0 * (run.seed > 1)
        return SimpleNamespace(metrics={"val": {"accuracy": 0.5}})

    monkeypatch.setattr(comparing, "train_run", train)
    crew.train(1)
    assert [line.partition("under way: ")[2] for line in said[2:]] == [
        "none, seed 2",
        "none, seed 3; about 10 min to go at this pace",
    ]


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


@pytest.mark.slow
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


def write_variant(folder, name, body, signature="self, x, *, train=False"):
    """A variant of the user's own in a file."""
    lines = ["import flax.linen as nn", "import jax.numpy as jnp", "class Own(nn.Module):", "    @nn.compact"]
    (folder / name).write_text("\n".join([*lines, f"    def __call__({signature}):", f"        return {body}", ""]))


def test_a_variant_that_fails_in_training_does_not_keep_the_others_from_it(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_variant(tmp_path, "boom.py", "x * jnp.nan")
    lab = tmp_path / "lab"
    words = ["compare", str(experiment), "--variants", "boom.py", "se", "--seeds", "2", "--at-once", "2"]
    assert main(words) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "2 of 6 runs failed in training" in err
    for seed in (0, 1):
        assert f"boom.py, seed {seed} ({lab}/boom.py/seed{seed}): step 1: loss nan" in err
        assert (lab / f"se/seed{seed}/results.json").exists(), "the others went on"
        assert (lab / f"none/seed{seed}/results.json").exists()
    assert "drop boom.py from --variants, or mend it" in err
    assert not (lab / "comparison.md").exists()
    assert not list(lab.rglob("openings.jsonl")), "the test split is not opened"
    # Without it the finished runs are the comparison.
    before = {path: path.read_bytes() for path in lab.glob("[ns]*/*/metrics.jsonl")}
    assert len(before) == 4
    assert main(["compare", str(experiment), *FLAGS]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert [row["variant"] for row in table_of(lab)[0]["rows"]] == ["se", "none"]


def test_the_baseline_that_fails_can_only_have_other_settings(experiment, tmp_path, monkeypatch, capsys):
    assert main(["compare", str(experiment), "--variants", "none", "--seeds", "1", "--optim.lr", "1e30"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"none, seed 0 ({tmp_path}/lab/none/seed0): step 2: loss" in err
    assert "What helps: change the settings of all" in err


@pytest.mark.parametrize("flags", [[], ["--end-to-end", "--model.attach", "fine", "last"]])
@pytest.mark.parametrize("broken", [("x", "self, x"), ("x + nn.Dense(3)(x)",)])
def test_a_broken_variant_is_refused_before_anything_is_trained(
    experiment, tmp_path, monkeypatch, capsys, flags, broken
):
    monkeypatch.chdir(tmp_path)
    write_variant(tmp_path, "bad.py", *broken)
    assert main(["compare", str(experiment), "--variants", "se", "bad.py", *flags]) == 2
    err = capsys.readouterr().err
    assert "bad.py" in err
    assert "se:" not in err
    assert not (tmp_path / "lab").exists()


def test_a_run_that_fails_before_its_first_step_is_named_and_ends_all(experiment, tmp_path, monkeypatch, capsys):
    """What fails there, such as the data, would fail in each."""
    begun = []

    def fails(config, **options):
        begun.append(config.run_dir)
        raise ValueError("no such data")

    monkeypatch.setattr(comparing, "train_run", fails)
    assert main(["compare", str(experiment), *FLAGS, *IN_TURN]) == 2
    assert f"se, seed 0 ({tmp_path}/lab/se/seed0): no such data" in capsys.readouterr().err
    assert len(begun) == 1


def test_which_errors_others_go_on_after(quick_config, monkeypatch):
    def fails(error, begins=True):
        def train(begun):
            if begins:
                begun(SimpleNamespace(kind="start"))
            raise error

        return several.attempt("se, seed 0", quick_config, train)

    for error, reason in (
        (FloatingPointError("loss nan"), "loss nan"),
        (TypeError("no train"), "TypeError: no train"),
    ):
        failure = fails(error)
        assert isinstance(failure, several.Failure)
        assert (failure.reason, failure.diverged) == (reason, isinstance(error, FloatingPointError))
    for error in (OSError(28, "full"), KeyboardInterrupt(), Interrupted(signal.SIGTERM)):
        with pytest.raises(type(error)):
            fails(error)
    with pytest.raises(ValueError, match=r"se, seed 0 \(.*run\): small"):
        fails(ValueError("small"), begins=False)
    with pytest.raises(TypeError, match="no train"):
        fails(TypeError("no train"), begins=False)
    monkeypatch.setattr(several.hosts, "several", lambda: True)
    with pytest.raises(ValueError, match=r"se, seed 0 \(.*run\): loss nan"):
        fails(FloatingPointError("loss nan"))


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


@pytest.fixture
def trainer_of_luck(monkeypatch):
    """Trains nothing: a run's validation is best at a rate of 0.003, its test predictions are drawn, `se` better by 12
    points. Gives the runs in order, and how many each opening tested."""
    trained, opened = [], []

    def train_run(config, **options):
        folder = Path(config.run_dir)
        if folder not in [run for run, _ in trained]:
            trained.append((folder, config))
        folder.mkdir(parents=True, exist_ok=True)
        assert not config.train.final_test
        value = 1 - abs(np.log10((config.optim.lr or 1e-3) / 3e-3))
        (folder / "results.json").write_text(json.dumps({"val": {"accuracy": value, "step": 1}}))
        (folder / "dataset.json").write_text(json.dumps({"name": "drawn", "n": 1200}))
        return SimpleNamespace(metrics={"val": {"accuracy": value}}, interrupted=None)

    def open_test(folder, configs, prepare, signals):
        waiting = [run for runs in configs.values() for run in runs if Path(run.run_dir) not in opened]
        opened.extend(Path(run.run_dir) for run in waiting)
        for run in waiting:
            fold = run.data.fold
            rng, luck = np.random.default_rng(fold), np.random.default_rng([run.seed, fold, len(run.run_dir)])
            right = rng.random(400) + 0.01 * luck.standard_normal() < (0.8 if run.model.attention == "se" else 0.68)
            probs = np.eye(2, dtype=np.float32)[1 - right.astype(int)]
            ids = np.array([f"{fold} {i}" for i in range(400)])
            np.savez(Path(run.run_dir) / "predictions_test.npz", probs=probs, labels=np.zeros(400, int),
                     index=np.arange(400), ids=ids, classes=np.array(["a", "b"]))  # fmt: skip
        return 1

    monkeypatch.setattr(comparing, "train_run", train_run)
    monkeypatch.setattr(comparing, "open_test", open_test)
    monkeypatch.setattr(comparing, "costs", lambda configs, classes: dict.fromkeys(configs, Cost(1, 2e6, 3.0)))
    monkeypatch.setattr(comparing.Shared, "prepared", lambda self, run: None)
    return SimpleNamespace(trained=trained, opened=opened)


def table_of(folder):
    return json.loads((folder / "comparison.json").read_text()), (folder / "comparison.md").read_text()


def test_each_variant_has_its_own_rate_of_equally_many(experiment, tmp_path, trainer_of_luck):
    assert (
        main(["compare", str(experiment), "--variants", "se", "eca", "--seeds", "3", "--tune", "3", "--folds", "3"])
        == 0
    )
    saved, table = table_of(tmp_path / "lab")
    trials = [config for folder, config in trainer_of_luck.trained if "trials" in folder.parts]
    tried = {(c.model.attention, c.data.fold): [] for c in trials}
    for c in trials:
        tried[c.model.attention, c.data.fold].append(c.optim.lr)
    assert len(tried) == 9
    assert all(sorted(rates) == [3.16e-4, 1e-3, 3.16e-3] for rates in tried.values()), "in any order: two train at once"
    assert {c.seed for c in trials} == {1000}, "apart from the seeds that are compared"
    assert not set(trainer_of_luck.opened) & {Path(c.run_dir) for c in trials}, "a trial never sees the test split"
    runs = [config for folder, config in trainer_of_luck.trained if "trials" not in folder.parts]
    assert len(runs) == 27
    assert {c.optim.lr for c in runs} == {3.16e-3}
    assert saved["rates"] == dict.fromkeys(("none", "se", "eca"), [3.16e-3] * 3)
    assert "| learning rate |" in table
    assert "the best of 3 on validation in each fold" in table
    assert saved["n"] == 1200
    assert saved["folds"] == 3
    assert [row["shown"] for row in saved["rows"]] == [None, True, False]
    assert "3 seeds (0, 1, 2) in each of 3 folds" in table
    assert "se: better than none by" in table


@pytest.fixture
def diverging(trainer_of_luck, monkeypatch):
    """Rates above the first number given diverge; `se` at any above the second."""
    train_run, most = comparing.train_run, [2e-3, 1.0]

    def fails(config, **options):
        options["callbacks"][0](SimpleNamespace(kind="start"))
        if config.optim.lr > most[0] or (config.model.attention == "se" and config.optim.lr > most[1]):
            raise FloatingPointError("step 1: loss nan")
        return train_run(config, **options)

    monkeypatch.setattr(comparing, "train_run", fails)
    return most


def test_a_rate_by_which_training_diverges_is_not_chosen(experiment, tmp_path, diverging, capsys):
    flags = ["--variants", "se", "--seeds", "3", "--tune", "3"]
    assert main(["compare", str(experiment), *flags]) == 0
    assert table_of(tmp_path / "lab")[0]["rates"] == {"none": [1e-3], "se": [1e-3]}
    assert "se, seed 1000, rate 0.00316 failed: step 1: loss nan" in capsys.readouterr().err
    # Where none is left, the trials are what failed.
    diverging[1] = 0.0
    assert main(["compare", str(experiment), *flags, "--run_dir", str(tmp_path / "other")]) == 2
    err = capsys.readouterr().err
    assert "3 of 6 runs failed in training" in err
    assert f"  se, seed 1000, rate 0.000316 ({tmp_path}/other/se/trials/lr0.000316): step 1: loss nan" in err
    assert "  none" not in err


def test_seeds_are_added_until_all_is_decided(experiment, tmp_path, trainer_of_luck):
    assert main(["compare", str(experiment), "--variants", "se", "eca", "--until-shown", "3", "--max-seeds", "9"]) == 0
    saved, table = table_of(tmp_path / "lab")
    assert saved["decided"]["se"] == 3
    assert len(saved["seeds"]) in (3, 4, 5, 7, 9)
    assert len(trainer_of_luck.trained) == 3 * len(saved["seeds"])
    assert "known after 3 seeds" in table
    assert "whose looks together err in at most 5 %" in " ".join(table.split())
    # Called again it decides the same and trains nothing.
    before = len(trainer_of_luck.trained)
    assert main(["compare", str(experiment), "--variants", "se", "eca", "--until-shown", "3", "--max-seeds", "9"]) == 0
    assert len(trainer_of_luck.trained) == before
    assert table_of(tmp_path / "lab")[1] == table


def test_places_of_attention_are_rows(experiment, tmp_path, trainer_of_luck):
    flags = ["--variants", "se", "eca", "--seeds", "3", "--attach", "last", "fine,last", "--end-to-end"]
    assert main(["compare", str(experiment), *flags]) == 0
    saved, _ = table_of(tmp_path / "lab")
    assert [row["variant"] for row in saved["rows"]] == [
        "none",
        "se@last",
        "se@fine,last",
        "eca@last",
        "eca@fine,last",
    ]
    attached = {c.run_dir.split("/")[-2]: c.model.attach for _, c in trainer_of_luck.trained}
    assert attached["se@fine,last"] == ("fine", "last")
    assert attached["none"] == ("last",)


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
        "fine",
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
                c, name="x", run_dir="", seed=0, model=dataclasses.replace(c.model, attention="", attention_options={})
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
        (["--variants", "se", "--tune", "1"], "--tune is 1; expected 0, or 2 to 9 learning rates"),
        (["--variants", "se", "--folds", "2"], "--folds is 2; expected 0 or at least 3"),
        (["--variants", "se", "--until-shown", "0"], "--until-shown is 0; expected points, more than 0"),
        (["--variants", "se", "--until-shown", "2", "--folds", "3"], "goes with one split; expected no --folds, not 3"),
        (["--variants", "se", "--until-shown", "2", "--max-seeds", "2"], "looks from 3 to 2 seeds"),
        (["--variants", "se", "--until-shown", "2", "--seeds", "5"], "--seeds is 5; expected none with --until-shown"),
        (["--variants", "se", "--attach", "last", "fine"], "expected 'last' for cached features"),
        (["--variants", "se", "--attach", "last", "conv9", "--end-to-end"], "'conv9'"),
        (
            ["--variants", "se", "eca", "--attach", "last", "fine", "--baseline", "se"],
            "expected one of the rows: se@last",
        ),
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
