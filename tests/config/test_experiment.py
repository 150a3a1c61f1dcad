"""Experiment files, and fields overridden by their dotted names."""

import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from bmjax.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TrackingConfig,
    from_json,
    to_json,
)
from bmjax.config.experiment import load_experiment
from bmjax.config.override import changed, field_types, override

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def experiment(folder, body):
    path = folder / "e.py"
    path.write_text("from bmjax.config import *\n" + body)
    return str(path)


def test_shipped_experiments_round_trip_to_json():
    files = sorted(EXPERIMENTS.glob("*.py"))
    assert len(files) >= 2
    for file in files:
        config, module = load_experiment(str(file))
        assert from_json(to_json(config)) == config
        assert module is not None
        assert re.search(rf"bmjax (train|sweep|compare) experiments/{re.escape(file.name)}", module.__doc__ or "")


def test_experiments_come_from_a_file_a_config_or_a_run(tmp_path):
    path = experiment(tmp_path, "def config(): return Config(name='e', seed=4)")
    config, module = load_experiment(path)
    assert config == Config(name="e", seed=4)
    assert module is not None
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_experiment(str(tmp_path / "config.json")) == (config, None)
    found, module = load_experiment(str(tmp_path))
    assert (found.seed, found.run_dir, module) == (4, str(tmp_path), None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", r"e\.py: config\(\) is not there"),
        ("def config(): return {'seed': 1}", r"config\(\) gives {'seed': 1}"),
        ("def config(): return Config(seed=-1)", "'seed' is -1"),
    ],
)
def test_a_file_without_a_configuration_is_refused(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(experiment(tmp_path, body))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(ValueError, match=r"ending in \.py or \.json"):
        load_experiment(str(tmp_path / "e.txt"))
    with pytest.raises(FileNotFoundError, match="no such experiment"):
        load_experiment(str(tmp_path / "e.py"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--seed 3", {"seed": 3}),
        ("--data.image-size 64", {"data.image_size": 64}),
        ("--data.image_size=64", {"data.image_size": 64}),
        ("--data.strict True", {"data.strict": True}),
        ("--data.strict true --augment.flip=false", {"data.strict": True, "augment.flip": False}),
        ("--data.split 0.5 0.25 0.25", {"data.split": [0.5, 0.25, 0.25]}),
        ("--model.weights None", {"model.weights": None}),
        ("--model.weights none", {"model.weights": None}),
        ("--model.weights=none", {"model.weights": None}),
        ("--model.weights w/notop.h5", {"model.weights": "w/notop.h5"}),
        ("--model.attention none", {"model.attention": "none"}),
        ("--model.attach conv4 last", {"model.attach": ["conv4", "last"]}),
        (
            '--model.attention se+simam --model.attention-options {"se":{"ratio":8}} --model.attention-gate true',
            {
                "model.attention": "se+simam",
                "model.attention_options": {"se": {"ratio": 8}},
                "model.attention_gate": True,
            },
        ),
        ("--model.head.widths 64", {"model.head.widths": [64]}),
        ("--optim.lr 0.1 --optim.nesterov true", {"optim.lr": 0.1, "optim.nesterov": True}),
        ("--optim.lr none", {"optim.lr": None}),
        ("--optim.schedule.kind cosine", {"optim.schedule.kind": "cosine"}),
        ("--stages.0.train head", {"stages.0.train": ["head"]}),
        (
            "--stages.1.epochs 7 --stages.0.batch-norm.head frozen",
            {"stages.1.epochs": 7, "stages.0.batch_norm.head": "frozen"},
        ),
        ("--train.early-stop-epochs 4", {"train.early_stop_epochs": 4}),
        ("--tracking.tags a b", {"tracking.tags": ["a", "b"]}),
        ('--model.attention-options {"ratio":4,"on":true}', {"model.attention_options": {"ratio": 4, "on": True}}),
        ("", {}),
    ],
)
def test_every_kind_of_field_is_overridden_by_name(arguments, expected):
    base = Config(stages=(StageConfig(), StageConfig(epochs=2)), model=ModelConfig(attention_options={"ratio": 16}))
    found = override(base, arguments.split(), "bmjax train e.py")
    assert found == changed(base, expected)
    assert from_json(to_json(found)) == found
    assert (found == base) == (expected in ({}, {"optim.lr": None}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optim.lrr 1", "--optim.lr"),
        ("--trian.batch-size 1", "--train.batch-size"),
        ("--optim.lr fast", "fast"),
        ("--seed 1.5", "1.5"),
        ("--optim.name admax", "admax"),
        ("--data.strict maybe", "maybe"),
        ("--data.split 0.5 0.5", "data.split"),
        ("--model.attention-options [1]", "no JSON object"),
        ("--model.attention-options {", "attention-options"),
        ("--stages.1.epochs 3", "stages.1"),
        ("positional", "positional"),
    ],
)
def test_wrong_arguments_exit_with_the_field_and_no_traceback(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        override(Config(), arguments.split(), "bmjax train e.py")
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.head.widths={64, 32}", "'model.head.widths' is {64, 32}; expected text, a finite number"),
        ("--model.head.widths=[b'x']", "'model.head.widths' is b'x'; expected text"),
        ("--model.head.widths=[1j]", "'model.head.widths' is 1j; expected text"),
        ("--model.head.widths=" + "[" * 60 + "]" * 60, "'model.head.widths' has brackets within each other"),
        ("--model.head.widths=" + "[" * 900 + "]" * 900, "'model.head.widths' has brackets within each other"),
        ("--optim={'lr': {1}}", "'optim.lr' is {1}; expected text"),
        ("--optim={'lr': 1e999}", "'optim.lr' is inf; expected text, a finite number"),
        ("--model.attention_options={'se': {'ratio': {8}}}", "'model.attention_options.se.ratio' is {8}; expected"),
        ("--model.attention_options={1: 2}", "'model.attention_options' is {1: 2}; expected a dict with names"),
    ],
)
def test_values_that_a_record_cannot_hold_are_refused_in_one_line(argument, message):
    flag, _, value = argument.partition("=")
    for arguments in ([argument], [flag, value]):
        with pytest.raises(ValueError, match=re.escape(message)) as e:
            override(Config(), arguments, "bmjax train e.py")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", ["{[]}", '{"a":' + "[" * 100_000])
def test_values_that_no_reader_takes_exit_with_the_field(capsys, value):
    for field in ("model.head.widths", "model.attention-options"):
        with pytest.raises(SystemExit) as exit_info:
            override(Config(), [f"--{field}={value}"], "bmjax train e.py")
        assert exit_info.value.code == 2
        err = capsys.readouterr().err
        assert field in err
        assert "Traceback" not in err


def test_values_out_of_range_name_the_field():
    with pytest.raises((ValueError, SystemExit)):
        override(Config(), ["--data.image-size", "4"], "bmjax")


def test_help_shows_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit):
        override(Config(), ["--help"], "bmjax train e.py")
    out = capsys.readouterr().out
    for name in field_types(Config):
        flag = name.replace("stages.", "stages.0.").replace("_", "-")
        assert f"--{flag} " in out or f"--{flag}\n" in out, flag
    assert "Peak learning rate" in out


