"""`bmjax new KIND` writes what `bmjax check` passes; the kind of a part is found by what it looks like."""

import pathlib
import subprocess
import sys

import pytest

from bmjax.analysis.contract.examine import kind_of, verdicts
from bmjax.cli import check
from bmjax.cli.main import main
from bmjax.cli.new import written
from bmjax.config.experiment import load_experiment
from tests.helpers.slow import slow_but

ROOT = pathlib.Path(__file__).resolve().parents[2]
OWN = [kind for kind in check.KINDS if kind != "attention"]


@pytest.mark.parametrize("kind", slow_but({*OWN} - {"backbone"}, OWN))
def test_the_starting_file_passes_its_check_and_tells_its_kind(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", kind, "my_part"]) == 0
    assert f"next: bmjax check {kind} my_part.py" in capsys.readouterr().out
    assert kind_of("my_part.py") == kind
    assert [v for v in verdicts(kind, "my_part.py") if v.status != "ok"] == []


def test_starting_files_are_as_the_linter_wants_them(tmp_path):
    for kind in check.KINDS:
        (tmp_path / f"{kind}.py").write_text(written(kind, "my_part", "my_part.py"))
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_new_experiment_is_the_quickstart_under_its_name(tmp_path, monkeypatch):
    template = ROOT / "bmjax/cli/templates/experiment.py.txt"
    assert template.read_text() == (ROOT / "experiments/quickstart.py").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["new", "experiment", "mine"]) == 0
    config, module = load_experiment("mine.py")
    assert config.name == "mine"
    assert hasattr(module, "report")
    assert "bmjax train mine.py" in (tmp_path / "mine.py").read_text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("se", "attention"), ("se+simam", "attention"), ("densenet_tiny", "backbone"), ("adamax", "optimizer"),
        ("optax:lion", "optimizer"), ("cross_entropy", "loss"), ("folder", "source"), ("sofd", "attention"),
    ],
)  # fmt: skip
def test_the_kind_of_what_is_built_in_is_known(name, kind):
    assert kind_of(name) == kind


def test_a_check_prints_each_verdict_and_its_exit_code(tmp_path, capsys):
    path = tmp_path / "kappa.py"
    path.write_text("def kappa(labels, probs):\n    return probs\n")
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL     call" in out
    assert "not run  single         needs call" in out
    assert "1 of 7 checks failed: call" in out
    path.write_text("def kappa(labels, probs, scale):\n    return scale * float((probs.argmax(-1) == labels).mean())\n")
    assert main(["check", "metric", str(path), "--options", '{"scale": 2.0}']) == 0
    assert "all 7 checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["los", "x.py"], "unknown kind of part 'los'; did you mean 'loss'"),
        (["loss", "x.py", "--kind", "metric"], "--kind is 'metric'; expected 'loss'"),
        (["loss", "poly"], "unknown loss 'poly'"),
        (["--kind", "metric", "nowhere.py"], "no such file"),
        (["a", "b", "c"], "expected [KIND] NAME"),
        (["se", "--options", "x"], "--options is 'x'; expected JSON"),
    ],
)
def test_wrong_input_is_one_clear_line(words, message, capsys):
    assert main(["check", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_parameter_that_tells_no_kind_asks_for_one(tmp_path, capsys):
    path = tmp_path / "f.py"
    path.write_text("def f(x):\n    return x\n")
    assert main(["check", str(path)]) == 2
    assert "begins with the parameter 'x', which tells no kind; expected --kind KIND" in capsys.readouterr().err
