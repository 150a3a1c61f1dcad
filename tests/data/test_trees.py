"""Trees as people have them: what is used, what is passed over and why, and sums that agree with the folder."""

import collections
import io
import logging
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bmjax.config import DataConfig
from bmjax.data.load import load_dataset
from bmjax.data.sources.archive import list_archive
from bmjax.data.sources.folder import image_files, images_below, list_folder
from bmjax.data.sources.listing import SUFFIXES, SYSTEM_FOLDERS
from bmjax.data.splits import split_dataset, write_split


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(png(zlib.crc32(name.encode(errors="replace"))))
    return Path(root)


SPLIT = [f"{side}/{name}/{side}{i}.png" for side in ("Train", "validation", "TEST") for name in "AB" for i in range(2)]


def test_folders_named_as_sides_are_a_given_split(tmp_path, caplog):
    root = write(tmp_path / "r", *SPLIT, "@eaDir/x.png", "Train/y.png")
    with caplog.at_level(logging.INFO):
        listing = list_folder(root)
    assert listing.classes == ("A", "B")
    assert listing.ids == tuple(sorted(SPLIT))
    assert listing.sides == tuple(["test"] * 4 + ["train"] * 4 + ["val"] * 4)
    assert listing.labels.tolist() == [0, 0, 1, 1] * 3
    assert caplog.text.count("TEST, Train, validation are taken for a given split") == 1
    config = DataConfig(source="folder", root=str(root), image_size=16, cache_dir=str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(config, progress=False)
    said = "r: 2 classes; 14 files seen, 12 used; passed over: 1 in system folders, 1 images in no class's folder"
    assert caplog.text.count(said) == 1
    splits = split_dataset(dataset, config)
    assert [dataset.ids[i].split("/")[0] for i in splits.val] == ["validation"] * 4
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for name in [*SPLIT, "__MACOSX/Train/A/._0.png", "Train/A/@eaDir/0.png"]:
            archive.writestr(f"top/{name}", b"")
    packed = list_archive(tmp_path / "r.zip")
    assert packed.ids == tuple(f"top/{name}" for name in listing.ids)
    assert (packed.classes, packed.sides) == (listing.classes, listing.sides)
    assert packed.seen is not None
    assert (packed.seen.files, packed.seen.used, packed.seen.system) == (14, 12, 2)


@pytest.mark.parametrize(
    "names", [["train", "val"], ["training", "testing"], ["valid", "test"], ["TRAINING", "Valid"], ["train ", "Test"]]
)
def test_two_sides_are_enough_in_any_spelling(tmp_path, names):
    listing = list_folder(write(tmp_path, *(f"{side}/{c}/0.png" for side in names for c in "AB")))
    assert listing.classes == ("A", "B")
    assert len(set(listing.sides)) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/A/0.png", "test/A/0.png", "C/0.png"], r"test, train are named as sides .* beside them lie C; .*move"),
        (["A/0.png", "B/0.png", "test/A/0.png"], r"test are named as sides .* beside them lie A, B"),
        (["train/0.png", "test/0.png", "C/0.png"], r"beside them lie C"),
        (["train/0.png", "test/0.png"], r"test, train has no folders of classes within.*data\.source table"),
        (["train/A/0.png", "train/B/0.png", "test/0.png"], r"test has no folders of classes"),
        (["train/A/0.png", "training/B/0.png"], r"are all named as the train side"),
        (["train/A/0.png", "train/B/0.png"], r"found: train; expected at least two, one a class; .*lie in .*train"),
        (["train/A/0.png", "test/A/0.png"], r"class folders within test, train: A; expected at least two"),
        (["train/A/0.png", "train/B/0.png", "test/A/x.doc"], r"test holds no image"),
        (
            [f"{c}/{s}/0.png" for c in "AB" for s in ("train", "Test")],
            r"A holds the folders Test, train, named as sides",
        ),
        ([f"{s}/{c}/0.png" for c in "AB" for s in ("01_train", "02_test")], r"01_train, 02_test look like sides"),
        (
            [f"{s}/{c}/0.png" for c in "AB" for s in ("TrainSet", "dev")],
            r"TrainSet, dev look like sides of a split, for",
        ),
        ([f"{s}/{c}/0.png" for c in "AB" for s in ("Trainingsdaten", "Testdaten")], r"look like sides of a split"),
        ([f"{s}/{c}/0.png" for c in "AB" for s in ("tr", "te")], r"te, tr look like sides of a split"),
        (["cells/A/0.png", "cells/B/0.png"], r"found: cells; expected at least two, .*lie in .*cells"),
        (["train/A/0.png", "test/B/0.png", "test/C/x.doc"], r"class 'C' of the given split holds no image"),
    ],
)
def test_what_may_be_classes_or_sides_is_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        list_folder(write(tmp_path, *names))


