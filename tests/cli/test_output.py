"""Nothing that is still needed is replaced, and what can't be read or written is said before any work."""

import importlib
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from bmjax.cli import output
from bmjax.cli.main import main
from tests.helpers.run_folder import write_run


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/split.csv").write_text("id,split\n")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    """A test of what is refused reads no classifier."""

    def fail(*arguments, **options):
        raise AssertionError("it works before it refuses")

    monkeypatch.setattr("bmjax.runs.folder.load_run", fail)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(capsys, *arguments):
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("verb", "name"),
    [("eval", "config.json"), ("eval", "calibration_views2.json"), ("eval", "evaluation_val.json"),
     ("predict", "split.csv"), ("differential", "split.csv")],
)  # fmt: skip
def test_no_verb_replaces_a_record_of_a_run(run, verb, name, tmp_path, capsys):
    before = contents(run)
    images = [] if verb == "eval" else [tmp_path]
    assert f"--out is '{run / name}', a record of the run there" in refused(
        capsys, verb, run, *images, "--out", run / name
    )
    link = tmp_path / f"link{(run / name).suffix}"
    link.symlink_to(run / name)
    assert "a record of the run there" in refused(capsys, verb, run, *images, "--out", link)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["report.html", "model.zip", "d.csv", "other.json", "evaluation_elsewhere.json"])
def test_other_names_in_a_run_are_free(run, name):
    output.check_out(run / name)
    (run / name).write_text("of before")
    output.check_out(run / name)
    assert (run / name).read_text() == "of before"


def test_names_of_records_are_free_where_there_is_no_run(tmp_path):
    output.check_out(tmp_path / "split.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_a_page(run, capsys):
    before = contents(run)
    assert "expected a name ending in .html" in refused(capsys, "report", run, "--out", run / "split.csv")
    assert contents(run) == before


@pytest.mark.parametrize("verb", ["predict", "differential"])
def test_no_table_replaces_an_input(run, verb, tmp_path, capsys):
    cells = tmp_path / "cells.csv"
    cells.write_text("path\n")
    assert f"--out is '{cells}', which is read itself" in refused(capsys, verb, run, cells, "--out", cells)
    assert cells.read_text() == "path\n"


def test_export_replaces_no_archive_but_its_own(run, tmp_path, capsys):
    out = tmp_path / "cells.zip"
    for name in ("EOS/1.png", "model.json"):
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(name, "a cell")
        before = out.read_bytes()
        said = refused(capsys, "export", run, "--out", out)
        assert f"--out is '{out}', a file that is no model of `bmjax export`" in said
        assert out.read_bytes() == before
    out.write_text("no archive")
    assert "no model of `bmjax export`" in refused(capsys, "export", run, "--out", out)
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model.json", "{}")
        archive.writestr("model.stablehlo", "{}")
    with pytest.raises(AssertionError, match="it works"):
        main(["export", str(run), "--out", str(out)])


@pytest.mark.parametrize("verb", ["explain", "export", "report"])
def test_a_run_that_is_not_there_is_named_first(verb, tmp_path, capsys):
    nowhere = tmp_path / "nosuch"
    assert refused(capsys, verb, nowhere) == f"bmjax: there is no folder '{nowhere}'; expected that of a run"
    said = refused(capsys, verb, tmp_path, "--out", tmp_path / "none" / "x")
    assert said.startswith(f"bmjax: '{tmp_path}' holds no run: {tmp_path / 'config.json'} is not there")


def test_a_folder_that_takes_no_file_is_said_before_any_work(run, tmp_path, capsys, monkeypatch):
    def full(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", full)
    out = tmp_path / "d.csv"
    said = refused(capsys, "differential", run, tmp_path, "--out", out)
    assert said == (
        f"bmjax: --out is '{out}', but nothing can be written into the folder {tmp_path} (Permission denied)"
    )
    assert "nothing can be written into the folder" in refused(capsys, "explain", run, "--out", tmp_path)


def test_a_file_system_of_another_kind_takes_no_file(run, tmp_path, capsys):
    said = refused(capsys, "differential", run, tmp_path, "--out", "/proc/d.csv")
    assert "--out is '/proc/d.csv', but nothing can be written into the folder /proc" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "x.csv"), "--out is 'x.csv'"),
        (("--error-rate", "7"), "--error-rate is 7.0"),
        (("--strict",), "--strict is given"),
        (("--errors",), "--errors is given"),
        (("--views", "4"), "--views is 4"),
        (("--batch-size", "4"), "--batch-size is 4"),
        (("--maps", "m"), "--maps is 'm'"),
        (("--match-colours",), "--match-colours is given"),
        (("--which", "last"), "--which is 'last'"),
    ],
)
def test_options_of_runs_do_not_go_with_weights(options, words, tmp_path, capsys):
    said = refused(capsys, "predict", "--weights", "imagenet", tmp_path, *options)
    assert said == f"bmjax: {words}; expected it with a run, not with --weights"


def test_port_replaces_no_input_and_blames_no_file_for_a_name(tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "x.safetensors", tmp_path / "o.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
    before = path.read_bytes()
    said = refused(capsys, "weights", "port", path, path, "--backbone", "densenet_tiny")
    assert f"the file to write is '{path}', which is read itself" in said
    said = refused(capsys, "weights", "port", path, out, "--backbone", "nosuch")
    assert said.startswith("bmjax: unknown backbone 'nosuch'")
    assert "x.safetensors" not in said
    # The name `bmjax.weights.port` is the function's, which hides its module.
    module = importlib.import_module("bmjax.weights.port")
    monkeypatch.setattr(module, "port", lambda *arguments, **options: pytest.fail("it is ported first"))
    said = refused(capsys, "weights", "port", path, tmp_path / "none/o.safetensors", "--backbone", "densenet_tiny")
    assert f"but there is no folder {tmp_path / 'none'}" in said
    assert contents(tmp_path) == {"x.safetensors": before}
