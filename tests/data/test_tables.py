"""Tables of images and what other libraries left on disk: read with split and group, errors that name the row."""

import csv
import io
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


def test_an_unreadable_image_keeps_its_neighbours_rows(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    (folder / "a/2.png").write_bytes(b"junk")
    table = write(folder / "cells.csv", ROWS)
    config = DataConfig(source="table", root=str(table), image_size=16, cache_dir=str(tmp_path / "cache"))
    dataset = load_dataset(config, progress=False)
    kept = [row for row in ROWS if row[0] != "a/2.png"]
    assert [dataset.ids, dataset.groups, dataset.sides] == [
        tuple(column) for column in (list(zip(*kept, strict=True))[i] for i in (0, 2, 3))
    ]
    assert dataset.skipped == (("a/2.png", "not an image of a known kind"),)
    assert "2 classes; 12 files seen, 11 used; passed over: 1 images that can't be read" in caplog.text


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
    for root in ("", str(folder)):
        with pytest.raises(FileNotFoundError, match=r"'data\.root' is '.*'; expected a \.csv or \.parquet file"):
            list_table(root)
    (folder / "t.csv").write_text(f"path,label,{'x' * 200_000}\n")
    with pytest.raises(ValueError, match=r"t\.csv: line 1: field larger than .*; expected CSV"):
        list_table(folder / "t.csv")
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


def test_labels_and_groups_of_hugging_face_are_those_of_tables(folder, tmp_path):
    datasets = pytest.importorskip("datasets")

    def saved(name, labels, groups):
        images = [str(folder / row[0]) for row in ROWS[: len(labels)]]
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.Value("float64" if isinstance(labels[0], float) else "string"),
                "group": datasets.Value("int64"),
            }
        )
        whole = datasets.Dataset.from_dict({"image": images, "label": labels, "group": groups}, features=features)
        whole.save_to_disk(str(tmp_path / name))
        return DataConfig(source="huggingface", root=str(tmp_path / name))

    listing = list_source(saved("a", [2.0, 10.0, 1.0, 10.0], [0, 1, None, 0]))
    assert (listing.classes, listing.labels.tolist()) == (("1", "2", "10"), [1, 2, 0, 2])
    assert listing.groups == ("0", "1", "", "0")
    for name, labels in (("b", [1.0, 2.0, float("nan")]), ("c", ["x", "y", "NA"])):
        with pytest.raises(ValueError, match=r"000002/2\.png has label None; expected one of the classes"):
            list_source(saved(name, labels, [1, 1, 1]))


def test_a_folder_that_hugging_face_did_not_write_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder made by save_to_disk"):
        list_source(DataConfig(source="huggingface", root=str(tmp_path)))


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library datasets; .*pip install 'bmjax\[huggingface\]'"):
        list_source(DataConfig(source="huggingface", root=str(tmp_path)))


def test_labels_that_are_missing_are_refused_by_row_and_column(folder):
    spellings = ("nan", "NaN", "NA", "N/A", "n.a.", "null", "NULL", "<NA>", "<null>", "None", "NaT", "#DIV/0!", "-nan")
    for label in (*spellings, "?", ".", "\\N", "inf", "-inf"):
        rows = [(path, label if path == "b/1.png" else name) for path, name, *_ in ROWS]
        said = rf"row 8, column label: {re.escape(repr(label))} is how .* missing.*'class {re.escape(label)}'"
        with pytest.raises(ValueError, match=said):
            list_table(write(folder / "t.csv", rows, ("path", "label")))
    for values in (
        [0.0] * 6 + [float("nan")] * 6,
        [0.0] * 6 + [float("-inf")] * 6,
        ["BLA"] * 6 + [None] * 6,
        [0] * 6 + [None] * 6,
    ):
        table = pa.table({"path": [row[0] for row in ROWS], "label": values})
        pa.parquet.write_table(table, folder / "t.parquet")
        with pytest.raises(ValueError, match=r"row 7 has path 'b/0\.png' and label ''; expected both"):
            list_table(folder / "t.parquet")
    rows = [(path, "none" if name == "BLA" else "Nana", "NA", "NaN") for path, name, *_ in ROWS]
    listing = list_table(write(folder / "t.csv", rows))
    assert (listing.classes, listing.groups, listing.sides) == (("Nana", "none"), (), ()), "missing is no group or side"


