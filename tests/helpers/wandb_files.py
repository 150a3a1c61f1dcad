"""What W&B wrote, by W&B's own reader."""

import json
import subprocess
import sys


def inspect(folder, kind):
    """The records of one kind that a run folder of W&B holds."""
    (file,) = folder.glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in found.stdout.splitlines()]
    return [r[kind] for r in records if r["type"] == kind]
