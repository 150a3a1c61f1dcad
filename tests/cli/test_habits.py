"""What people expect of a command line: help, quiet, pipes, signals, clear errors in their own files."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bmjax.cli.main import main, make_parser

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """
from __future__ import annotations
import dataclasses
from bmjax.config import *

@dataclasses.dataclass
class Mine:
    x: int = 1

def config():
    return Config(name='habits', run_dir={run!r},
        data=DataConfig(image_size=32, synthetic_per_class={n}, cache_dir={cache!r}),
        model=ModelConfig(
            backbone='tests.helpers.net:Net', weights=None, preprocess='tf', head=HeadConfig(widths=(8,))
        ),
        stages=(StageConfig(epochs={epochs}),), train=TrainConfig(batch_size=16))
"""


def experiment(folder, n=20, epochs=1):
    path = folder / "habits.py"
    path.write_text(EXPERIMENT.format(run=str(folder / "run"), cache=str(folder / "cache"), n=n, epochs=epochs))
    return path


def command(*arguments, **options):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-m", "bmjax", *map(str, arguments)], env=env, text=True, **options)


@pytest.mark.parametrize("verb", sorted(make_parser()._subparsers._group_actions[0].choices))
def test_every_verb_has_a_short_help(verb, capsys):
    try:
        code = main([verb, "--help"])
    except SystemExit as e:
        code = e.code
    assert code == 0
    out = capsys.readouterr().out
    assert f"bmjax {verb}" in out
    assert len(out.splitlines()) < 60


def test_help_by_group(tmp_path, capsys):
    path = experiment(tmp_path)
    for verb in ("train", "compare", "show"):
        assert main([verb, str(path), "--help"]) == 0
        assert "--help GROUP" in capsys.readouterr().out
        assert main([verb, str(path), "--help", "optim"]) == 0
        out = capsys.readouterr().out
        assert "--optim.lr" in out
        assert "--optim.schedule.kind" in out
        assert "--data.root" not in out
        assert "Clips the global norm of the gradient." in out
    assert main(["train", str(path), "--help", "optin"]) == 2
    assert "unknown group of fields 'optin'; did you mean 'optim'" in capsys.readouterr().err


def test_the_list_is_short_by_default(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 40
    for name in ("cbam", "densenet121", "adamax", "attention (22)"):
        assert name in out


def test_a_closed_pipe_is_no_error():
    with command("list", "weights", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_quiet_says_only_what_went_wrong(tmp_path, capsys):
    assert main(["train", str(experiment(tmp_path)), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_no_name_steers_the_terminal(capsys):
    assert main(["show", "\x1b[31mcells\udce9.py"]) == 2
    logging.getLogger("bmjax.data").warning("%s: 2 classes\n  B", "\x1b[31mcells\udce9")
    err = capsys.readouterr().err
    assert err.startswith(r"bmjax: \x1b[31mcells\xe9.py: no such experiment")
    assert err.endswith("\\x1b[31mcells\\xe9: 2 classes\n  B\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def config(:\n", "habits.py, line 1: invalid syntax"),
        ("import nosuchmodule\n", "habits.py, line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("def config():\n    return 1 / 0\n", "habits.py, line 2: ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_in_an_experiment_is_one_line_with_file_and_line(tmp_path, capsys, text, message):
    (tmp_path / "habits.py").write_text(text)
    assert main(["show", str(tmp_path / "habits.py")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("verb", [["check"], ["train", "EXPERIMENT", "--model.attention"]])
def test_an_error_in_an_attention_file_is_one_line_too(tmp_path, capsys, verb):
    variant = tmp_path / "mine.py"
    variant.write_text("import flax.linen as nn\n\nclass Mine(nn.Module)\n    pass\n")
    arguments = [str(experiment(tmp_path)) if word == "EXPERIMENT" else word for word in verb]
    assert main([*arguments, str(variant)]) == 2
    err = capsys.readouterr().err
    assert "mine.py, line 3: expected ':'" in err
    assert len(err.strip().splitlines()) == 1


def test_the_experiments_folder_and_the_current_one_are_importable(tmp_path, monkeypatch, capsys):
    lab, here = tmp_path / "lab", tmp_path / "here"
    lab.mkdir()
    here.mkdir()
    (lab / "common_of_habits.py").write_text("WIDTH = 8\n")
    (here / "mylab_of_habits.py").write_text("from bmjax.attention.se import SqueezeExcite as Mine\n")
    path = experiment(lab)
    path.write_text(
        "from common_of_habits import WIDTH\n" + path.read_text().replace("\nfrom __future__ import annotations", "")
    )
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    import inspect

    import bmjax.attention.se as se

    name = next(n for n, v in vars(se).items() if inspect.isclass(v) and v.__module__ == se.__name__)
    (here / "mylab_of_habits.py").write_text(f"from bmjax.attention.se import {name} as Mine\n")
    assert main(["show", str(path), "--no-compile", "--model.attention", "mylab_of_habits:Mine"]) == 0
    assert "attention" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_obeyed_within_seconds_whatever_is_under_way(tmp_path, number, code):
    """Here while images are rendered, which is before anything is written."""
    process = command("train", experiment(tmp_path, n=3000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cache = tmp_path / "cache"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (cache.is_dir() and any(cache.glob(".*"))):
        time.sleep(0.05)
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(number)
    assert process.wait(30) == code
    assert time.monotonic() - sent < 8
    assert not (tmp_path / "run").exists()


def test_completion_prints_a_script(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    assert "_shtab_bmjax" in capsys.readouterr().out