def test_classes_may_hold_the_words_of_sides(tmp_path):
    names = ["test negative/1-100/0.png", "train wreck/1-100/1.png", "A/1-100/2.png"]
    assert list_folder(write(tmp_path, *names)).classes == ("A", "test negative", "train wreck")


def test_the_same_folders_in_every_class_are_said(tmp_path, caplog):
    root = write(tmp_path / "r", *(f"{fold}/{c}/0.png" for fold in ("fold1", "fold2") for c in "AB"))
    assert list_folder(root).classes == ("fold1", "fold2")
    assert (
        "folders fold1, fold2 are taken for the classes, and each holds A, B; if those are the classes" in caplog.text
    )
    caplog.clear()
    list_folder(write(tmp_path / "s", *(f"{c}/{i}-{i}000/0.png" for c in "AB" for i in range(1, 3))))
    assert not caplog.text


def test_copies_in_two_classes_and_names_alike_are_said(tmp_path, caplog):
    root = write(tmp_path / "r", *(f"{c}/{i}.png" for c in ("\u00e9", "e\u0301", "B") for i in range(2)))
    (root / "B/0.png").write_bytes((root / "\u00e9/1.png").read_bytes())
    config = DataConfig(source="folder", root=str(root), image_size=16, cache_dir=str(tmp_path / "cache"))
    assert len(load_dataset(config, progress=False)) == 6
    assert "are taken for two classes; are they one?" in caplog.text
    assert "r: 1 images are copies of one in another class: B/0.png in B and \u00e9/1.png in \u00e9" in caplog.text
    with pytest.raises(ValueError, match=r"expected one class for each image, since data\.strict is set"):
        load_dataset(DataConfig(**{**vars(config), "strict": True}), progress=False)


def test_one_class_may_be_called_test(tmp_path):
    assert list_folder(write(tmp_path, "A/0.png", "test/0.png")).classes == ("A", "test")


@pytest.mark.parametrize("system", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN", "lost+found", "THUMBS"])
def test_system_folders_are_counted_at_any_depth(tmp_path, system):
    own = [f"{c}/{i}.png" for c in "AB" for i in range(3)]
    others = [f"{system}/0.png", f"A/{system}/0.png/T.jpg", f"B/deep/{system}/x/y.txt", "B/.hidden/z.png", "B/n.txt"]
    root = write(tmp_path / "r", *own, *others)
    listing = list_folder(root)
    assert listing.ids == tuple(own)
    seen = listing.seen
    assert seen is not None
    assert (seen.files, seen.used, seen.system, seen.hidden, seen.no_image) == (11, 6, 3, 1, 1)
    assert images_below(root) == own
    assert image_files([str(root)]) == [root / name for name in own]
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for name in own + others:
            archive.writestr(name, b"")
    assert list_archive(tmp_path / "r.zip").seen == seen


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path, caplog):
    root = write(tmp_path / "r", *(f"{c}/{i}.png" for c in "AB" for i in range(2)))
    write(tmp_path / "more", *(f"deep/{i}.png" for i in range(5)))
    (tmp_path / "more/deep/back").symlink_to(tmp_path / "more")
    (root / "A/more").symlink_to(tmp_path / "more")
    (root / "A/up").symlink_to("..")
    (root / "A/above").symlink_to(tmp_path)
    (root / "B/more").symlink_to(tmp_path / "more")
    (root / "B/x.png").symlink_to("/nowhere")
    (root / "B/self.png").symlink_to(root / "B/self.png")
    (root / "C").symlink_to(write(tmp_path / "elsewhere", "0.png"))
    with caplog.at_level(logging.INFO):
        listing = list_folder(root)
    assert listing.ids == (
        *("A/0.png", "A/1.png", *(f"A/more/deep/{i}.png" for i in range(5))),
        *("B/0.png", "B/1.png", "C/0.png"),
    )
    seen = listing.seen
    assert seen is not None
    assert (seen.files, seen.used, seen.broken, seen.again, seen.links) == (16, 10, 2, 4, 2)
    assert "2 links lead nowhere and are passed over: B/self.png, B/x.png" in caplog.text
    assert "A/above, A/more/deep/back, A/up, B/more" in caplog.text