@pytest.mark.parametrize("header", ["path,label,label", "path,label,Label ", " PATH,label,path"])
def test_two_columns_of_one_name_are_refused(folder, header):
    (folder / "t.csv").write_text(f"{header}\na/0.png,BLA,NGS\nb/0.png,NGS,BLA\n")
    with pytest.raises(ValueError, match=r"columns \d \(.*\) and 3 \(.*\) are both called (label|path); expected one"):
        list_table(folder / "t.csv")
    (folder / "t.csv").write_text("Path , LABEL,other,other\na/0.png,BLA,1,2\nb/0.png,NGS,1,2\n")
    assert list_table(folder / "t.csv").classes == ("BLA", "NGS")


@pytest.mark.parametrize("other", ["./a/0.png", "a//0.png", "a/./0.png", "a/../a/0.png", "a\\0.png", ".\\a\\0.png"])
@pytest.mark.parametrize("label", ["BLA", "NGS"])
def test_one_file_under_two_spellings_is_refused_by_rows(folder, other, label):
    rows = [*(row[:2] for row in ROWS), (other, label)]
    with pytest.raises(ValueError, match=rf"'a/0\.png' stands in 2 rows; .*row 1 says .* 'BLA', row 13 .* '{label}'"):
        list_table(write(folder / "t.csv", rows, ("path", "label")))
    rows[-1] = (str(folder / "a/0.png"), label)
    with pytest.raises(ValueError, match=r"stands in 2 rows"):
        list_table(write(folder / "t.csv", rows, ("path", "label")))


