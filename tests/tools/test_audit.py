"""The audit of dependencies names what is known, and is skipped where nothing can be asked."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools/audit.py"
REPORT = {
    "dependencies": [
        {"name": "numpy", "version": "2.0", "vulns": []},
        {"name": "pillow", "version": "9.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["9.1"]}]},
        {"name": "other", "skip_reason": "not on an index"},
    ]
}


@pytest.fixture
def audit(monkeypatch):
    spec = importlib.util.spec_from_file_location("audit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    return module


@pytest.mark.parametrize(
    ("out", "status", "said"),
    [
        (json.dumps(REPORT), 1, "pillow 9.0: PYSEC-1, mended in 9.1"),
        (json.dumps({"dependencies": REPORT["dependencies"][:1]}), 0, "audit: 1 packages, no known weakness"),
        ("", 0, "skipped, for the advisories are not to be had"),
    ],
)
def test_what_is_known_is_named(audit, monkeypatch, capsys, out, status, said):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, stdout=out, stderr="no network")

    monkeypatch.setattr(audit.subprocess, "run", run)
    assert audit.main() == status
    assert said in capsys.readouterr().out


def test_without_the_tool_it_is_skipped(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.main() == 0
    assert "skipped, for pip-audit is not installed" in capsys.readouterr().out
