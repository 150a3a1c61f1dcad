"""All checks: `python tools/check.py`. Format and lint, then the tests, with the types beside them.

Tests marked `slow`, of a minute or more, are left out: they are `--slow`, a job of its own.

`--quick`: lint, types and the tests that see most for their time: floors, configuration, contracts of small members,
one training and one resume by each engine; under three minutes on 2 cores with compiled programs in the cache.
`--slow`: only the tests marked so, and the properties that Hypothesis tries on trees, tables and arrays, 5,000 examples
of each instead of 200.
`--accelerator`: only the tests marked so, on whatever devices jax finds (a GPU, a TPU, else CPUs); they need no more
than what bmjax trains with. Further arguments go to pytest. Exits with the first failure.
"""

import os
import pathlib
import subprocess
import sys

STYLE = (("ruff", "format", "--check", "."), ("ruff", "check", "."))
TYPES = ("pyright", "--pythonpath", sys.executable)
# Two processes: tracing and most compiling keep one core busy. A file's tests share what they compile.
TESTED = ("pytest", "-n", "2", "--dist", "loadfile", "-m", "not slow")
QUICK = (
    "tests/test_floors.py",
    "tests/config",
    "tests/attention/test_registry.py",
    "tests/backbones/test_backbone_contract.py",
    "tests/data/test_batches.py",
    "tests/data/test_splits.py",
    "tests/layers/test_layers.py",
    "tests/runs/test_metrics.py",
    "tests/runs/test_old_runs.py",
    "tests/training/test_losses.py",
    "tests/training/test_loop.py",
    "tests/training/test_signals.py",
)
PROPERTIES = (
    "tests/data/test_trees.py::test_sums_agree_with_trees_made_at_random",
    "tests/data/test_tables.py::test_any_table_is_read_right_or_refused",
    "tests/training/test_arguments.py::test_arrays_of_any_kind_are_taken_or_refused_in_words",
    "tests/training/test_arguments.py::test_arrays_of_any_size_are_read_as_their_files_are",
)
TESTS = pathlib.Path(__file__).resolve().parents[1] / "tests"


def run(*arguments: str, **environment: str) -> int:
    print("+", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", *arguments], check=False, env=os.environ | environment).returncode


def types_and_tests(extra: list[str]) -> int:
    """Pyright beside the tests, whose processes spend their first minute on imports. Types that are wrong end both."""
    print("+", *TYPES, flush=True)
    types = subprocess.Popen(
        [sys.executable, "-m", *TYPES], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print("+", *TESTED, *extra, flush=True)
    tests = subprocess.Popen([sys.executable, "-m", *TESTED, *extra])
    try:
        print(types.communicate()[0], flush=True)
        return types.returncode or tests.wait()
    finally:
        for process in (types, tests):
            if process.poll() is None:
                process.kill()


def on_accelerator(extra: list[str]) -> int:
    """Runs the marked tests in several processes, which share the device's memory; sums in a fixed order."""
    files = sorted(str(path) for path in TESTS.rglob("test_*.py") if "mark.accelerator" in path.read_text())
    processes = str(max(1, min(6, (os.cpu_count() or 2) // 2)))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    environment = {"BMJAX_TEST_ACCELERATOR": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}
    # Such machines have plugins of others; that of pytest-benchmark warns of several processes, which is an error here.
    return run("pytest", "-p", "no:benchmark", "-n", processes, "-m", "accelerator", *files, *extra, **environment)


def main() -> int:
    given = sys.argv[1:]
    if "--accelerator" in given:
        given.remove("--accelerator")
        return on_accelerator(given)
    if "--slow" in given:
        given.remove("--slow")
        properties = run("pytest", "-n", "2", "--hypothesis-profile", "slow", *PROPERTIES, *given)
        return properties or run("pytest", "-n", "2", "--dist", "loadfile", "-m", "slow", *given)
    if "--quick" in given:
        given[given.index("--quick") : given.index("--quick") + 1] = QUICK
    for arguments in STYLE:
        if code := run(*arguments):
            return code
    return types_and_tests(given)


if __name__ == "__main__":
    raise SystemExit(main())
