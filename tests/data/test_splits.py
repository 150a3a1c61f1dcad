"""Splits: by content, stable, stratified in expectation, and recorded."""

import csv
import json

import numpy as np
import pytest

from bmjax.config import DataConfig
from bmjax.data import Dataset, dataset_summary, read_split, split_dataset, write_split
from bmjax.data.splits import NAMES, side_of


def dataset_of(hashes, labels, classes=("a", "b")):
    n = len(hashes)
    return Dataset(
        name="d",
        classes=classes,
        images=np.zeros((n, 16, 16, 3), np.uint8),
        labels=np.asarray(labels, np.int32),
        ids=tuple(f"{classes[k]}/{i}.png" for i, k in enumerate(labels)),
        hashes=tuple(hashes),
        fingerprint="f" * 64,
    )


def numbered(n, classes=2, start=0):
    return dataset_of(
        [f"{i:064x}" for i in range(start, start + n)], [i % classes for i in range(n)], tuple("abcdefg"[:classes])
    )


def sides(dataset, config):
    splits = split_dataset(dataset, config)
    return {dataset.ids[i]: name for name in NAMES for i in getattr(splits, name)}


def test_every_row_is_on_one_side():
    dataset = numbered(500)
    splits = split_dataset(dataset, DataConfig())
    rows = np.concatenate([splits.train, splits.val, splits.test])
    assert sorted(rows) == list(range(500))
    for part in (splits.train, splits.val, splits.test):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def test_shares_hold_for_each_class_up_to_binomial_noise():
    dataset, shares = numbered(14_000, classes=7), (0.6, 0.1, 0.3)
    splits = split_dataset(dataset, DataConfig(split=shares))
    for name, share in zip(NAMES, shares, strict=True):
        counts = np.bincount(dataset.labels[getattr(splits, name)], minlength=7)
        noise = (2000 * share * (1 - share)) ** 0.5
        assert np.abs(counts - 2000 * share).max() < 4 * noise
        assert counts.std() > 0  # by hash, not by quota


def test_added_and_removed_files_move_no_other():
    config = DataConfig()
    few, many = numbered(300), numbered(900)
    before, after = sides(few, config), sides(many, config)
    assert {name: after[name] for name in before} == before


def test_copies_lie_on_one_side_also_across_classes():
    hashes = [f"{i % 60:064x}" for i in range(240)]
    dataset = dataset_of(hashes, [i // 120 for i in range(240)])
    splits = split_dataset(dataset, DataConfig())
    seen = [{dataset.hashes[i] for i in getattr(splits, name)} for name in NAMES]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert dataset_summary(dataset, splits)["copies"] == 180


def test_the_seed_changes_the_split_and_nothing_else_does():
    dataset = numbered(300)
    base = sides(dataset, DataConfig())
    assert sides(dataset, DataConfig(image_size=64)) == base
    assert sides(dataset, DataConfig(split_seed=1)) != base
    # Written down, so that no release moves images between the splits of a published result.
    assert [side_of(f"{i:064x}", 0, (0.7, 0.15, 0.15)) for i in range(12)] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0]


def test_a_class_missing_in_a_split_is_an_error_that_helps():
    dataset = dataset_of([f"{i:064x}" for i in range(205)], [0] * 200 + [1] * 5)
    lacking = [
        seed for seed in range(10) if len({side_of(h, seed, (0.7, 0.15, 0.15)) for h in dataset.hashes[-5:]}) < 3
    ]
    assert len(lacking) >= 3
    for seed in lacking:
        with pytest.raises(ValueError, match=r"class 'b' \(5 images\) has none in the \w+ split") as error:
            split_dataset(dataset, DataConfig(split_seed=seed))
        advised = int(str(error.value).rsplit(" ", 1)[1])
        split_dataset(dataset, DataConfig(split_seed=advised))
    hopeless = dataset_of([f"{i:064x}" for i in range(202)], [0] * 200 + [1] * 2)
    with pytest.raises(ValueError, match=r"'b' \(2 images\).*: add images$"):
        split_dataset(hopeless, DataConfig())


def test_written_and_read_back(tmp_path):
    dataset = numbered(200)
    dataset = Dataset(**{**vars(dataset), "ids": ('a/"q", x.png', "b/\udce4.png", *dataset.ids[2:])})
    splits = split_dataset(dataset, DataConfig())
    write_split(tmp_path / "split.csv", dataset, splits)
    back = read_split(tmp_path / "split.csv", dataset)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(back, name), getattr(splits, name))
    with open(tmp_path / "split.csv", newline="", errors="surrogateescape") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["path", "sha256", "label", "group", "split"]
    assert len(rows) == 201
    assert rows[1] == [dataset.ids[0], dataset.hashes[0], "a", "", rows[1][4]]
    assert [p.name for p in tmp_path.iterdir()] == ["split.csv"]


@pytest.mark.parametrize("change", ["content", "gone", "new"])
def test_a_split_of_other_data_is_refused(tmp_path, change):
    dataset = numbered(200)
    write_split(tmp_path / "split.csv", dataset, split_dataset(dataset, DataConfig()))
    if change == "content":
        other = Dataset(**{**vars(dataset), "hashes": ("e" * 64, *dataset.hashes[1:])})
    else:
        other = numbered(199 if change == "gone" else 201)
    with pytest.raises(ValueError, match=r"split\.csv.*(a/0\.png|b/199\.png|a/200\.png)"):
        read_split(tmp_path / "split.csv", other)


def test_summary_is_json_and_adds_up():
    dataset = Dataset(**{**vars(numbered(400)), "skipped": (("a/x.png", "the file is empty"),)})
    summary = json.loads(json.dumps(dataset_summary(dataset, split_dataset(dataset, DataConfig()))))
    assert summary["classes"] == ["a", "b"]
    assert sum(sum(c.values()) for c in summary["counts"].values()) == summary["n"] == 400
    assert sum(summary["counts"][name]["b"] for name in NAMES) == 200
    assert summary["skipped"] == [["a/x.png", "the file is empty"]]
    assert summary["copies"] == 0
    assert summary["image_size"] == 16
