"""Splits: by content, stable, stratified in expectation, and recorded."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from bmjax.config import Config, DataConfig, from_json, to_json
from bmjax.data.dataset import Dataset
from bmjax.data.splits import NAMES, cross_validation, dataset_summary, read_split, side_of, split_dataset, write_split
from bmjax.runs.folder import load_data, record_split


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


def grouped(n=600, groups=60, classes=3):
    """Images of patients, several classes each."""
    dataset = numbered(n, classes)
    return dataclasses.replace(dataset, groups=tuple(f"p{i // (n // groups)}" for i in range(n)))


def test_a_group_is_on_one_side():
    dataset, config = grouped(), DataConfig(split_by="group")
    found = sides(dataset, config)
    by_group = {g: {found[dataset.ids[i]] for i in range(600) if dataset.groups[i] == g} for g in set(dataset.groups)}
    assert all(len(names) == 1 for names in by_group.values())
    assert set.union(*by_group.values()) == set(NAMES)
    # More images of known patients, and further patients, move none.
    more = grouped(1200, 60)
    more = dataclasses.replace(more, groups=(*dataset.groups, *(f"p{i % 90}" for i in range(600))))
    after = sides(more, config)
    assert {name: after[name] for name in found} == found


def test_a_copy_joins_two_groups():
    dataset, config = grouped(), DataConfig(split_by="group")
    found = sides(dataset, config)
    first = {found[dataset.ids[i]]: i for i in (0, *range(10, 600, 10))}
    a, b = first["train"], first["test"]
    joined = dataclasses.replace(
        dataset, hashes=tuple(dataset.hashes[a] if i == b else h for i, h in enumerate(dataset.hashes))
    )
    after = sides(joined, config)
    both = [i for i in range(600) if dataset.groups[i] in (dataset.groups[a], dataset.groups[b])]
    assert len({after[dataset.ids[i]] for i in both}) == 1
    others = [dataset.ids[i] for i in range(600) if i not in both]
    assert [after[i] for i in others] == [found[i] for i in others]


def test_images_without_a_group_are_named():
    with pytest.raises(ValueError, match=r"d has no group; expected one for each image"):
        split_dataset(numbered(100), DataConfig(split_by="group"))
    lacking = dataclasses.replace(grouped(), groups=("", *grouped().groups[1:]))
    with pytest.raises(ValueError, match=r"1 images, the first 'a/0\.png', have no group"):
        split_dataset(lacking, DataConfig(split_by="group"))


def test_blocks_of_neighbouring_numbers():
    dataset = numbered(2000)
    ids = tuple(f"{'ab'[i % 2]}/{1 + i // 1000}/{'ab'[i % 2].upper()}_{i // 2:05d}.jpg" for i in range(2000))
    dataset, config = dataclasses.replace(dataset, ids=ids), DataConfig(split_by="block", block_size=20)
    found = sides(dataset, config)
    blocks = [{found[ids[2 * i + k]] for i in range(20 * b, 20 * b + 20)} for b in range(50) for k in range(2)]
    assert all(len(names) == 1 for names in blocks)
    assert set.union(*blocks) == set(NAMES)
    # A block of one class says nothing of the other's.
    assert any(blocks[2 * b] != blocks[2 * b + 1] for b in range(50))
    with pytest.raises(ValueError, match=r"a/cell\.png: no number in the file's name"):
        split_dataset(dataclasses.replace(dataset, ids=("a/cell.png", *ids[1:])), config)


@pytest.mark.parametrize("sizes", [(7, 40, 333), (20, 21, 22)])
def test_stratified_shares_are_exact(sizes):
    labels = np.repeat(np.arange(3), sizes)
    dataset = dataset_of([f"{i:064x}" for i in range(len(labels))], labels, ("a", "b", "c"))
    splits = split_dataset(dataset, DataConfig(stratify=True))
    for name, share in zip(NAMES, (0.7, 0.15, 0.15), strict=True):
        counts = np.bincount(labels[getattr(splits, name)], minlength=3)
        assert np.abs(counts - np.array(sizes) * share).max() < 1
    # Those of the marrow collection's rarest class, too few for chance.
    few = dataset_of([f"{i:064x}" for i in range(208)], [0] * 200 + [1] * 8)
    assert [int((few.labels[getattr(split_dataset(few, DataConfig(stratify=True)), n)] == 1).sum()) for n in NAMES] == [
        6,
        1,
        1,
    ]


def test_added_files_move_few_when_stratified_and_none_with_a_manifest(tmp_path):
    config = DataConfig(stratify=True)
    few, many = numbered(1000), numbered(1100)
    before, after = sides(few, config), sides(many, config)
    moved = sum(after[name] != before[name] for name in before)
    assert 0 < moved < 50
    write_split(tmp_path / "split.csv", few, split_dataset(few, config))
    grown = sides(many, dataclasses.replace(config, manifest=str(tmp_path / "split.csv")))
    assert {name: grown[name] for name in before} == before
    for label in (0, 1):
        counts = [sum(grown[many.ids[i]] == name for i in range(1100) if many.labels[i] == label) for name in NAMES]
        assert np.abs(np.array(counts) - 550 * np.array(config.split)).max() < 1.5


@pytest.mark.parametrize("stratify", [False, True])
def test_folds(stratify):
    dataset = numbered(3000, classes=3)
    tests = []
    for override in cross_validation(5):
        config = DataConfig(stratify=stratify, **{name.removeprefix("data."): v for name, v in override.items()})
        splits = split_dataset(dataset, config)
        assert sorted(np.concatenate([splits.train, splits.val, splits.test])) == list(range(3000))
        tests.append(splits.test)
        share = len(splits.val) / (len(splits.train) + len(splits.val))
        assert abs(share - 0.15 / 0.85) < (0.002 if stratify else 0.03)
        if stratify:
            assert np.bincount(dataset.labels[splits.test]).tolist() == [200] * 3
    assert sorted(np.concatenate(tests)) == list(range(3000)), "each image is tested once"


def test_folds_are_stable_and_repeats_differ():
    few, many = numbered(300), numbered(900)
    for fold in (0, 2):
        config = DataConfig(folds=3, fold=fold)
        before, after = sides(few, config), sides(many, config)
        assert {name: after[name] for name in before} == before
    overrides = list(cross_validation(3, repeats=2))
    assert len(overrides) == len({tuple(o.items()) for o in overrides}) == 6
    assert sides(few, DataConfig(folds=3, split_seed=1)) != sides(few, DataConfig(folds=3, split_seed=0))


@pytest.mark.parametrize("options", [{}, {"stratify": True}, {"folds": 4, "fold": 1}, {"split_by": "group"}])
def test_near_duplicates_stay_together(tmp_path, options):
    dataset = grouped()
    rng = np.random.default_rng(0)
    pairs = rng.permutation(600)[:200].reshape(100, 2)
    rows = [(dataset.ids[i], f"g{k}") for k, pair in enumerate(pairs) for i in pair]
    (tmp_path / "near.csv").write_text("path,group\n" + "".join(f"{path},{group}\n" for path, group in rows))
    # Groups that near duplicates join are one: with all 60 patients joined there would be nothing to split.
    if options.get("split_by") == "group":
        rows = rows[:6]
        (tmp_path / "near.csv").write_text("path,group\n" + "".join(f"{path},{group}\n" for path, group in rows))
        pairs = pairs[:3]
    found = sides(dataset, DataConfig(duplicates=str(tmp_path / "near.csv"), **options))
    assert all(found[dataset.ids[i]] == found[dataset.ids[j]] for i, j in pairs)
    alone = sides(dataset, DataConfig(**options))
    assert any(alone[dataset.ids[i]] != alone[dataset.ids[j]] for i, j in pairs)
    one = dataset.ids[0]
    for text, message in (
        ("z.png,1\n", r"'z\.png' is no image of d"),
        (f"{one},1\n{one},2\n", r"stands in rows 1 and 2; expected one row an image"),
        (f"{one},1\n{dataset.ids[1]},\n", r"row 2, column group: ''; expected a group"),
        (f"{one},nan\n", r"row 1, column group: 'nan'"),
    ):
        (tmp_path / "near.csv").write_text("path,group\n" + text)
        with pytest.raises(ValueError, match=message):
            split_dataset(dataset, DataConfig(duplicates=str(tmp_path / "near.csv")))


def test_a_source_may_bring_its_split_and_leave_some_open(caplog):
    dataset = numbered(300)
    given = ("train", "val", "test", "", "") * 60
    found = sides(dataclasses.replace(dataset, sides=given), DataConfig())
    drawn = sides(dataset, DataConfig())
    for i, side in enumerate(given):
        assert found[dataset.ids[i]] == (side or drawn[dataset.ids[i]])
    assert caplog.text == ""
    torn = dataclasses.replace(dataset, sides=given, hashes=(dataset.hashes[2], *dataset.hashes[1:]))
    kept = sides(torn, DataConfig())
    assert (kept[torn.ids[0]], kept[torn.ids[2]]) == ("train", "test")
    assert "1 images stand on another side than their copies" in caplog.text
    assert f"{torn.ids[2]!r} in test and {torn.ids[0]!r} in train; figures" in caplog.text
    with pytest.raises(ValueError, match=r"1 images stand on another side.*data\.strict is set"):
        split_dataset(torn, DataConfig(strict=True))
    many = dataclasses.replace(dataset, sides=given, hashes=("same",) * 20 + dataset.hashes[20:])
    with pytest.raises(ValueError, match=r"8 images stand on (?:[^;]*; ){5}\.\.\.; expected"):
        split_dataset(many, DataConfig(strict=True))


def test_a_split_without_validation_is_named():
    dataset = dataclasses.replace(numbered(100), sides=("train",) * 80 + ("test",) * 20)
    with pytest.raises(ValueError, match=r"none in the val split.*so leave some of its images without a side"):
        split_dataset(dataset, DataConfig())
    # As told: those left open are drawn; stratified, they make up for what the validation split lacks.
    opened = dataclasses.replace(dataset, sides=("train",) * 65 + ("",) * 15 + ("test",) * 20)
    splits = split_dataset(opened, DataConfig(stratify=True, split=(0.65, 0.15, 0.2)))
    assert splits.val.tolist() == list(range(65, 80))


def test_a_manifest_is_a_record_that_can_be_given_back(tmp_path):
    dataset = grouped()
    splits = split_dataset(dataset, DataConfig(split_by="group", split_seed=3))
    write_split(tmp_path / "split.csv", dataset, splits)
    again = split_dataset(dataset, DataConfig(manifest=str(tmp_path / "split.csv")))
    for name in NAMES:
        np.testing.assert_array_equal(getattr(again, name), getattr(splits, name))
    header, first = (tmp_path / "split.csv").read_text().splitlines()[:2]
    assert header == "path,sha256,label,group,split"
    assert first.split(",")[:4] == [dataset.ids[0], dataset.hashes[0], "a", "p0"]
    changed = dataclasses.replace(dataset, hashes=("e" * 64, *dataset.hashes[1:]))
    with pytest.raises(ValueError, match=r"split\.csv: 'a/0\.png' is .*; expected eeee"):
        split_dataset(changed, DataConfig(manifest=str(tmp_path / "split.csv")))


def test_a_run_keeps_its_split_when_a_list_it_was_made_with_changes(tmp_path):
    near = tmp_path / "near.csv"
    near.write_text("path,group\nBLA/00000,1\nNGS/00003,1\n")
    data = DataConfig(image_size=16, synthetic_per_class=30, cache_dir=str(tmp_path / "cache"), duplicates=str(near))
    (tmp_path / "run").mkdir()
    dataset, first = load_data(tmp_path / "run", Config(data=data))
    record_split(tmp_path / "run", dataset, first)
    side = {dataset.ids[i]: name for name in NAMES for i in getattr(first, name)}
    assert side["BLA/00000"] == side["NGS/00003"]
    # Near duplicates of each side: the rule would now move some.
    near.write_text("path,group\n" + "".join(f"{dataset.ids[getattr(first, name)[0]]},1\n" for name in NAMES))
    _, again = load_data(tmp_path / "run", Config(data=data))
    assert (split_dataset(dataset, data).test.tolist(), again.test.tolist()) != (first.test.tolist(),) * 2
    for name in NAMES:
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))


def test_settings_of_before_and_wrong_ones():
    old = json.loads(to_json(Config()))
    for name in ("split_by", "block_size", "stratify", "folds", "fold", "duplicates", "manifest"):
        del old["data"][name]
    assert from_json(json.dumps(old)) == Config()
    for wrong in ({"folds": 1}, {"folds": 5, "fold": 5}, {"fold": 1}, {"block_size": 0}):
        with pytest.raises(ValueError, match=r"config field 'data\.(folds|fold|block_size)' is \d"):
            DataConfig(**wrong)
    old["data"]["split_by"] = "patient"
    with pytest.raises(ValueError, match=r"'data\.split_by' is 'patient'; expected one of 'image', 'group', 'block'"):
        from_json(json.dumps(old))


def test_manifests_of_before_groups_were_kept_are_read(tmp_path):
    dataset = numbered(50)
    lines = [
        f"{p},{h},{dataset.classes[k]},{NAMES[i % 3]}"
        for i, (p, h, k) in enumerate(zip(dataset.ids, dataset.hashes, dataset.labels, strict=True))
    ]
    (tmp_path / "split.csv").write_text("\n".join(["path,sha256,label,split", *lines]))
    assert read_split(tmp_path / "split.csv", dataset).val.tolist() == list(range(1, 50, 3))


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


@pytest.mark.parametrize("shares", [(0.9, 0.1, 0.0), (1.0, 0.0, 0.0), (0.8, 0.0, 0.2)])
@pytest.mark.parametrize("stratify", [False, True])
def test_shares_of_zero_get_no_image(shares, stratify):
    config, dataset = DataConfig(split=shares, stratify=stratify), numbered(280, 7)
    splits = split_dataset(dataset, config)
    counts = [len(splits.train), len(splits.val), len(splits.test)]
    assert sum(counts) == len(dataset)
    for count, share in zip(counts, shares, strict=True):
        assert (count > 0) == (share > 0)
    if not stratify:
        rest = (1 - shares[0]) / 2
        usual = [side_of(digest, 0, (shares[0], rest, rest)) == 0 for digest in dataset.hashes]
        np.testing.assert_array_equal(splits.train, np.flatnonzero(usual), "the side is drawn as ever")
    with pytest.raises(ValueError, match=r"data\.split"):
        DataConfig(split=(0.0, 0.5, 0.5))
