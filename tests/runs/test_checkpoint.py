"""What is read back of a checkpoint is what was saved, or the damage is named and the one before it is used."""

import errno
import logging
import os
import shutil
from collections import namedtuple

import jax
import numpy as np
import optax
import pytest

from bmjax.runs.checkpoint import Checkpoints, Damaged
from bmjax.runs.state import TrainState


def state(step):
    params = {"a": {"kernel": np.arange(3000, dtype=np.float32).reshape(30, -1) + step, "bias": np.float32([step])}}
    made = TrainState(np.int32(step), params, {}, optax.adam(1e-3).init(params), None, np.zeros(2, np.uint32))
    return jax.tree.map(np.asarray, made)


def save(folder, *steps):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(state(step), {"step": step, "best": float("nan")})
    checkpoints.close()


def read(folder, **options):
    checkpoints = Checkpoints(folder)
    return checkpoints.newest_whole(
        lambda step: (checkpoints.meta(step), checkpoints.restore(step, state(0))), **options
    )


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "last", 3, 6, 9)
    return tmp_path / "last"


def test_what_is_read_is_what_was_saved(folder):
    step, (meta, found) = read(folder)
    assert (step, meta["step"], Checkpoints(folder).steps()) == (9, 9, [9, 6])
    jax.tree.map(np.testing.assert_array_equal, found, state(9))
    assert Checkpoints(folder).raw(9)["['model']['params']['a']['bias']"] == [9]
    assert read(folder, at_most=8)[0] == 6


def test_one_flipped_bit_of_the_arrays_is_seen_and_the_one_before_is_used(folder, caplog):
    flip(largest(folder / "9"))
    step, (_, found) = read(folder)
    assert step == 6
    jax.tree.map(np.testing.assert_array_equal, found, state(6))
    (message,) = caplog.messages
    assert message.startswith(f"{folder}/9 is damaged: ")
    assert message.endswith("; the checkpoint before it, of step 6, is used")
    assert (folder / "9").is_dir()
    read(folder, repair=True)
    assert [p.name for p in (folder.parent / "last-damaged").iterdir()] == ["9"]
    save(folder, 9)
    assert read(folder)[0] == 9


def test_every_byte_of_what_is_said_of_it_counts(folder):
    path = folder / "9/meta/metadata"
    for place in range(0, path.stat().st_size, 41):
        flip(path, place)
        with pytest.raises(Damaged, match=r"last/9 is damaged"):
            Checkpoints(folder).meta(9)
        flip(path, place)
    assert Checkpoints(folder).meta(9)["step"] == 9


def test_arrays_of_another_step_are_not_taken(folder):
    """Whole files in the wrong place."""
    shutil.rmtree(folder / "9/model")
    shutil.copytree(folder / "6/model", folder / "9/model")
    with pytest.raises(Damaged, match=r"array model/params/a/bias is not what was saved \(2 of 9 differ\)"):
        Checkpoints(folder).restore(9, state(0))


def test_where_none_is_whole_the_newest_is_named_with_the_remedy(folder):
    for step in (6, 9):
        (folder / str(step) / "meta/metadata").unlink()
    with pytest.raises(
        Damaged, match=r"last/9 is damaged: .*; no checkpoint in .* is whole\. Put one back from a copy"
    ):
        read(folder, repair=True)
    assert Checkpoints(folder).steps() == [9, 6]
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint yet"):
        read(folder.parent / "none")


def test_another_structure_is_no_damage(folder):
    other = state(0)
    other.params["a"]["kernel"] = np.zeros((2, 2), np.float32)
    with pytest.raises(
        ValueError, match=r"array model/params/a/kernel is float32 \[30, 100\]; expected float32 \[2, 2\]"
    ) as e:
        Checkpoints(folder).restore(9, other)
    assert not isinstance(e.value, Damaged)


def test_reading_leaves_the_folder_as_it_is_and_the_first_save_clears_it(folder):
    half = folder / "12.orbax-checkpoint-tmp"
    shutil.copytree(folder / "9", half)
    read(folder)
    assert half.is_dir()
    save(folder, 12)
    assert sorted(p.name for p in folder.iterdir()) == ["12", "9"]


def test_a_step_that_is_there_is_proven_and_later_ones_give_way(folder):
    """A run that goes on from an earlier checkpoint than the last one that is there."""
    flip(largest(folder / "6"))
    save(folder, 6)
    assert Checkpoints(folder).steps() == [6]
    jax.tree.map(np.testing.assert_array_equal, read(folder)[1][1], state(6))


def leave_no_room(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))


@pytest.mark.parametrize("fails", ["before", "within"])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(folder, monkeypatch, fails):
    checkpoints = Checkpoints(folder)
    if fails == "before":
        leave_no_room(monkeypatch)
    else:

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

        monkeypatch.setattr(type(checkpoints._manager), "save", full)
    with pytest.raises(OSError, match="those before it are whole") as e:
        checkpoints.save(state(12), {})
    assert e.value.errno == errno.ENOSPC
    assert "\n" not in str(e.value)
    assert str(folder) in str(e.value)
    checkpoints.close()
    assert read(folder)[0] == 9


@pytest.mark.parametrize("fails", ["before", "within"])
def test_where_none_could_be_written_none_is_said_to_be_whole(tmp_path, monkeypatch, fails):
    checkpoints = Checkpoints(tmp_path / "last")
    if fails == "before":
        leave_no_room(monkeypatch)
    else:

        def broken(*_, **__):
            raise ValueError("broken")

        monkeypatch.setattr(type(checkpoints._manager), "save", broken)
    with pytest.raises(OSError, match=r"; there is none before it\. (Free .*go|Go) on with --resume") as e:
        checkpoints.save(state(12), {})
    assert "whole" not in str(e.value)
    checkpoints.close()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_disk_that_fills_while_it_is_written(tmp_path, monkeypatch):
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this system mounts no tmpfs")
    try:
        save(disk / "last", 3)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))
        monkeypatch.setattr(Checkpoints, "_check_space", lambda *_: None)
        checkpoints = Checkpoints(disk / "last")
        with pytest.raises(OSError, match="the disk is full; those before it are whole") as e:  # noqa: PT012
            checkpoints.save(state(6), {})
            checkpoints.wait()
        assert "\n" not in str(e.value)
        checkpoints.close()
        assert read(disk / "last")[0] == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_digests_of_older_versions_are_not_asked_for(folder, caplog):
    with caplog.at_level(logging.WARNING):
        meta = folder / "9/meta/metadata"
        meta.write_text('{"step": 9}')
        assert read(folder)[1][0] == {"step": 9}