def test_two_classes_that_are_links_to_one_folder_are_refused(tmp_path, caplog):
    root = write(tmp_path / "r", "A/0.png", "B/0.png")
    (root / "alias").symlink_to("A")
    (root / "loop").symlink_to(".")
    assert list_folder(root).ids == ("A/0.png", "B/0.png")
    assert "2 links lead to a folder that is read already and are passed over: alias, loop" in caplog.text
    write(tmp_path / "more", "0.png")
    (root / "C").symlink_to(tmp_path / "more")
    (root / "D").symlink_to(tmp_path / "more")
    with pytest.raises(ValueError, match=r"r: D leads to .*more, which is read already by another link"):
        list_folder(root)


def test_names_that_are_not_utf8_work_to_the_split_and_back(tmp_path):
    names = [f"{c}/{i}\udce4.png" for c in ("\udce9", "B") for i in range(12)]
    root = write(tmp_path / "r", *names)
    config = DataConfig(
        source="folder", root=str(root), image_size=16, cache_dir=str(tmp_path / "cache"), stratify=True
    )
    dataset = load_dataset(config, progress=False)
    assert dataset.classes == ("B", "\udce9")
    splits = split_dataset(dataset, config)
    write_split(tmp_path / "split.csv", dataset, splits)
    assert b"\xe9/0\xe4.png" in (tmp_path / "split.csv").read_bytes()
    again = DataConfig(**{**vars(config), "manifest": str(tmp_path / "split.csv"), "split_seed": 5})
    assert split_dataset(dataset, again).equals(splits)
    split_dataset(dataset, DataConfig(**{**vars(config), "split_by": "block", "block_size": 2}))


# Trees made at random: a folder is a dictionary from a name in bytes to a folder, b"" for a file, or a link.

_PLAIN = st.binary(min_size=1, max_size=6).map(lambda b: b.translate(None, b"/\0")).filter(lambda b: b.strip(b"."))
_SYSTEM = st.sampled_from(sorted(SYSTEM_FOLDERS)).map(lambda s: s.upper().encode()) | st.just(b"@eaDir")
_ENDING = st.sampled_from([*sorted(SUFFIXES), ".PNG", ".Jpg", ".tiF", ".txt", "", ".png.txt", ".db"]).map(str.encode)
_FILE = st.tuples(st.sampled_from([b"", b"."]) | _PLAIN, _PLAIN, _ENDING).map(b"".join)
_LINK = st.tuples(st.sampled_from(["root", "folder", "up", "outside", "nowhere", "file", "self"]), st.integers(0, 99))
_FOLDER_NAME = _PLAIN | _PLAIN.map(lambda b: b"." + b) | _SYSTEM
_TREE = st.recursive(
    st.dictionaries(_FILE, st.just(b"") | _LINK, max_size=3),
    lambda inner: st.dictionaries(_FILE | _FOLDER_NAME, st.just(b"") | _LINK | inner, max_size=4),
    max_leaves=8,
)


