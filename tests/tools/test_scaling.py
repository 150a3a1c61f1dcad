"""The tool that prints what many devices move and hold, and the files that start bmjax on clusters."""

import importlib.util
import json
import os
import pathlib
import subprocess

import pytest

from bmjax.training.hosts import Cluster, detected

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load(path: str):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gradients_of_densenet121_are_its_parameters(capsys):
    load("tools/scaling.py").main(["gradients", "--backbone", "densenet121"])
    row = capsys.readouterr().out.splitlines()[2].split("|")
    n = int(row[2].replace(",", ""))
    # The published network without its top has 6,953,856 that train; the head of seven classes has the rest.
    assert 6_953_856 < n < 7_500_000
    assert float(row[3]) == round(4 * n / 1e6, 1)


def test_a_divided_state_takes_less_of_a_device(capsys):
    load("tools/scaling.py").main(
        ["memory", "--backbone", "tests.helpers.net:Net", "--size", "16", "--batch", "8", "--devices", "4"]
    )
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[4:]]
    whole, divided, again = (float(row[2]) for row in rows)
    assert divided == again < 0.5 * whole


def test_the_jobset_tells_each_host_which_it_is(capsys):
    words = [
        "--name",
        "cells",
        "--hosts",
        "3",
        "--gpus",
        "4",
        "--image",
        "x/bmjax",
        "--claim",
        "runs",
        "--",
        "e.py",
        "--run_dir",
        "/runs/r",
    ]
    load("experiments/launch/jobset.py").main(words)
    found = json.loads(capsys.readouterr().out)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (3, 3, "Indexed")
    container = job["template"]["spec"]["containers"][0]
    assert container["command"] == ["bmjax", "train", "e.py", "--run_dir", "/runs/r", "--resume"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    for index in range(3):
        known = detected(environ | {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
        assert known == Cluster("environment", 3, index, "cells-hosts-0-0.cells:8476")


@pytest.mark.parametrize(("ends_with", "requeued"), [(0, False), (143, True), (2, False)])
def test_the_slurm_script_starts_all_and_queues_again_when_told_to_stop(tmp_path, ends_with, requeued):
    """With a stand-in for srun that runs two tasks with SLURM's variables, and bmjax, which prints them."""
    stand_ins = {
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift\nfor i in 0 1; do\n'
        'SLURM_STEP_NODELIST="n[1-2]" SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=0 "$@" || exit $?\ndone',
        "bmjax": f'echo "$@"\nenv | grep ^SLURM_ | tr "\\n" " "\necho\nexit {ends_with}',
        "scontrol": 'echo scontrol "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "PYTHONPATH": str(ROOT)}
    command = [ROOT / "experiments/launch/slurm.sh", "e.py", "--optim.lr", "0.1"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    lines = ended.stdout.splitlines()
    assert ended.returncode == ends_with, ended.stderr
    assert lines[0] == "train e.py --optim.lr 0.1 --run_dir runs/slurm-12 --resume"
    assert detected(dict(entry.split("=", 1) for entry in lines[1].split())) == Cluster("slurm")
    assert ("scontrol requeue 12" in lines) == requeued
    assert subprocess.run([command[0]], env=environ, capture_output=True, check=False).returncode != 0
