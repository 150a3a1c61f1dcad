"""Folders of images: what is found, decoded, cached and refused."""

import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from bmjax.config import DataConfig
from bmjax.data.images import cache as cache_module
from bmjax.data.images.cache import cached
from bmjax.data.images.decode import decode_image
from bmjax.data.load import list_source, load_dataset
from bmjax.data.sources.folder import list_folder
from bmjax.files import unsealed_json


def save(path, colour, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "cells"
    for k, name in enumerate(("NGS", "BLA")):
        for i in range(4):
            save(root / name / f"{i}.png", (100 * k, 20 * i, 7))
    return root


@pytest.fixture
def config(tree, tmp_path):
    return DataConfig(source="folder", root=str(tree), image_size=16, cache_dir=str(tmp_path / "cache"))


def test_classes_are_sorted_folders_and_other_files_are_passed_over(tree, config, caplog):
    save(tree / "BLA" / "slide 7" / "deep.JPG", (1, 2, 3))
    save(tree / "BLA" / ".ipynb_checkpoints" / "0-checkpoint.png", (9, 9, 9))
    save(tree / ".thumbnails" / "x.png", (9, 9, 9))
    (tree / "PROVENANCE.md").write_text("text")
    (tree / "NGS" / "notes.txt").write_text("text")
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(config, progress=False)
    assert dataset.classes == ("BLA", "NGS")
    deep, others = "BLA/slide 7/deep.JPG", [f"NGS/{i}.png" for i in range(4)]
    assert dataset.ids == (*(f"BLA/{i}.png" for i in range(4)), deep, *others)
    assert dataset.labels.tolist() == [0] * 5 + [1] * 4
    assert dataset.labels.dtype == np.int32
    assert dataset.images.shape == (9, 16, 16, 3)
    assert isinstance(dataset.images, np.memmap)
    np.testing.assert_array_equal(dataset.images[3], np.broadcast_to(np.uint8([100, 60, 7]), (16, 16, 3)))
    np.testing.assert_array_equal(dataset.images[6], np.broadcast_to(np.uint8([0, 20, 7]), (16, 16, 3)))
    assert "2 files that aren't images" in caplog.text


def test_errors_name_the_path_and_what_was_expected(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere'; expected a folder with one sub-folder a class"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"'data.root' is ''; expected a folder"):
        list_folder("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: sub-folders found: none; expected at least two"):
        list_folder(tmp_path / "empty")
    save(tmp_path / "one" / "BLA" / "a.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"one: sub-folders found: BLA; expected at least two"):
        list_folder(tmp_path / "one")
    (tree / "PMO").mkdir()
    (tree / "PMO" / "a.doc").write_text("no image")
    with pytest.raises(ValueError, match=r"PMO holds no image; expected files ending in .*\.png"):
        list_folder(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels=[0, 1]", None),
        ("labels=[0]", "1 labels for 2 ids; expected 2, one an image"),
        ("labels=[0, 2]", r"labels are int64 \[2\] from 0 to 2; expected int \[2\], 0 to 1"),
        ("labels=[0.0, 1.0]", r"labels are float64 \[2\] from 0.0 to 1.0"),
        ("labels=[0, 1], groups=('p',)", "1 groups for 2 ids"),
        ("labels=[0, 1], ids=('a', 'a')", "an id comes twice"),
        ("labels=[0, 1], laboratories=('p',)", "1 laboratories for 2 ids"),
        ("labels=[0, 1], laboratories=(3, 4)", "a laboratory is 3; expected text"),
        ("labels=[0, 1], groups=(1, 2)", "a group is 1; expected text"),
        ("labels=[0, 1], groups='pq'", "groups are 'pq'; expected a tuple"),
        ("labels=[0, 1], groups=None", "groups are None; expected a tuple"),
        ("labels=[0, 1], classes=(0, 1)", "a class is 0; expected text"),
        ("labels=[0, 1], classes=('x', 'x')", "a class comes twice, 'x'; expected classes that differ"),
        ("labels=[0, 0], classes=('x',)", r"the classes are \('x',\); expected at least 2 names"),
        ("labels=[0, 1], classes=('x', '')", r"the classes are \('x', ''\); expected at least 2 names"),
        ("labels=[0, 1], ids=(1, 2)", "an id is 1; expected text"),
        ("labels=[], ids=()", "it lists no image; expected at least one"),
        ("labels=[0, [1, 2]]", r"labels are \[0, \[1, 2\]\]; expected int \[2\]"),
        ("labels=None", "0 labels for 2 ids"),
        ("labels=[0, 1], sides=('training', '')", "a side is 'training'; expected 'train', 'val', 'test' or ''"),
        ("labels=[0, 1], pixel_sizes=('0.1', '0.1')", "a pixel size is '0.1'; expected micrometres"),
        ("labels=[0, 1], pixel_sizes=(0.1, float('nan'))", "a pixel size is nan; expected micrometres"),
        ("labels=[0, 1], pixel_sizes=(0.1, -1)", "a pixel size is -1; expected micrometres"),
        ("labels=[0, 1], origin=None", "origin is None; expected text"),
        ("labels=[0, 1], read=None", "read is None; expected a function of a number"),
        ("labels=[0, 1], read=lambda i: None", r"read\(0\) gives None; expected bytes"),
        ("labels=[0, 1], read=lambda i: f'{i}.png'", r"read\(0\) gives '0.png'; expected bytes"),
        ("labels=[0, 1], read={}.__getitem__", r"read\(0\) raised an error: .*own\.py: KeyError: 0; expected bytes"),
        ("labels=[0, 1], read=lambda i: [][i]", r"read\(0\) raised an error: .*own\.py, line 3: IndexError"),
    ],
)
def test_a_source_of_ones_own_is_held_to_its_form(tmp_path, change, message):
    usual = {"origin": "root", "classes": "('x', 'y')", "read": "lambda i: b''", "ids": "('a', 'b')"}
    fields = ", ".join(f"{name}={value}" for name, value in usual.items() if f"{name}=" not in change)
    (tmp_path / "own.py").write_text(f"import bmjax\ndef cells(root):\n    return bmjax.Listing({fields}, {change})\n")
    config = DataConfig(source=f"{tmp_path / 'own.py'}:cells", root="x")
    if message is None:
        assert list_source(config).labels.dtype == np.int32
        return
    with pytest.raises(ValueError, match=rf"data source '.*own\.py:cells': {message}"):
        list_source(config)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("return 1 / 0", ValueError, "ZeroDivisionError: division by zero"),
        ("raise FileNotFoundError(f'{root}: no scans')", FileNotFoundError, "FileNotFoundError: x: no scans"),
        ("return {}['a\\nb']", ValueError, "KeyError: "),
    ],
)
def test_a_source_of_ones_own_that_raises_is_named_with_its_line(tmp_path, line, error, message):
    (tmp_path / "own.py").write_text(f"def cells(root):\n    {line}\n")
    config = DataConfig(source=f"{tmp_path / 'own.py'}:cells", root="x")
    expected = (
        rf"^config field 'data\.source' is '.*own\.py:cells', which raised .*own\.py, line 2: {message}.*Listing$"
    )
    with pytest.raises(error, match=expected):
        list_source(config)


