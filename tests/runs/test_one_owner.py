"""A run's folder has one owner, which a dead process is not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bmjax.runs.folder import owned

ROOT = Path(__file__).resolve().parents[2]
HOLD = "import sys, time; from pathlib import Path; from bmjax.runs.folder import owned\n"
HOLD += "with owned(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"


def test_a_second_process_is_refused_and_a_killed_one_forgotten(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                BlockingIOError, match=rf"is being trained by another process \(host .*, process {process.pid}\)"
            ),
            owned(tmp_path),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with owned(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()
