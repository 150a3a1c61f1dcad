"""Tables of images and what other libraries left on disk: read with split and group, errors that name the row."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from bmjax.config import DataConfig
from bmjax.data.images.decode import decode_image
from bmjax.data.load import list_source, load_dataset
from bmjax.data.sources.table import list_table
from bmjax.data.splits import split_dataset

ROWS = [
    (f"{'ab'[k]}/{i}.png", ("BLA", "NGS")[k], f"p{i}", ("train", "val", "test")[i % 3])
    for k in (0, 1)
    for i in range(6)
]


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for i, (path, *_) in enumerate(ROWS):
        save(tmp_path / "cells" / path, i)
    return tmp_path / "cells"


def write(path, rows, header=("path", "label", "group", "split")):
    if path.suffix == ".parquet":
        columns = [list(column) for column in zip(*rows, strict=True)]
        pa.parquet.write_table(pa.table(columns, names=list(header)), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as f:
            csv.writer(f).writerows([header, *rows])
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_gives_images_labels_groups_and_the_split(folder, tmp_path, suffix):
    table = write(folder / f"cells.{suffix}", ROWS)
    config = DataConfig(source="table", root=str(table), image_size=16, cache_dir=str(tmp_path / "cache"))
    dataset = load_dataset(config, progress=False)
    assert dataset.classes == ("BLA", "NGS")
    assert dataset.ids == tuple(row[0] for row in ROWS)
    assert dataset.labels.tolist() == [0] * 6 + [1] * 6
    assert dataset.groups == tuple(row[2] for row in ROWS)
    np.testing.assert_array_equal(dataset.images[8], decode_image(folder / "b/2.png", 16))
    splits = split_dataset(dataset, config)
    for name in ("train", "val", "test"):
        assert [ROWS[i][3] for i in getattr(splits, name)] == [name] * 4


def test_numbers_are_labels_too_and_columns_may_lack(folder):
    numbered = [(path, int(label == "NGS")) for path, label, *_ in ROWS]
    for suffix in ("csv", "parquet"):
        listing = list_table(write(folder / f"t.{suffix}", numbered, ("path", "label")))
        assert listing.classes == ("0", "1")
        assert listing.groups == listing.sides == ()
    (folder / "t.csv").write_text("path, label\na/0.png, BLA\n\nb/0.png,NGS \n")
    assert list_table(folder / "t.csv").classes == ("BLA", "NGS")
    spelled = [
        (path, label, side) for (path, label, *_), side in zip(ROWS, ["validation", "", *["test"] * 10], strict=True)
    ]
    assert list_table(write(folder / "t.csv", spelled, ("path", "label", "split"))).sides[:3] == ("val", "", "test")


def test_an_unreadable_image_keeps_its_neighbours_rows(folder, tmp_path):
    (folder / "a/2.png").write_bytes(b"junk")
    table = write(folder / "cells.csv", ROWS)
    config = DataConfig(source="table", root=str(table), image_size=16, cache_dir=str(tmp_path / "cache"))
    dataset = load_dataset(config, progress=False)
    kept = [row for row in ROWS if row[0] != "a/2.png"]
    assert [dataset.ids, dataset.groups, dataset.sides] == [
        tuple(column) for column in (list(zip(*kept, strict=True))[i] for i in (0, 2, 3))
    ]
    assert dataset.skipped == (("a/2.png", "not an image of a known kind"),)


def test_the_order_of_the_rows_is_the_images(folder, tmp_path):
    """Two tables of the same rows share a cache's folder, but not its rows."""
    for rows in (ROWS, ROWS[::-1], [*ROWS[6:], *ROWS[:6]]):
        table = write(folder / "cells.csv", rows)
        config = DataConfig(source="table", root=str(table), image_size=16, cache_dir=str(tmp_path / "cache"))
        dataset = load_dataset(config, progress=False)
        assert dataset.ids == tuple(row[0] for row in rows)
        for name, image in zip(dataset.ids, dataset.images, strict=True):
            np.testing.assert_array_equal(image, decode_image(folder / name, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows[:3], ("", "BLA", "", "")], r"row 4 has path '' and label 'BLA'; expected both"),
        (lambda rows: [("a/0.png", "", "", ""), *rows[1:]], r"row 1 has path 'a/0.png' and label ''; expected both"),
        (lambda rows: [*rows, ("a/0.png", "NGS", "", "")], r"'a/0.png' stands in 2 rows; expected one row an image"),
        (lambda rows: rows[:6], r"labels found: BLA; expected at least two"),
        (lambda rows: [("a/0.png", "BLA", "", "tset"), *rows[1:]], r"row 1 has split 'tset'; expected one of train"),
        (lambda rows: [*rows, ("a/9.png", "NGS", "", "")], r"1 of 13 images are not there, the first 'a/9.png'"),
        (lambda rows: [], r"labels found: none"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(folder, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list_table(write(folder / "t.csv", change(ROWS)))


def test_what_is_no_table_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file; expected a \.csv or \.parquet"):
        list_table(folder / "no.csv")
    with pytest.raises(ValueError, match=r"t\.csv: no column path, label among file, class"):
        list_table(write(folder / "t.csv", [("a", "b")], ("file", "class")))
    (folder / "t.csv").write_text("")
    with pytest.raises(ValueError, match=r"t\.csv: no column path, label among none"):
        list_table(folder / "t.csv")
    (folder / "t.csv").write_text("path,label\na/0.png,BLA\na/1.png\n")
    with pytest.raises(ValueError, match=r"t\.csv: row 2 has 1 values; expected 2"):
        list_table(folder / "t.csv")
    (folder / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"t\.xlsx: expected a name ending in \.csv or \.parquet"):
        list_table(folder / "t.xlsx")
    (folder / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"t\.parquet: "):
        list_table(folder / "t.parquet")


@pytest.mark.parametrize("several", [False, True])
def test_hugging_face_datasets_on_disk(folder, tmp_path, several):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["BLA", "NGS"]),
            "group": datasets.Value("string"),
        }
    )

    def part(rows):
        data = {
            "image": [{"bytes": (folder / path).read_bytes(), "path": path} for path, *_ in rows],
            "label": [label for _, label, *_ in rows],
            "group": [group for _, _, group, _ in rows],
        }
        return datasets.Dataset.from_dict(data, features=features)

    names = {"train": "train", "validation": "val", "test": "test"}
    whole = {name: part([row for row in ROWS if row[3] == side]) for name, side in names.items()}
    saved = datasets.DatasetDict(whole) if several else part(ROWS)
    saved.save_to_disk(str(tmp_path / "saved"))
    listing = list_source(DataConfig(source="huggingface", root=str(tmp_path / "saved")))
    assert listing.classes == ("BLA", "NGS")
    rows = sorted(ROWS, key=lambda row: ("train", "val", "test").index(row[3])) if several else ROWS
    assert [listing.read(i) for i in range(12)] == [(folder / path).read_bytes() for path, *_ in rows]
    assert listing.groups == tuple(row[2] for row in rows)
    assert listing.sides == (tuple(row[3] for row in rows) if several else ())
    assert listing.ids[1] == ("train/000001/3.png" if several else "000001/1.png")
    assert listing.labels.tolist() == [int(row[1] == "NGS") for row in rows]