def make(folder, tree, base, links):
    os.makedirs(folder, exist_ok=True)
    for name, what in tree.items():
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            continue
        if isinstance(what, dict):
            make(path, what, base, links)
        elif isinstance(what, tuple):
            links.append((path, *what))
        else:
            with open(path, "wb"):
                pass


def link_all(base, links):
    folders = sorted(os.path.join(at, d) for at, ds, _ in os.walk(base) for d in ds)
    files = sorted(os.path.join(at, f) for at, _, fs in os.walk(base) for f in fs)
    for path, kind, number in links:
        target = {
            "root": os.path.join(base, b"root"),
            "folder": folders[number % len(folders)],
            "up": b"." if number % 2 else b"..",
            "outside": os.path.join(base, b"outside"),
            "nowhere": b"/nowhere/at/all",
            "file": files[number % len(files)] if files else b"none",
            "self": os.path.basename(path),
        }[kind]
        os.symlink(target, path)


def expected(root):
    """What should be found, plainly: all without links first, then links in the order of their paths."""
    root = os.fsdecode(root)
    found, counts, read, waiting = [], collections.Counter(), set(), [("", root)]
    while waiting:
        waiting.sort()
        prefix, path = waiting.pop(0)
        if prefix:
            target, holder = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
            if target in read or os.path.commonpath([target, holder]) == target:
                counts["again"] += 1
                continue
            counts["links"] += 1
        plain = [(f"{prefix}/" if prefix else "", path)]
        while plain:
            inner, at = plain.pop()
            read.add(os.path.realpath(at))
            for name in os.listdir(at):
                full, relative = os.path.join(at, name), inner + name
                folder = os.path.isdir(full)
                why = "system" if folder and name.lower() in SYSTEM_FOLDERS else "hidden" if name[0] == "." else ""
                if folder and not os.path.islink(full):
                    if why:
                        counts[why] += sum(
                            len(fs) + sum(os.path.islink(os.path.join(a, d)) for d in ds) for a, ds, fs in os.walk(full)
                        )
                    elif os.path.realpath(full) in read:
                        counts["again"] += 1
                    else:
                        plain.append((f"{relative}/", full))
                elif why:
                    counts[why] += 1
                elif folder:
                    waiting.append((relative, full))
                elif not os.path.exists(full):
                    counts["broken"] += 1
                elif os.path.splitext(name)[1].lower() not in SUFFIXES:
                    counts["no_image"] += 1
                else:
                    found.append(relative)
    return found, counts


@given(_TREE, _TREE, _TREE)
def test_sums_agree_with_trees_made_at_random(first, second, outside):
    base = os.path.realpath(tempfile.mkdtemp()).encode()
    try:
        links: list[tuple[bytes, str, int]] = []
        for folder, tree in ((b"root/A", first), (b"root/B\xe9", second), (b"outside", outside)):
            make(os.path.join(base, folder), tree, base, links)
        for folder in (b"root/A/own.png", b"root/B\xe9/own\xe4.PNG"):
            with open(os.path.join(base, folder), "wb"):
                pass
        link_all(base, links)
        root = os.path.join(base, b"root")
        listing = list_folder(os.fsdecode(root))
        found, counts = expected(root)
        assert sorted(listing.ids) == sorted(found)
        assert [listing.classes[label] for label in listing.labels] == [name.split("/")[0] for name in listing.ids]
        seen = listing.seen
        assert seen is not None
        passed = {name: getattr(seen, name) for name in ("system", "hidden", "no_image", "broken", "again", "links")}
        assert passed == {name: counts[name] for name in passed}
        assert seen.used == len(found)
        assert seen.files == seen.used + sum(passed.values()) - seen.links
        for i in range(len(listing)):
            assert listing.read(i) == b""
        assert images_below(os.fsdecode(root)) == sorted(found)
    finally:
        shutil.rmtree(base)
