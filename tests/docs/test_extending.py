"""Every file that docs/extending.md shows, dropped into a folder, trains by the command beside it."""

import shlex

import pytest

from bmjax.analysis.report import report
from bmjax.cli import main
from tests.helpers import pages

PAGE = pages.DOCS / "extending.md"
COMMANDS = pages.commands(PAGE)
CELLS = "cells"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's files, and a cache of its own."""
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    pages.write_files(PAGE, tmp_path)
    with pages.in_folder(tmp_path, monkeypatch):
        yield tmp_path


def test_the_page_has_a_command_for_each_part():
    parts = ("attention", "loss", "metrics", "optim.name", "source", "attach", "head", "extra", "watched.py")
    assert [part for part in parts if not any(part in command for command in COMMANDS)] == []


def test_its_python_runs(folder):
    printed = pages.run_blocks(PAGE, {})
    assert "steps, last loss" in printed
    assert (folder / "runs/tiny/checkpoints/best").is_dir()
    assert (folder / "runs/tiny-2/checkpoints/best").is_dir()


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_train(command, folder, monkeypatch, capsys):
    monkeypatch.setattr(report, "write_report", lambda *_: "report.html")  # tested elsewhere, and takes seconds
    if CELLS in command:
        wanted = [b for b in pages.blocks(PAGE) if f'Path("{CELLS}")' in b.text]
        exec(wanted[0].text, {})
    words = shlex.split(command)
    assert main(words[1:]) == 0
    assert (folder / "runs/tiny/results.json").is_file()
    own = [word for word in words if word.endswith(".py")] + ["net.py"]
    copies = {path.name for path in (folder / "runs/tiny/code").rglob("*.py")}
    assert copies == set(own)
    if "watched.py" in own:
        assert "validation" in capsys.readouterr().out