def test_what_hugging_face_datasets_lack_is_named(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = {"image": [str(folder / "a/0.png"), None, str(folder / "b/0.png")], "label": ["x", "x", "y"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    whole = datasets.Dataset.from_dict(data, features=features)
    whole.save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(source="huggingface", root=str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))
    dataset = load_dataset(config, progress=False)
    assert dataset.classes == ("x", "y")
    assert dataset.ids == ("000000/0.png", "000002/0.png")
    assert dataset.skipped == (("000001", "the row has no image"),)
    whole.rename_column("label", "target").save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no column label among image, target"):
        list_source(DataConfig(source="huggingface", root=str(tmp_path / "other")))
    unlabelled = datasets.Dataset.from_dict({**data, "label": ["x", None, "y"]}, features=features)
    unlabelled.save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(ValueError, match="000001 has label None; expected one of the classes"):
        list_source(DataConfig(source="huggingface", root=str(tmp_path / "unlabelled")))
    parts = {"train": whole, "holdout": whole}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(ValueError, match="splits holdout; expected train, val"):
        list_source(DataConfig(source="huggingface", root=str(tmp_path / "odd")))


def test_a_folder_that_hugging_face_did_not_write_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder made by save_to_disk"):
        list_source(DataConfig(source="huggingface", root=str(tmp_path)))


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library datasets; .*pip install 'bmjax\[huggingface\]'"):
        list_source(DataConfig(source="huggingface", root=str(tmp_path)))
