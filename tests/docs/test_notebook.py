"""The notebook of docs/ runs from its first cell to its last, and is kept with what it printed."""

import json

import jax
import pytest

from tests.helpers import pages
from tools.notebook import execute, run_cell

NOTEBOOK = json.loads((pages.DOCS / "notebook.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def shown(notebook) -> str:
    """All that the cells printed and showed as text."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(o.get("text", o.get("data", {}).get("text/markdown", []))) for o in outputs)


def test_it_is_kept_as_executed():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell["outputs"] for cell in CODE)
    assert "| window.py |" in shown(NOTEBOOK)
    assert any("image/png" in output.get("data", {}) for cell in CODE for output in cell["outputs"])


def test_a_cell_shows_what_it_prints_and_its_last_value():
    outputs = run_cell("print('a')\nx = 1\nx + 1", {}, "cell")
    assert outputs[0]["text"] == ["a\n"]
    assert outputs[1]["data"] == {"text/plain": ["2"]}
    assert run_cell("x = 1", {}, "cell") == []


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    try:
        with pages.in_folder(tmp_path, monkeypatch):
            done = execute(NOTEBOOK)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "| none |" in shown(done)
    assert "| window.py |" in shown(done)
    assert (tmp_path / "runs/lab/comparison.json").is_file()