def test_labels_that_are_numbers_are_sorted_as_numbers(folder):
    paths = [row[0] for row in ROWS]
    for values in ([1.0, 2.0, 10.0] * 4, [1, 2, 10] * 4, ["1.0", "2.0", "10."] * 4, ["2", "1", "10"] * 4):
        write(folder / "t.csv", list(zip(paths, values, strict=True)), ("path", "label"))
        pa.parquet.write_table(pa.table({"path": paths, "label": values}), folder / "t.parquet")
        for suffix in ("csv", "parquet"):
            listing = list_table(folder / f"t.{suffix}")
            assert listing.classes == ("1", "2", "10")
            assert [listing.classes[i] for i in listing.labels] == [str(v).split(".")[0] for v in values]
    for values, classes in (
        ([-1, 0, 3] * 4, ("-1", "0", "3")),
        ([0.5, 1.5, 10.5] * 4, ("0.5", "1.5", "10.5")),
        ([True, False] * 6, ("False", "True")),
        (["TRUE", "false"] * 6, ("False", "True")),
        (["1.0", "x"] * 6, ("1.0", "x")),
        (["1e0", "2E+00", "1e1"] * 4, ("1", "2", "10")),
        (["1,0", "2,0", "10,0"] * 4, ("1", "2", "10")),
        (["1e-2", "2.5e0"] * 6, ("1e-2", "2.5e0")),
        (["1,000", "10,000"] * 6, ("1,000", "10,000")),  # thousands, or a decimal comma
    ):
        assert list_table(write(folder / "t.csv", list(zip(paths, values)), ("path", "label"))).classes == classes  # noqa: B905


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("before", ["", "# made by hand, in May\n#; more\n\n", "sep={}\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_as_people_write_them(folder, encoding, separator, before, end):
    lines = [["", "path", "label", "note"], *([str(i), row[0], row[1], "é, x"] for i, row in enumerate(ROWS))]
    quoted = [[f'"{v}"' if separator in v else v for v in line] for line in lines]
    text = before.format(separator) + "".join(separator.join(line) + "\n" for line in quoted)
    (folder / "t.csv").write_bytes(text.replace("\n", end).encode(encoding))
    listing = list_table(folder / "t.csv")
    assert listing.ids == tuple(row[0] for row in ROWS)
    assert listing.classes == ("BLA", "NGS")


def test_rows_of_separators_and_decimal_commas_are_excels(folder):
    (folder / "t.csv").write_text("path;label;pixel_size\na/0.png;x;0,1\n;;\nb/0.png;y;0,25\n;;\n;;\n")
    listing = list_table(folder / "t.csv")
    assert (listing.ids, listing.pixel_sizes) == (("a/0.png", "b/0.png"), (0.1, 0.25))


def test_numbers_of_single_precision_are_shown_as_they_were_written(folder):
    labels = pa.array([0.1, 0.2, 2.5] * 4, pa.float32())
    pa.parquet.write_table(pa.table({"path": [row[0] for row in ROWS], "label": labels}), folder / "t.parquet")
    assert list_table(folder / "t.parquet").classes == ("0.1", "0.2", "2.5")


def test_accents_in_the_other_form_are_read_where_only_that_is_there(folder):
    save(folder / "a/e\u0301.png", 7)
    listing = list_table(write(folder / "t.csv", [("a\\\u00e9.png", "x"), ("b/0.png", "y")], ("path", "label")))
    assert listing.ids == ("a/e\u0301.png", "b/0.png")


def test_windows_paths_are_read_where_the_file_is_there(folder):
    listing = list_table(
        write(folder / "t.csv", [(row[0].replace("/", "\\"), row[1]) for row in ROWS], ("path", "label"))
    )
    assert listing.ids == tuple(row[0] for row in ROWS)
    save(folder / "a\\0.png", 99)
    listing = list_table(write(folder / "t.csv", [("a\\0.png", "x"), ("b\\0.png", "y")], ("path", "label")))
    assert listing.ids == ("a\\0.png", "b/0.png"), "a name may hold a backslash"
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are not there, the first 'C:.*' in row 2"):
        list_table(write(folder / "t.csv", [("a/0.png", "x"), ("C:\\b\\0.png", "y")], ("path", "label")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"path,label\na/0.png,BLA\n\nb/0.png\n", r"row 2 has 1 values; expected 2"),
        (b"path;label\na/0.png;BLA;7\n", r"row 1 has 3 values; expected 2"),
        (b'path,label\na/0.png,"BLA\nb/0.png,NGS\n', r"line 3: unexpected end of data; expected CSV"),
        ("path,label\n".encode("utf-16-le"), r"holds bytes of value 0; expected text in UTF-8"),
        ("path,label\n".encode("utf-16") + b"x", r"begins as UTF-16 does, but isn't"),
        (b"file;label\n", r"no column path among file, label"),
        (b"# nothing\n", r"no column path, label among none"),
    ],
)
def test_rows_and_texts_that_are_none_are_named(folder, data, message):
    (folder / "t.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list_table(folder / "t.csv")


def test_columns_of_parquet_are_held_to_one_value_a_row(folder):
    paths = [row[0] for row in ROWS]
    pa.parquet.write_table(pa.table({"path": paths, "label": [["x"], ["y"]] * 6}), folder / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet: column 'label' holds list<.*>; expected one text or number"):
        list_table(folder / "t.parquet")
    twice = pa.table([pa.array(paths), pa.array(paths), pa.array(paths)], names=["path", "label", "label"])
    pa.parquet.write_table(twice, folder / "t.parquet")
    with pytest.raises(ValueError, match=r"columns 2 \('label'\) and 3 \('label'\) are both called label"):
        list_table(folder / "t.parquet")
    labels = pa.array(["x", "y"] * 6).dictionary_encode()
    pa.parquet.write_table(pa.table({"path": paths, "label": labels}), folder / "t.parquet")
    assert list_table(folder / "t.parquet").classes == ("x", "y")


def test_labels_that_look_alike_are_said(folder, tmp_path, caplog):
    table = write(folder / "t.csv", [("a/0.png", "BLA"), ("a/1.png", "bla"), ("b/0.png", "NGS")], ("path", "label"))
    config = DataConfig(source="table", root=str(table), image_size=16, cache_dir=str(tmp_path / "cache"))
    load_dataset(config, progress=False)
    assert "labels 'BLA' and 'bla' are taken for two classes" in caplog.text
    table = write(folder / "t.csv", [("a/0.png", "1.5"), ("a/1.png", "1.50"), ("b/0.png", "2.5")], ("path", "label"))
    load_dataset(config, progress=False)
    assert "labels '1.5' and '1.50' are taken for two classes" in caplog.text


_WORD = st.text(st.characters(codec="utf-8", exclude_characters="\0/\\", exclude_categories=["Cc", "Zs", "Zl", "Zp"]))
# How the labels are written -> (a label, its class, what classes are sorted by).
_LABELS = {
    "words": (_WORD.map(lambda s: f"c{s}").filter(lambda s: s == s.strip()), str, str),
    "integers": (st.integers(-99, 10**12).map(str), str, int),
    "floats": (st.integers(0, 999).map(lambda i: f"{i}.0"), lambda s: s[:-2], int),
    "decimals": (st.integers(0, 999).map(lambda i: f"{i}.25"), str, float),
    "booleans": (st.sampled_from(["true", "FALSE", "False", "TRUE"]), str.capitalize, str),
}


@given(st.data())
def test_any_table_is_read_right_or_refused(data):
    """Rows as drawn come back in any separator, encoding and order of columns; a spoiled one is refused by its row."""
    label, class_of, key = data.draw(st.sampled_from(list(_LABELS.values())))
    with tempfile.TemporaryDirectory() as name:
        n = data.draw(st.integers(2, 6))
        names = data.draw(st.lists(label, min_size=n, max_size=n).filter(lambda s: len(set(map(class_of, s))) > 1))
        paths = [f"{i}.png" for i in range(n)]
        for path in paths:
            Path(name, path).touch()
        header = data.draw(st.permutations(["path", "Label ", "", "note"]))
        cells = {
            "path": paths,
            "Label ": names,
            "": list(map(str, range(n))),
            "note": data.draw(st.lists(_WORD, min_size=n, max_size=n)),
        }
        rows = [[cells[column][i] for column in header] for i in range(n)]
        spoiled = data.draw(st.none() | st.integers(0, n - 1))
        how = data.draw(st.sampled_from(["short", "long", "missing", "absent", "again"]))
        if spoiled is not None:
            rows[spoiled], message = spoil(rows[spoiled], header, how, rows[spoiled - 1], spoiled + 1)
        text = io.StringIO(newline="")
        text.write(data.draw(st.sampled_from(["", "# one, two;three\n", "\n\n#\n"])))
        ends = data.draw(st.sampled_from(["\n", "\r\n"]))
        csv.writer(text, delimiter=data.draw(st.sampled_from(",;\t|")), lineterminator=ends).writerows([header, *rows])
        table = Path(name, "t.csv")
        table.write_bytes(
            text.getvalue().encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])))
        )
        if spoiled is not None:
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                list_table(table)
            return
        listing = list_table(table)
        assert listing.ids == tuple(paths)
        assert [listing.classes[i] for i in listing.labels] == list(map(class_of, names))
        assert listing.classes == tuple(sorted(set(map(class_of, names)), key=key))


def spoil(row, header, how, other, number):
    """A row that is wrong in one way, and what its error says."""
    path, label = header.index("path"), header.index("Label ")
    if how == "short":
        return row[:-1], rf"row {number} has 3 values; expected 4"
    if how == "long":
        return [*row, "more"], rf"row {number} has 5 values; expected 4"
    if how == "missing":
        return [("NaN" if i == label else v) for i, v in enumerate(row)], rf"row {number}, column label: 'NaN'"
    if how == "absent":
        return [("no.png" if i == path else v) for i, v in enumerate(row)], rf"the first 'no.png' in row {number}"
    return [(f"./{other[i]}" if i == path else v) for i, v in enumerate(row)], "stands in 2 rows"
