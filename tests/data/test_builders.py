"""The TFDS builders, on small copies of what is downloaded: read back without TensorFlow, wrong trees refused."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmjax.cli.main import main
from bmjax.config import DataConfig
from bmjax.data.builders import bloodmnist, bm_cytomorphology
from bmjax.data.images.decode import decode_image
from bmjax.data.load import load_dataset
from bmjax.data.sources.tfds import list_tfds
from bmjax.data.splits import split_dataset


def save(path: Path, seed: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (25, 25, 3), np.uint8)).save(path)


@pytest.fixture(params=["tcia", "kaggle"])
def tree(request, tmp_path):
    """Two images of each class but one, laid out as either publisher does."""
    root = tmp_path / "unpacked" / bm_cytomorphology.FOLDERS[request.param == "kaggle"]
    for k, name in enumerate(bm_cytomorphology.CLASSES):
        # ABE is flat in both.
        folder = root / name / ("0001-1000" if request.param == "tcia" and name != "ABE" else "")
        for i in range(1, 3 + (name == "BLA")):
            save(folder / f"{name}_{i:05d}.jpg", 10 * k + i)
    return root


def build(*words):
    return main(["data", "build", *map(str, words)])


def test_published_counts_add_up():
    assert list(bm_cytomorphology.COUNTS) == list(bm_cytomorphology.CLASSES) == sorted(bm_cytomorphology.CLASSES)
    assert sum(bm_cytomorphology.COUNTS.values()) == 171_374
    assert sum(bloodmnist.COUNTS.values()) == 17_092
    assert len(bloodmnist.CLASSES) == 8


def test_marrow_tree_becomes_array_record(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert build("bm_cytomorphology", "--from", tree.parent, "--out", out, "--partial") == 0
    folder = out / "bm_cytomorphology" / "all_partial" / "1.0.0"
    assert f"{folder}: train 43 images in 21 classes" in capsys.readouterr().out
    listing = list_tfds(folder)
    assert listing.classes == tuple(bm_cytomorphology.CLASSES)
    assert sorted(np.bincount(listing.labels)) == [2] * 20 + [3]
    assert listing.sides == ()  # one split is no split
    for i in (0, 20, 42):
        assert listing.read(i) == (tree / listing.ids[i]).read_bytes()
        assert Path(listing.ids[i]).name.startswith(listing.classes[listing.labels[i]])
    assert "tensorflow" not in sys.modules
    config = DataConfig(source="tfds", root=str(folder), image_size=16, cache_dir=str(tmp_path / "cache"))
    dataset = load_dataset(config, progress=False)
    assert dataset.name == "bm_cytomorphology/all_partial/1.0.0"
    np.testing.assert_array_equal(dataset.images[7], decode_image(tree / dataset.ids[7], 16))
    info = (folder / "dataset_info.json").read_text()
    assert "10.7937/TCIA.AXH3-T579" in info
    assert "CC BY 4.0" in (folder / "LICENSE").read_text()
    assert "abnormal eosinophil" in (folder / "metadata.json").read_text()
    assert build("bm_cytomorphology", "--from", tree, "--out", out, "--partial") == 2
    assert "is built already" in capsys.readouterr().err


def test_classes_are_chosen_and_grouped(tree, tmp_path, capsys):
    words = ("bm_cytomorphology", "--from", tree, "--out", tmp_path, "--partial", "--config")
    assert build(*words, "seven") == 0
    assert list_tfds(tmp_path / "bm_cytomorphology/seven_partial/1.0.0").classes == bm_cytomorphology.SEVEN
    assert build(*words, "mine", "--classes", "NGB=neutrophil", "NGS=neutrophil", "BLA") == 0
    listing = list_tfds(tmp_path / "bm_cytomorphology/mine_partial/1.0.0")
    assert listing.classes == ("BLA", "neutrophil")
    assert np.bincount(listing.labels).tolist() == [3, 4]
    capsys.readouterr()
    for name, given, message in (
        ("all", ("BLA", "EOS"), "expected a name of yours"),
        ("a", ("BLA", "XYZ"), "mapping of XYZ; expected abbreviations among ABE"),
        ("a", ("BLA=x", "EOS=x"), "mapping to x; expected two classes"),
        ("a", ("BLA", "BLA=x"), "'BLA=x'; expected each abbreviation once"),
    ):
        assert build(*words, name, "--classes", *given) == 2
        assert message in capsys.readouterr().err
    assert build(*words, "sevn") == 2
    assert "seven" in capsys.readouterr().err


def test_wrong_trees_are_refused(tree, tmp_path, capsys):
    words = ("bm_cytomorphology", "--out", tmp_path / "out", "--from")
    assert build(*words, tmp_path / "nowhere") == 2
    assert "expected the folder where the collection was unpacked" in capsys.readouterr().err
    assert build(*words, tmp_path) == 2
    assert "expected BM_cytomorphology_data or bone_marrow_cell_dataset there" in capsys.readouterr().err
    assert build(*words, tree) == 2
    assert "ABE 2 (published: 8)" in capsys.readouterr().err
    stray = next(tree.rglob("EOS_00001.jpg"))
    shutil.move(stray, tree / "BLA" / "EOS_00001.jpg")
    assert build(*words, tree, "--partial") == 2
    assert "EOS_00001.jpg: expected a name that begins with its class" in capsys.readouterr().err
    assert not (tmp_path / "out" / "bm_cytomorphology" / "all_partial" / "1.0.0").exists()


@pytest.fixture
def blood(tmp_path, monkeypatch):
    """A small file as MedMNIST's, in place of the download -> (its folder, its arrays)."""
    rng = np.random.default_rng(0)
    counts = {"train": 24, "val": 16, "test": 16}
    arrays = {f"{s}_images": rng.integers(0, 256, (n, 28, 28, 3), np.uint8) for s, n in counts.items()}
    arrays |= {f"{s}_labels": (np.arange(n, dtype=np.uint8) % 8)[:, None] for s, n in counts.items()}
    folder = tmp_path / "downloads"
    folder.mkdir()
    np.savez_compressed(folder / "bloodmnist.npz", **arrays)
    md5 = hashlib.md5((folder / "bloodmnist.npz").read_bytes()).hexdigest()
    config = bloodmnist.BloodmnistConfig(name="px28", description="small", size=28, checksum=f"md5:{md5}")
    monkeypatch.setattr(bloodmnist, "COUNTS", counts)
    monkeypatch.setattr(bloodmnist.Bloodmnist, "BUILDER_CONFIGS", [config])
    monkeypatch.setattr(bloodmnist.Bloodmnist, "builder_configs", {"px28": config})
    return folder, arrays


