"""A sweep that is killed, shared by processes, or given to workers is the sweep that one process does at once."""

import random
import signal
import time

import pytest

from tests.helpers.sweeps import finish, start, table, tiny


def epochs_logged(folder):
    """Of all cells."""
    return sum(path.read_bytes().count(b'"kind": "epoch"') for path in (folder / "lab").glob("*/metrics.jsonl"))


GRID = ["--grid", "optim.name=adam,sgd", "optim.lr=0.01,1e30", "seed=0:2"]


@pytest.mark.slow
def test_a_sweep_killed_at_five_moments_is_as_one_never_killed(quick_config, tmp_path):
    config = tiny(quick_config, tmp_path, epochs=25)
    grid = ["--grid", "optim.name=adam,sgd", "seed=0:4"]
    finish(start(config, tmp_path / "whole", *grid))
    r, killed = random.Random(0), tmp_path / "killed"
    done: dict[str, int] = {}
    for kill in range(5):
        goal = epochs_logged(killed) + r.randint(10, 38)  # of 8 times 25
        process = start(config, killed, *grid)
        until(lambda goal=goal, process=process: epochs_logged(killed) >= goal or process.poll() is not None)
        time.sleep(r.uniform(0, 0.2))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for name, before in done.items():
            assert (killed / "lab" / name / "results.json").stat().st_mtime_ns == before, f"{name} ran twice"
        rows = (killed / "lab").glob("*/row.json")
        done = {row.parent.name: (row.parent / "results.json").stat().st_mtime_ns for row in rows}
        print(f"killed {kill + 1}: {epochs_logged(killed)} epochs logged, {len(done)} cells finished")
    assert len(done) < 8
    finish(start(config, tmp_path / "killed", *grid))
    found = table(tmp_path / "killed")
    assert len(found) == 8
    assert found == table(tmp_path / "whole")
    for name, before in done.items():
        assert (tmp_path / "killed/lab" / name / "results.json").stat().st_mtime_ns == before, f"{name} ran twice"


def test_two_processes_do_every_cell_once(quick_config, tmp_path):
    config = tiny(quick_config, tmp_path, epochs=2)
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
def test_workers_and_halving_give_the_table_of_one_process(quick_config, tmp_path):
    config = tiny(quick_config, tmp_path, epochs=4)
    flags = [*GRID, "--halving", "2"]
    for name, more in (("one", []), ("two", ["--workers", "2"])):
        process = start(config, tmp_path / name, *flags, *more)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 1, out  # cells failed
        assert "Traceback" not in out
        assert "Fatal" not in out
    one, two = table(tmp_path / "one"), table(tmp_path / "two")
    assert one == two
    assert sorted(row["status"] for row in one) == ["failed"] * 4 + ["finished"] * 2 + ["paused"] * 2


@pytest.mark.slow
def test_workers_end_with_their_parent(quick_config, tmp_path):
    config = tiny(quick_config, tmp_path, epochs=3000)
    process = start(config, tmp_path / "run", "--grid", "seed=0:2", "--workers", "2")
    try:
        until(lambda: len(list((tmp_path / "run/lab").glob("*/lock"))) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the workers hold its output
    assert not list((tmp_path / "run/lab").glob("*/lock")), "they stopped as by SIGTERM"


def until(is_so, seconds=120):
    """Waits until it is."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)