def test_field_types_cover_the_whole_configuration():
    names = field_types(Config)
    assert {"seed", "data.split", "optim.schedule.kind", "stages.batch_norm.head", "model.head.widths"} <= names.keys()
    assert not {"data", "stages", "optim.schedule"} & names.keys()


def test_changes_are_checked():
    assert changed(Config(), {"stages.0.epochs": 3, "optim.lr": 0.5}).stages[0].epochs == 3
    within: list[Any] = []
    within.append(within)
    wrong: list[tuple[Any, str]] = [
        ({"optim.lrr": 1}, r"unknown part of 'optim\.lrr': 'lrr'; did you mean 'lr'"),
        ({"stages.4.epochs": 1}, r"unknown part of 'stages\.4\.epochs': '4'"),
        ({"seed.x": 1}, r"unknown part of 'seed\.x': 'x'"),
        ({"optim.lr": "fast"}, r"optim\.lr"),
        ({"data.image_size": 4}, "at least 16 pixels"),
        ({"data.root": pathlib.Path("a")}, r"'data\.root' is PosixPath\('a'\); expected text, as str\(\) of it is 'a'"),
        ({"model.head.widths": within}, r"'model\.head\.widths' has brackets within each other"),
        ({1: 2}, "a field to change is 1; expected its name"),
        ({"model.head.widths": {64}}, r"'model\.head\.widths' is \{64\}; expected text"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            changed(Config(), changes)
    values = {"seed": np.int64(3), "data.split": np.array([0.5, 0.25, 0.25]), "optim.options": {"b1": np.float64(0.5)}}
    assert changed(Config(), values) == changed(
        Config(), {"seed": 3, "data.split": [0.5, 0.25, 0.25], "optim.options": {"b1": 0.5}}
    )


AGENTS = [
    ("optim.lr", 0.0001),
    ("augment.flip", False),
    ("optim.nesterov", True),
    ("optim.lr", None),
    ("model.head.widths", [64]),
    ("tracking.tags", ["a b", "c"]),
    ("tracking.tags", []),
    ("stages.0.train", ["attention", "head"]),
    ("model.attention_options", {"ratio": 4, "on": True, "kind": "it's"}),
    ("data.root", "[a]"),
    ("name", "{'a': 1}"),
]


@pytest.mark.parametrize(("field", "value"), AGENTS)
@pytest.mark.parametrize("form", ["args", "args_no_equals"])
def test_values_as_agents_of_wandb_pass_them(field, value, form):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    arguments = create_sweep_command_args({"args": {field: {"value": value}}})[form]
    base = Config(tracking=TrackingConfig(tags=("x",)))
    assert override(base, arguments, "bmjax train e.py") == changed(base, {field: value})


def test_a_dict_sets_the_fields_of_its_group_and_leaves_the_others():
    base = Config(optim=OptimConfig(clip_norm=3.0), stages=(StageConfig(), StageConfig(epochs=2, lr_scale=0.5)))
    arguments = ["--optim={'name': 'sgd', 'schedule': {'kind': 'cosine'}}", "--stages=[{'epochs': 4}, {'epochs': 5}]"]
    found = override(base, [*arguments, "--seed=3"], "bmjax train e.py")
    expected = {"optim.name": "sgd", "optim.schedule.kind": "cosine", "stages.0.epochs": 4, "stages.1.epochs": 5}
    assert found == changed(base, expected | {"seed": 3})
    assert (found.optim.clip_norm, found.stages[1].lr_scale) == (3.0, 0.5)
    with pytest.raises(ValueError, match="did you mean 'lr'"):
        override(base, ["--optim={'lrr': 1}"], "bmjax train e.py")


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        (lambda: Config(seed=np.int64(3)), lambda: Config(seed=3)),
        (lambda: OptimConfig(lr=np.float32(0.5)), lambda: OptimConfig(lr=0.5)),
        (lambda: OptimConfig(name=np.str_("adam")), lambda: OptimConfig(name="adam")),
        (lambda: DataConfig(strict=np.bool_(True)), lambda: DataConfig(strict=True)),
        (lambda: DataConfig(split=np.array([0.5, 0.25, 0.25])), lambda: DataConfig(split=(0.5, 0.25, 0.25))),
        (lambda: HeadConfig(widths=(np.int32(8),)), lambda: HeadConfig(widths=(8,))),
        (
            lambda: ModelConfig(attention_options={"sizes": (3, np.int64(5)), "on": np.bool_(False)}),
            lambda: ModelConfig(attention_options={"sizes": [3, 5], "on": False}),
        ),
        (lambda: ModelConfig(weights="none"), lambda: ModelConfig(weights=None)),
        (lambda: DataConfig(root="cells\udce9"), lambda: DataConfig(root="cells\udce9")),
    ],
)
def test_values_as_numpy_and_others_give_them_are_those_of_the_record(made, plain):
    assert repr(made()) == repr(plain())
    group = {OptimConfig: "optim", DataConfig: "data", ModelConfig: "model"}.get(type(made()))
    config = made() if isinstance(made(), Config) else Config(**{group: made()} if group else {})
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": {"rot": 1}}', r"'data\.rot': unknown field 'rot'; did you mean 'root'"),
        ('{"optim": {"lr": NaN}}', r"'optim\.lr' is nan; expected a number or None"),
        ('{"train": {"batch_size": "32"}}', r"'train\.batch_size' is '32'; expected a whole number"),
        ('{"train": {"batch_size": true}}', r"'train\.batch_size' is True; expected a whole number"),
        ('{"data": {"strict": "yes"}}', r"'data\.strict' is 'yes'; expected True or False"),
        ('{"optim": {"options": {"b1": NaN}}}', r"'optim\.options\.b1' is nan; expected text, a finite number"),
        ('{"seed": 1, "seed": 2}', r"'seed' stands twice in one JSON object"),
        ('{"stages": null}', r"'stages' is None; expected a tuple, each a StageConfig"),
        ('{"stages": [{"epoch": 3}]}', r"'stages\.0\.epoch': unknown field 'epoch'; did you mean 'epochs'"),
        ("[1]", r"a configuration is '\[1\]'; expected a JSON object"),
        ("[" * 100_000, r"no JSON"),
    ],
)
def test_a_record_that_is_none_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as e:
        from_json(text)
    assert "\n" not in str(e.value)
    assert from_json('{"train": {"batch_size": 32.0}}').train.batch_size == 32


def test_configurations_need_no_jax():
    code = "import sys; from bmjax.config.override import *; from bmjax.config import Config\n"
    code += "override(Config(), ['--seed', '3'], 'x'); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_of_before_recomputed_statistics_keeps_the_running_ones():
    import json

    from bmjax.config.base import Config, from_json, to_json

    values = json.loads(to_json(Config()))
    assert from_json(json.dumps(values)) == Config()
    del values["train"]["recompute_statistics"]
    assert from_json(json.dumps(values)).train.recompute_statistics == "never"
    assert from_json('{"train": {"batch_size": 8}}').train.recompute_statistics == "auto"
