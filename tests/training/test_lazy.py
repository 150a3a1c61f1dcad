"""What training does not need is not imported: wandb, tensorflow-datasets."""

import os
import subprocess
import sys
from pathlib import Path

from bmjax.config import to_json

BLOCKED = ("wandb", "tensorflow_datasets")
PROGRAM = """
import sys
from pathlib import Path
for name in sys.argv[2:]:
    sys.modules[name] = None  # importing it raises
import bmjax
from bmjax.config import from_json
result = bmjax.train(from_json(Path(sys.argv[1]).read_text()))
print("steps", result.steps, result.metrics["val"]["n"])
"""


def test_a_run_to_its_end_with_them_blocked(quick_config, tmp_path):
    path, root = tmp_path / "config.json", Path(__file__).resolve().parents[2]
    path.write_text(to_json(quick_config))
    env = os.environ | {"PYTHONPATH": str(root)}
    run = [sys.executable, "-W", "error::DeprecationWarning:bmjax", "-c", PROGRAM, str(path), *BLOCKED]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps" in done.stdout
