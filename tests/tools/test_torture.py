"""A few kills and damaged files, as `python tools/torture.py` makes many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(
            ["kills", "--times", "5", "--saving", "2", "--on", "maps"],
            "runs end bit-equal with each step once, 0 do not",
            marks=pytest.mark.slow,
        ),
        pytest.param(["damage", "--times", "30"], "30 damaged files, 0 failed", marks=pytest.mark.slow),
    ],
    ids=["kills", "damage"],
)
def test_nothing_is_lost(arguments, said):
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tools/torture.py"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert said in done.stdout, done.stdout + done.stderr[-2000:]
    assert done.returncode == 0
