"""Every reader of files gives the right result or one clear error over damaged bytes: no foreign exception, no hang.

BMJAX_MUTATIONS raises the number of mutations of each reader, 30 in the suite; of those that start a process a file a
tenth of many are made. `python tools/torture.py inputs --times 20000` runs them all.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import resource
import shutil
import tarfile
import time
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from bmjax.analysis.evaluate.calibration import Calibration, read_calibration, write_calibration
from bmjax.analysis.evaluate.reference import Reference, read_reference, write_reference
from bmjax.config.experiment import load_experiment
from bmjax.data.dataset import Dataset
from bmjax.data.images import cache
from bmjax.data.images.decode import decode_files
from bmjax.data.sources.archive import list_archive
from bmjax.data.sources.table import list_table
from bmjax.data.splits import Splits, read_split, write_split
from bmjax.files import mapped, read_json, seal, sealed_json
from bmjax.runs.records import read_predictions, read_records
from bmjax.runs.tracking import JsonlTracker
from bmjax.weights import keras_files, safetensors_files, torch_files
from tests.helpers import torch_saved

CASES = pathlib.Path(__file__).parent / "fixtures/readers"
IMAGE_KINDS = ("png", "jpeg", "tiff", "bmp", "gif", "webp")
MUTATIONS = int(os.environ.get("BMJAX_MUTATIONS", "30"))
SECONDS = 5
EXPECTED = (ValueError, OSError)


def cpu_seconds():
    """Of this process and those it has waited for: what other work on the machine does not change."""
    return sum(os.times()[:4])


@pytest.mark.parametrize("name", ["hang.h5", "shape-bomb.h5", "zlib-error.keras"])
def test_keras_files_that_hung_or_took_the_memory(name):
    start, before = cpu_seconds(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"{name}: not a readable Keras weight file, or truncated: .+"):
        keras_files.read(CASES / name)
    assert cpu_seconds() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def test_a_shape_beyond_the_file_is_named():
    with pytest.raises(ValueError, match=r"would take 3000000000 bytes or more, by .* in a file of 7856 bytes"):
        keras_files.read(CASES / "shape-bomb.h5")


def test_attributes_whose_values_lie_wherever_they_say_are_refused(tmp_path):
    """HDF5 follows such addresses out of the file, and dies, when a bit of them is damaged."""
    path = tmp_path / "lists.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"conv"]
        group = file.create_group("conv")
        lists = np.empty(1, object)
        lists[0] = np.arange(3, dtype=np.int32)
        group.attrs.create("weight_names", lists, dtype=h5py.vlen_dtype(np.int32))
    with pytest.raises(
        ValueError, match=r"lists\.h5.*attribute 'weight_names' of '/conv' is neither text nor a number"
    ):
        keras_files.read(path)


def test_an_archive_whose_lzma_is_damaged_names_the_member():
    listing = list_archive(CASES / "lzma-error.zip")
    damaged = []
    for i, name in enumerate(listing.ids):
        try:
            listing.read(i)
        except ValueError as e:
            damaged.append(name)
            assert name in str(e)  # noqa: PT017
    assert damaged


def test_damaged_headers_of_the_cache_are_made_anew(tmp_path, caplog):
    shutil.copy(CASES / "token-error.npy", tmp_path / "images.npy")
    (tmp_path / "skipped.json").write_text(sealed_json([]))
    assert cache._read(tmp_path, 2, 8) is None
    (tmp_path / "skipped.json").write_text((CASES / "overflow-skipped.json").read_text())
    assert cache._read(tmp_path, 2, 8) is None
    assert caplog.text.count("rebuilt") == 2


@pytest.mark.parametrize("number", range(1, 12))
def test_damaged_predictions_name_the_file_and_the_remedy(tmp_path, number):
    shutil.copy(CASES / f"predictions-{number}.npz", tmp_path / "predictions_val.npz")
    with pytest.raises(ValueError, match=r"predictions_val\.npz.*`bmjax eval RUN --split val` writes it again"):
        read_predictions(tmp_path, "val")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda g: g.create_dataset("k", (4,), "f4", external=[("/etc/passwd", 0, 16)]),
            "takes its values from another file, .*passwd",
        ),
        (
            lambda g: g.__setitem__("k", h5py.ExternalLink("/etc/passwd", "/x")),
            "/k is a ExternalLink",
        ),
        (lambda g: g.__setitem__("k", h5py.SoftLink("/other")), "/k is a SoftLink"),
        (lambda g: g.__setitem__("k", np.zeros(3, [("a", "i4")])), "expected numbers"),
        (lambda g: g.create_virtual_dataset("k", h5py.VirtualLayout((4,), "f4")), "virtual data set"),
    ],
)
def test_hdf5_files_that_reach_beyond_themselves(tmp_path, make, message):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = ["a"]
        group = file.create_group("a")
        group.attrs["weight_names"] = ["k"]
        make(group)
    with pytest.raises(ValueError, match=message):
        keras_files.read(tmp_path / "w.h5")


def test_groups_in_a_circle_end(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = []
        file.create_group("a")["again"] = file["/"]
    assert keras_files.read(tmp_path / "w.h5") == []


def test_a_header_longer_than_its_file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"w\.safetensors: a header of 4611686018427387904 bytes in a file of 10"):
        safetensors_files.read(path)


def test_predictions_that_unpack_to_gigabytes(tmp_path):
    path = tmp_path / "predictions_val.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("probs", "labels", "index", "ids", "classes"):
            archive.writestr(f"{name}.npy", bytes(40_000_000))
    with pytest.raises(ValueError, match="unpacks to 200000000 bytes; expected at most"):
        read_predictions(tmp_path, "val")


def test_a_damaged_line_of_the_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n{"kind": \xff\n{"kind"')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 2"):
        read_records(tmp_path, "train")


# One small valid file a reader, and what is read of it.


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


MEMBERS = {f"r/{name}/{i}.png": png(i) for name in "AB" for i in range(2)}


def write_zip(path, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, data)


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        for name, data in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read_archive(path):
    listing = list_archive(path)
    return [listing.read(i) for i in range(len(listing))]


def write_h5(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["conv", "bn"]
        for layer, kinds in (("conv", ("kernel", "bias")), ("bn", ("gamma", "beta"))):
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{kind}" for kind in kinds]
            for kind in kinds:
                group[f"{layer}/{kind}"] = np.ones((3, 3, 3, 4) if kind == "kernel" else 4, np.float32)


def write_weights_h5(path):
    with h5py.File(path, "w") as file:
        for place, shapes in (("conv2d", [(3, 3, 3, 4), (4,)]), ("dense", [(4, 2), (2,)])):
            variables = file.create_group(f"layers/functional/layers/{place}/vars")
            variables.attrs["name"] = f"{place}_own"
            for i, shape in enumerate(shapes):
                variables[str(i)] = np.ones(shape, np.float32)


def write_keras(path):
    content = path.with_suffix(".inner")
    write_weights_h5(content)
    layers = [{"class_name": "Functional", "config": {"name": "base", "layers": []}}]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps({"config": {"layers": layers}}))
        archive.write(content, "model.weights.h5")


def write_safetensors(path):
    from bmjax.weights import catalog

    variables = {"params": {"a": {"kernel": np.ones((2, 3), np.float32)}}, "batch_stats": {}}
    checksum = safetensors_files.leaves_checksum(variables)
    safetensors_files.write(path, variables, dataclasses.replace(catalog.RECORDS[0], checksum=checksum))


def read_safetensors(path):
    tensors, record = safetensors_files.read(path)
    if record is None:
        raise ValueError("another metadata key: not a ported file")
    return safetensors_files.to_variables(path, tensors, record), record


def write_predictions(path):
    np.savez_compressed(
        path.with_name("predictions_val.npz"),
        probs=np.full((3, 2), 0.5, np.float32),
        labels=np.arange(3, dtype=np.int32) % 2,
        index=np.arange(3),
        ids=np.array(["a", "b", "c"]),
        classes=np.array(["x", "y"]),
    )


def write_looks(path):
    write_reference(path.parent, Reference.of_looks(np.ones((3, 6), np.float32)))


def write_config(path):
    from bmjax.config import Config, to_json

    path.write_text(to_json(Config()))


def write_image(path, kind):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(path, kind)


def read_image(path):
    (found,) = decode_files([path], 8)
    return found


def write_table(path):
    for i in range(4):
        path.with_name(f"{i}.png").write_bytes(png(i))
    rows = {"path": [f"{i}.png" for i in range(4)], "label": ["A", "B", "A", "B"]}
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    else:
        path.write_text("\n".join(map(",".join, zip(*([k, *v] for k, v in rows.items()), strict=True))) + "\n")


def read_table(path):
    listing = list_table(path)
    return listing.ids, listing.labels, [listing.read(i) for i in range(len(listing))]


IMAGES = Dataset.from_arrays(np.zeros((12, 4, 4, 3), np.uint8), ["A", "B"] * 6)


def write_manifest(path):
    write_split(path, IMAGES, Splits(np.arange(8), np.arange(8, 10), np.arange(10, 12)))


def write_cache(path):
    np.save(path, np.ones((3, 4, 4, 3), np.uint8))
    seal(path)
    path.with_name("skipped.json").write_text(sealed_json([[1, "empty"]]))


def read_cache(path):
    found = cache._read(path.parent, 4, 4)
    if found is None:
        raise ValueError("said, and decoded again")
    return found


def read_tracker(path):
    tracker = JsonlTracker(path)
    tracker.close()
    return tracker.last


# name -> (file, write, read)
READERS = {
    **{kind: (f"w.{kind}", functools.partial(write_image, kind=kind), read_image) for kind in IMAGE_KINDS},
    "csv": ("w.csv", write_table, read_table),
    "parquet": ("w.parquet", write_table, read_table),
    "manifest": ("split.csv", write_manifest, lambda path: read_split(path, IMAGES)),
    "cache": ("images.npy", write_cache, read_cache),
    "skipped": ("skipped.json", lambda path: write_cache(path.with_name("images.npy")), read_cache),
    "tracker": (
        "metrics.jsonl",
        lambda path: path.write_text('{"kind": "train", "step": 1}\n' * 3),
        read_tracker,
    ),
    "zip": ("w.zip", write_zip, read_archive),
    "zip-lzma": ("w.zip", functools.partial(write_zip, packing=zipfile.ZIP_LZMA), read_archive),
    "zip-bzip2": ("w.zip", functools.partial(write_zip, packing=zipfile.ZIP_BZIP2), read_archive),
    "tar": ("w.tar", write_tar, read_archive),
    "h5": ("w.h5", write_h5, keras_files.read),
    "weights.h5": ("w.weights.h5", write_weights_h5, keras_files.read),
    "keras": ("w.keras", write_keras, keras_files.read),
    "safetensors": ("w.safetensors", write_safetensors, read_safetensors),
    "torch": (
        "w.pth",
        lambda path: torch_saved.save(
            path, {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.ones(2)}
        ),
        torch_files.read,
    ),
    "npy": ("w.npy", lambda path: np.save(path, np.ones((3, 4, 4, 3), np.uint8)), mapped),
    "predictions": ("predictions_val.npz", write_predictions, lambda path: read_predictions(path.parent, "val")),
    "metrics": (
        "metrics.jsonl",
        lambda path: path.write_text('{"kind": "train", "step": 1}\n' * 3),
        lambda path: read_records(path.parent, "train"),
    ),
    "config": ("config.json", write_config, lambda path: load_experiment(str(path))),
    "calibration": (
        "calibration.json",
        lambda path: write_calibration(path.parent, Calibration("vector", (0.5, 0.6), (0.0, 0.1), 40, 5)),
        lambda path: read_calibration(path.parent, 2, 5),
    ),
    "reference": ("reference.npz", write_looks, lambda path: read_reference(path.parent)),
    "results": ("results.json", lambda path: path.write_text(json.dumps({"val": {"accuracy": 0.5}})), read_json),
}


# Those whose files hold a checksum of their content, so that a result is the right one.
CHECKED = ("zip", "zip-lzma", "zip-bzip2", "keras", "safetensors", "torch")
CHECKED += ("predictions", "reference", "cache", "skipped")
# These start a process a file, which takes a quarter of a second.
IN_PROCESSES = ("h5", "weights.h5", "keras")


def mutated(data, chance):
    """The bytes with up to four bytes changed, cut off, or with some put between."""
    data = bytearray(data)
    how = chance.randrange(4)
    if how == 0:
        return bytes(data[: chance.randrange(len(data))])
    if how == 1:
        place = chance.randrange(len(data))
        return bytes(data[:place] + chance.randbytes(chance.randint(1, 9)) + data[place:])
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.choice((0, 255, chance.randrange(256)))
    return bytes(data)


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files_are_read_right_or_refused(tmp_path, reader):
    name, write, read = READERS[reader]
    path = tmp_path / name
    write(path)
    right = repr(read(path))
    whole = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(max(MUTATIONS // 10, min(MUTATIONS, 10)) if reader in IN_PROCESSES else MUTATIONS):
        path.unlink(missing_ok=True)  # an archive that is still open keeps its own file
        path.write_bytes(mutated(whole, random.Random(f"{reader} {seed}")))
        start = time.process_time()
        try:
            found = repr(read(path))
            assert reader not in CHECKED or found == right, seed
        except EXPECTED as e:
            assert str(e), seed  # noqa: PT017
        except BaseException as e:
            raise AssertionError(f"{reader}, mutation {seed}: {e!r}") from e
        assert time.process_time() - start < SECONDS, seed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
