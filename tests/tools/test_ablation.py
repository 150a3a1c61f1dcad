"""Each change of a sweep is held to the first, over the seeds that all have."""

import dataclasses

import pytest

from bmjax.analysis.sweep.cells import cells_of
from bmjax.analysis.sweep.rows import FAILED, row_of, write_row
from bmjax.analysis.sweep.run import run_sweep
from bmjax.config import StageConfig
from tools.ablation import table


def test_changes_are_held_to_the_first_over_whole_seeds(quick_config):
    config = dataclasses.replace(quick_config, stages=(StageConfig(epochs=1),))
    changes = [
        {"name": f"{name}-{seed}", "seed": seed} | fields
        for name, fields in (("as it is", {}), ("slow", {"optim.lr": 1e-6}), ("unfinished", {"optim.lr": 1e-2}))
        for seed in range(3)
    ]
    cells = cells_of(config, changes)
    for cell in cells[-3:]:
        write_row(cell, row_of(cell, FAILED, 0.0))
    run_sweep(config, cells)
    found = table(cells[0].config.run_dir.rpartition("/")[0])
    assert [row[0] for row in found.rows] == ["as it is", "slow"]
    assert found.rows[0][2] == ""
    points = 100 * (float(found.rows[1][1].split()[0]) - float(found.rows[0][1].split()[0]))
    assert float(found.rows[1][2].split()[0]) == pytest.approx(points, abs=0.11)
    assert found.notes == ("26 validation images, 3 seeds.", "Not finished: unfinished (0 of 3 runs).")


def test_seeds_are_those_of_the_first_change(quick_config):
    """Whatever others have beyond them, and by their numbers, not by how many there are."""
    config = dataclasses.replace(quick_config, stages=(StageConfig(epochs=1),))
    changes = [
        {"name": f"{name}-{seed}", "seed": seed, "optim.lr": rate}
        for name, rate in (("first", 1e-3), ("whole", 1e-4), ("other seeds", 1e-5))
        for seed in range(3)
    ]
    cells = cells_of(config, changes)
    for cell in (cells[1], cells[6]):
        write_row(cell, row_of(cell, FAILED, 0.0))
    run_sweep(config, cells)
    found = table(cells[0].config.run_dir.rpartition("/")[0])
    assert [row[0] for row in found.rows] == ["first", "whole"]
    assert found.notes == (
        "26 validation images, 2 seeds.",
        "Not finished: first (2 of 3 runs), other seeds (2 of 3 runs).",
    )


def test_another_sweep_is_refused(quick_config):
    cells = cells_of(quick_config, [{"seed": 1}])
    write_row(cells[0], row_of(cells[0], FAILED, 0.0))
    run_sweep(quick_config, cells)
    with pytest.raises(ValueError, match="expected CHANGE-SEED"):
        table(cells[0].config.run_dir.rpartition("/")[0])
