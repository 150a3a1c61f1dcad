"""A sweep that is killed, shared by processes, or given to workers is the sweep that one process does at once."""

import random
import signal
import time

import pytest

from tests.helpers.sweeps import finish, start, table, tiny

GRID = ["--grid", "optim.name=adam,sgd", "optim.lr=0.01,1e30", "seed=0:2"]


@pytest.mark.slow
def test_a_sweep_killed_at_five_moments_is_as_one_never_killed(tiny_config, tmp_path):
    config = tiny(tiny_config, tmp_path, epochs=25)
    grid = ["--grid", "optim.name=adam,sgd", "train.batch_size=8,16", "seed=0:3"]
    began = time.monotonic()
    whole = start(config, tmp_path / "whole", *grid)
    finish(whole)
    took = time.monotonic() - began
    r = random.Random(0)
    done: dict = {}
    for kill in range(5):
        process = start(config, tmp_path / "killed", *grid)
        time.sleep(r.uniform(0.3, 0.8) * took)
        assert process.poll() is None or kill > 1, "the machine is too fast for this test's moments"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for name, before in done.items():
            assert (tmp_path / "killed/lab" / name / "results.json").stat().st_mtime_ns == before, f"{name} ran twice"
        rows = (tmp_path / "killed/lab").glob("*/row.json")
        done = {row.parent.name: (row.parent / "results.json").stat().st_mtime_ns for row in rows}
        print(f"killed {kill + 1}: {len(done)} cells finished")
    finish(start(config, tmp_path / "killed", *grid))
    found = table(tmp_path / "killed")
    assert len(found) == 12
    assert found == table(tmp_path / "whole")
    for name, before in done.items():
        assert (tmp_path / "killed/lab" / name / "results.json").stat().st_mtime_ns == before, f"{name} ran twice"


def test_two_processes_do_every_cell_once(tiny_config, tmp_path):
    config = tiny(tiny_config, tmp_path, epochs=2)
    grid = ["--grid", "optim.name=adam,sgd", "seed=0:3", "--at-once", "1"]
    both = [start(config, tmp_path / "both", *grid) for _ in range(2)]
    texts = [finish(process) for process in both]
    trained = [line.split(": ")[1] for text in texts for line in text.splitlines() if "on validation, " in line]
    rows = table(tmp_path / "both")
    assert sorted(trained) == sorted(row["cell"] for row in rows)
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"finished"}
    assert all(text.count("finished") >= 6 for text in texts), "each prints the whole table"
    assert not list((tmp_path / "both/lab").glob("*/claim"))
    assert not list((tmp_path / "both/lab").glob("*/lock"))


@pytest.mark.slow
def test_workers_and_halving_give_the_table_of_one_process(tiny_config, tmp_path):
    config = tiny(tiny_config, tmp_path, epochs=4)
    flags = [*GRID, "--halving", "2"]
    for name, more in (("one", []), ("two", ["--workers", "2"])):
        process = start(config, tmp_path / name, *flags, *more)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 1, out  # cells failed
        assert "Traceback" not in out
        assert "Fatal" not in out
    one, two = table(tmp_path / "one"), table(tmp_path / "two")
    assert one == two
    assert sorted(row["status"] for row in one) == ["failed"] * 4 + ["finished"] + ["paused"] * 3


@pytest.mark.slow
def test_workers_end_with_their_parent(tiny_config, tmp_path):
    config = tiny(tiny_config, tmp_path, epochs=3000)
    process = start(config, tmp_path / "run", "--grid", "seed=0:2", "--workers", "2")
    try:
        _until(lambda: len(list((tmp_path / "run/lab").glob("*/lock"))) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the workers hold its output
    assert not list((tmp_path / "run/lab").glob("*/lock")), "they stopped as by SIGTERM"


def _until(is_so, seconds=120):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)