def test_bloodmnist_keeps_its_pixels_and_its_split(blood, tmp_path):
    folder, arrays = blood
    assert build("bloodmnist", "--out", tmp_path, "--downloads", folder) == 0
    config = DataConfig(source="tfds", root=str(tmp_path / "bloodmnist/px28/1.0.0"), image_size=28, split_seed=5)
    dataset = load_dataset(DataConfig(**{**vars(config), "cache_dir": str(tmp_path / "cache")}), progress=False)
    splits = split_dataset(dataset, config)
    for split in ("train", "val", "test"):
        rows = getattr(splits, split)
        assert len(rows) == len(arrays[f"{split}_images"])
        for row in rows:
            number = int(Path(dataset.ids[row]).stem)
            assert dataset.ids[row].startswith(f"{split}/")
            np.testing.assert_array_equal(dataset.images[row], arrays[f"{split}_images"][number])
            assert dataset.labels[row] == arrays[f"{split}_labels"][number, 0]
    with pytest.raises(ValueError, match=r"comes with a split; expected data.folds to be 0"):
        split_dataset(dataset, DataConfig(folds=5))


def test_another_file_than_bloodmnists_is_refused(blood, tmp_path, capsys):
    folder, arrays = blood
    with open(folder / "bloodmnist.npz", "ab") as f:
        f.write(b"more")
    assert build("bloodmnist", "--out", tmp_path, "--downloads", folder) == 2
    assert "bloodmnist.npz: md5 is" in capsys.readouterr().err
    np.savez(folder / "other.npz", train_images=arrays["train_images"].astype(np.int16))
    with pytest.raises(ValueError, match=r"train_images\.npy is int16 .*; expected uint8 \(24, 28, 28, 3\)"):
        next(bloodmnist.rows_of(folder / "other.npz", "train_images.npy", (24, 28, 28, 3)))


def test_what_is_no_tfds_folder_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"'data.root' is .*; expected the folder that `bmjax data build` names"
    ):
        list_tfds(tmp_path)


DAMAGES = {
    "half an object": lambda info: "{",
    "no object": lambda info: "[]",
    "unknown field": lambda info: json.dumps(info | {"colour": "red"}),
    "bad version": lambda info: json.dumps(info | {"version": "one"}),
}


def test_a_damaged_tfds_folder_is_named(tree, tmp_path):
    out = tmp_path / "out"
    assert build("bm_cytomorphology", "--from", tree.parent, "--out", out, "--partial") == 0
    folder = out / "bm_cytomorphology" / "all_partial" / "1.0.0"
    path, features = folder / "dataset_info.json", folder / "features.json"
    info = json.loads(path.read_text())
    for how, damage in DAMAGES.items():
        path.write_text(damage(info))
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: not a readable data set of TFDS.*: .") as e:
            list_tfds(folder)
        assert "\n" not in str(e.value), how
    path.write_text(json.dumps(info))
    for text in ("{", "[]", "{}"):
        features.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(folder))) as e:
            list_tfds(folder)
        assert "\n" not in str(e.value), text
