"""Models know nothing of the CPU's code: without the folder everything works, and tracing compiles no kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TRACE = """
import jax, jax.numpy as jnp, flax.linen as nn
from bmjax.layers import BatchNorm
from bmjax.model import create, init
from bmjax.config import ModelConfig
jax.eval_shape(BatchNorm().init, jax.random.key(0), jnp.zeros((2, 4, 4, 8)))
model = create(ModelConfig("densenet_tiny", None), 3)
jax.eval_shape(lambda: init(model, jax.random.key(0), 32))
x = jnp.zeros((2, 4, 4, 8))
jax.jit(lambda x: BatchNorm().init_with_output(jax.random.key(0), x, train=True)[0]).lower(x)
"""


def test_tracing_runs_no_compiler(tmp_path):
    called = tmp_path / "called"
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\necho called >> {called}\nexit 1\n")
    compiler.chmod(0o755)
    env = os.environ | {"CXX": str(compiler), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", TRACE], check=True, env=env, timeout=300)
    assert not called.exists()


def test_compiling_says_so_before_it_starts(tmp_path):
    """The compiler is one that takes its time; the line is there while it runs."""
    seen = tmp_path / "seen"
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\ncase $1 in --version) echo 1.0;; *) cat {tmp_path}/log > {seen}; exit 1;; esac\n")
    compiler.chmod(0o755)
    code = "import logging, sys; logging.basicConfig(level=20, stream=sys.stderr, format='%(message)s')\n"
    code += "from bmjax.layers import prepare; prepare()"
    env = os.environ | {"CXX": str(compiler), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], check=True, env=env, stderr=log, timeout=300)
    assert "compiling the kernels for this CPU" in seen.read_text()


@pytest.mark.slow
def test_everything_works_without_the_folder(tmp_path):
    """A copy of the package without bmjax/cpu: the backbones' contract on a small one, a training, and a prediction."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__", "cpu")
    shutil.copytree(ROOT / "bmjax", copy / "bmjax", ignore=ignore)
    for folder in ("helpers", "backbones", "fixtures"):
        shutil.copytree(ROOT / "tests" / folder, copy / "tests" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    (copy / "tests/test_run.py").write_text(
        "import dataclasses, bmjax\n"
        "def test_a_run(tiny_config):\n"
        "    stages = (dataclasses.replace(tiny_config.stages[1], epochs=1),)\n"
        "    result = bmjax.train(dataclasses.replace(tiny_config, stages=stages))\n"
        "    run = bmjax.load_run(result.run_dir)\n"
        "    images = bmjax.load_dataset(run.config.data).images[:5]\n"
        "    assert bmjax.predict_probs(run, images).shape == (5, 7)\n"
        "def test_the_folder_is_not_there():\n"
        "    from bmjax.layers.dispatch import described\n"
        "    import sys; assert 'bmjax.cpu' not in sys.modules\n"
        '    assert described() == "XLA\'s own operations"\n'
    )
    tests = ["tests/test_run.py", "tests/backbones/test_backbone_contract.py", "-k", "run or there or densenet_tiny"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "error",
        "-o",
        "markers=slow",
        *tests,
    ]
    env = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