def test_a_source_of_ones_own_that_can_not_read_some_image_leaves_it_out(tmp_path, tree, caplog):
    (tmp_path / "own.py").write_text(
        "import bmjax, pathlib\n"
        "def cells(root):\n"
        "    paths = sorted(pathlib.Path(root).glob('*/*.png'))\n"
        "    names = [p.parent.name for p in paths]\n"
        "    classes = sorted(set(names))\n"
        "    read = lambda i: None if i == 1 else paths[i].read_bytes() if i != 2 else {}[i]\n"
        "    return bmjax.Listing(pathlib.Path(root), classes, list(map(str, paths)), list(map(classes.index, names)), "
        "read)\n"
    )
    source = f"{tmp_path / 'own.py'}:cells"
    config = DataConfig(source=source, root=str(tree), image_size=16, cache_dir=str(tmp_path / "cache"))
    dataset = load_dataset(config, progress=False)
    assert isinstance(dataset.classes, tuple)
    (_, first), (_, second) = dataset.skipped
    assert "read(1) gives None; expected bytes" in first
    assert "read(2) raised an error" in second
    assert "line 6: KeyError: 2" in second


def test_resize_is_pillows_bilinear_to_a_square(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(values).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", 32), expected)
    Image.fromarray(values[:32, :32]).save(tmp_path / "b.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "b.png", 32), values[:32, :32])


def test_images_are_decoded_once(config, monkeypatch):
    first = load_dataset(config, progress=False)
    monkeypatch.setattr("bmjax.data.images.cache.decode_images", lambda *_: iter(()))
    second = load_dataset(config, progress=False)
    np.testing.assert_array_equal(first.images, second.images)
    assert (first.fingerprint, first.hashes) == (second.fingerprint, second.hashes)


def test_fingerprint_follows_contents_labels_and_size(tree, config):
    def now(**changes):
        return load_dataset(DataConfig(**{**vars(config), **changes}), progress=False).fingerprint

    seen = [now(), now(image_size=24)]
    os.rename(tree / "BLA" / "0.png", tree / "NGS" / "moved.png")
    seen.append(now())
    save(tree / "BLA" / "1.png", (250, 0, 0))
    seen.append(now())
    assert len(set(seen)) == 4
    os.utime(tree / "BLA" / "1.png", (1, 1))  # times don't count
    assert now() == seen[-1]


def folder_of(config):
    (folder,) = (p for p in os.scandir(config.cache_dir) if not p.name.startswith("."))
    return folder


@pytest.mark.parametrize("damage", ["cut", "grown_head", "other_shape", "no_list", "bad_list"])
def test_damaged_cache_is_made_anew(config, damage, caplog):
    good = np.array(load_dataset(config, progress=False).images)
    folder = folder_of(config)
    images, listed = f"{folder.path}/images.npy", f"{folder.path}/skipped.json"
    if damage == "cut":
        os.truncate(images, os.path.getsize(images) - 1)
    elif damage == "grown_head":
        with open(images, "r+b") as f:
            f.write(b"garbage")
    elif damage == "other_shape":
        np.save(images, good[:-1])
    elif damage == "no_list":
        os.remove(listed)
    else:
        with open(listed, "w") as f:
            f.write('{"half')
    np.testing.assert_array_equal(load_dataset(config, progress=False).images, good)
    assert ("damaged (" in caplog.text) == (damage != "no_list")


def test_a_kill_leaves_no_cache_that_is_read(config, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def half(read, n, size, fields):
        yield np.zeros((size, size, 3), np.uint8)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("bmjax.data.images.cache.decode_images", half)
        # As SIGKILL: nothing is cleaned up.
        patch.setattr(cache_module.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(Killed):
            load_dataset(config, progress=False)
    (leftover,) = (tmp_path / "cache").iterdir()
    dataset = load_dataset(config, progress=False)
    assert dataset.images[1].max() > 0
    # A live run's folder stays; an old one's goes with the next cache that is made.
    assert leftover.exists()
    os.utime(leftover, (time.time() - 2 * 86400,) * 2)
    load_dataset(DataConfig(**{**vars(config), "image_size": 20}), progress=False)
    assert not leftover.exists()


KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from bmjax.data.images.cache import cached
from bmjax.files import unsealed_json

def pictures():
    for i in range(100):
        if i == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        yield np.full((64, 64, 3), i, np.uint8)

cached(Path(sys.argv[1]), "key", 100, 64, pictures(), progress=False)
"""


def test_sigkill_while_the_cache_is_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".key.")
    pictures = [np.full((64, 64, 3), i, np.uint8) for i in range(100)]
    images, _ = cached(tmp_path, "key", 100, 64, iter(pictures), progress=False)
    np.testing.assert_array_equal(images, np.stack(pictures))


def test_one_changed_file_is_decoded_anew(tree, config):
    before = load_dataset(config, progress=False)
    save(tree / "BLA" / "2.png", (1, 2, 3))
    after = load_dataset(config, progress=False)
    row = after.ids.index("BLA/2.png")
    np.testing.assert_array_equal(after.images[row, 0, 0], (1, 2, 3))
    others = [i for i in range(8) if i != row]
    np.testing.assert_array_equal(after.images[others], before.images[others])
    assert [a == b for a, b in zip(after.hashes, before.hashes, strict=True)] == [i != row for i in range(8)]


def test_two_runs_that_make_one_cache_both_get_it(tmp_path):
    picture = np.full((16, 16, 3), 5, np.uint8)

    def slow():
        yield picture
        # Meanwhile another run finishes the same.
        cached(tmp_path, "key", 2, 16, iter([picture, picture]), progress=False)
        yield picture

    images, errors = cached(tmp_path, "key", 2, 16, slow(), progress=False)
    assert images.shape == (2, 16, 16, 3)
    assert errors == {}
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_a_full_disk_is_an_error_and_not_a_dead_process(tmp_path):
    with pytest.raises(OSError, match=r"GB free; decoded images need \d+"):
        cached(tmp_path, "key", 10**9, 1024, iter(()), progress=False)


def test_skipped_images_leave_no_hole_in_the_cache(tmp_path):
    pictures = [np.full((4, 4, 3), i % 256, np.uint8) for i in range(600)]
    source = [f"bad {i}" if i in (0, 3, 599) else p for i, p in enumerate(pictures)]
    for _ in range(2):
        images, errors = cached(tmp_path, "key", 600, 4, iter(source), progress=False)
        assert errors == {0: "bad 0", 3: "bad 3", 599: "bad 599"}
        assert images[:, 0, 0, 0].tolist() == [i % 256 for i in range(600) if i not in errors]
        assert isinstance(images, np.memmap)
    assert unsealed_json((tmp_path / "key" / "skipped.json").read_text())[0] == [0, "bad 0"]


@pytest.mark.shared
def test_real_cells(shared, tmp_path):
    root = shared / "data" / "bm7"
    if not root.is_dir():
        pytest.skip(f"no real cells at {root}")
    config = DataConfig(source="folder", root=str(root), image_size=32, cache_dir=str(tmp_path))
    dataset = load_dataset(config, progress=False)
    assert dataset.classes == ("BLA", "EOS", "LYT", "MON", "NGS", "NIF", "PMO")
    assert np.bincount(dataset.labels).tolist() == [400] * 7
    assert dataset.skipped == ()
    assert 60 < dataset.images.mean() < 220
