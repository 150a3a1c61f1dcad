"""Public functions hold their arguments to their contract: a wrong one is named, with what was expected."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import bmjax
from bmjax.config import DataConfig, ModelConfig
from bmjax.data.images.arrays import check_images
from bmjax.data.load import read_arrays, read_files

SIZE = 32


@pytest.fixture(scope="module")
def run():
    """A classifier that was not trained, as `load_run` would give it."""
    from bmjax.config import Config
    from bmjax.runs.folder import Run

    config = Config(
        data=DataConfig(source="arrays", image_size=SIZE), model=ModelConfig(backbone="densenet_tiny", weights=None)
    )
    model = bmjax.create(config.model, 3)
    return Run("nowhere", config, model, bmjax.init(model, jax.random.key(0), SIZE), ("a", "b", "c"), 0)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_images_of_any_size_are_read_as_files_are(run, tmp_path):
    raw = [pixels(48, 70, 3, seed=i) for i in range(3)]
    for i, image in enumerate(raw):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for stain in ("none", "reinhard"):
        data = dataclasses.replace(run.config.data, stain=stain)
        stained = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
        read = np.stack(list(read_files(files, data)))
        np.testing.assert_array_equal(read_arrays(np.stack(raw), data), read)
        np.testing.assert_array_equal(
            bmjax.predict_probs(stained, np.stack(raw)), bmjax.predict_probs(stained, read), err_msg=stain
        )


def test_images_in_other_forms_give_the_same_probabilities(run):
    images = pixels(4, SIZE, SIZE, 3)
    expected = bmjax.predict_probs(run, images)
    assert (expected.shape, expected.dtype) == ((4, 3), np.float32)
    strided = np.empty((4, SIZE, SIZE, 6), np.uint8)[..., ::2]
    strided[:] = images
    for same in (list(images), tuple(images), strided, np.asfortranarray(images), jax.numpy.asarray(images)):
        np.testing.assert_allclose(bmjax.predict_probs(run, same), expected, atol=1e-6)
    for none in (images[:0], np.zeros((0, 7, 9, 3), np.uint8), []):
        assert bmjax.predict_probs(run, none).shape == (0, 3)


def test_images_that_are_right_are_not_copied(tmp_path):
    images = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(4, SIZE, SIZE, 3))
    assert check_images(images) is images


WRONG_IMAGES = {
    "0..1": (lambda x: x / 255, "expected uint8, 0..255: np.round(255 * images).astype(np.uint8)"),
    "0..255": (lambda x: x.astype(np.float32), "expected uint8, 0..255: np.round(images).astype(np.uint8)"),
    "normalised": (lambda x: x / 127.5 - 1, "give the pixels as they are"),
    "nan": (lambda x: np.where(x > 250, np.nan, x / 255), "not finite"),
    "int64": (lambda x: x.astype(np.int64), "images are int64; expected uint8, 0..255: images.astype(np.uint8)"),
    "int16 beyond": (lambda x: 2 * x.astype(np.int16), "the values are from 0 to 5"),
    "bool": (lambda x: x > 128, "images are bool"),
    "half": (lambda x: (x / 255).astype(np.float16), "images are float16"),
    "grey": (lambda x: x[..., :1], "np.repeat(images, 3, axis=-1)"),
    "grey, no channel": (lambda x: x[..., 0], "np.repeat(images[..., None], 3, axis=-1)"),
    "transparent": (lambda x: np.concatenate([x, x[..., :1]], -1), "images[..., :3]"),
    "channels first": (lambda x: np.moveaxis(x, -1, 1), "np.moveaxis(images, 1, -1)"),
    "one image": (lambda x: x[0], "one image is images[None]"),
    "five axes": (lambda x: x[None], "images have shape [1, 4, 32, 32, 3]"),
    "no pixels": (lambda x: x[:, :0], "with h and w at least 1"),
    "unequal list": (lambda x: [x[0], x[1, :5]], "not all of one shape"),
    "list of floats": (lambda x: list(x / 255), "np.round(255 * images)"),
    "paths": (lambda x: ["a.png", "b.png"], "files are read by bmjax.data.read_files"),
    "objects": (lambda x: [None, 1], "images are list of object"),
    "none": (lambda x: None, "images are NoneType of object"),
    "masked": (lambda x: np.ma.masked_array(x, x > 5), "masked array"),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_wrong_images_are_refused_with_the_remedy(run, kind):
    change, message = WRONG_IMAGES[kind]
    with pytest.raises((TypeError, ValueError)) as e:
        bmjax.predict_probs(run, change(pixels(4, SIZE, SIZE, 3)))
    assert message in str(e.value)
    assert str(e.value).startswith("images ")


@given(
    shape=st.lists(st.integers(0, 5), max_size=5).map(tuple),
    dtype=st.sampled_from(["u1", "i1", "u2", "i8", "f2", "f4", "f8", "?", "c8", "O", "U3", "S2", "M8[s]"]),
)
def test_arrays_of_any_kind_are_taken_or_refused_in_words(shape, dtype):
    array = np.zeros(shape, dtype)
    right = dtype == "u1" and len(shape) == 4 and shape[3] == 3 and (shape[0] == 0 or min(shape) > 0)
    if right:
        assert check_images(array) is array
    else:
        with pytest.raises((TypeError, ValueError), match="expected"):
            check_images(array)


@given(st.data())
def test_arrays_of_any_size_are_read_as_their_files_are(data):
    n, h, w, size = (data.draw(st.integers(1, most)) for most in (3, 40, 40, 24))
    images = np.frombuffer(data.draw(st.binary(min_size=64, max_size=64)), np.uint8)
    images = np.resize(images, (n, h, w, 3))
    config = DataConfig(source="arrays", image_size=size + 15)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.png") for i in range(n)]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path, compress_level=0)
        np.testing.assert_array_equal(read_arrays(images, config), np.stack(list(read_files(paths, config))))


def data(**changes):
    fields = {
        "name": "d",
        "classes": ("a", "b"),
        "images": pixels(4, 8, 8, 3),
        "labels": np.array([0, 1, 0, 1], np.int32),
        "ids": ("p", "q", "r", "s"),
        "hashes": ("1", "2", "3", "4"),
        "fingerprint": "f",
    }
    return bmjax.Dataset(**fields | changes)


def test_a_dataset_takes_what_is_as_good():
    given = data(labels=[0, 1, 0, 1], ids=list("pqrs"), classes=["a", "b"])
    assert (given.labels.dtype, given.ids, given.classes) == (np.int32, tuple("pqrs"), ("a", "b"))
    assert data(labels=np.array([0, 1, 0, 1], np.uint8)).labels.dtype == np.int32


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([2.0, 10.0, 1.0, 2.0], ("1", "2", "10")),
        (["2", "10", "1", "2"], ("1", "2", "10")),
        (np.float32([0.1, 2.5, 0.1, 2.5]), ("0.1", "2.5")),
        ([True, False, True, True], ("False", "True")),
        (np.array([b"x", b"y", b"x", b"x"]), ("x", "y")),
        (np.array(["b", "a", "c", "b"], object), ("a", "b", "c")),
        (np.array([3, 1, 2, 3], np.uint8), ("1", "2", "3")),
    ],
)
def test_labels_of_arrays_become_classes_as_in_a_table(labels, classes):
    found = bmjax.Dataset.from_arrays(pixels(4, 8, 8, 3), labels, groups=["p", None, float("nan"), 0])
    assert found.classes == classes
    again = {
        str(label): found.classes[i] for label, i in zip(np.asarray(labels).astype(str), found.labels, strict=True)
    }
    assert len(set(again.values())) == len(again) == len(classes)
    assert all(float(key) == float(name) if name[0].isdigit() else key == name for key, name in again.items())
    assert found.groups == ("p", "", "", "0"), "a group that is missing is not known"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(["a", "b", None, "a"], object), "label of image 2 is None"),
        (np.array(["a", "b", float("nan"), "a"], object), "label of image 2 is nan"),
        (["a", "b", float("nan"), "a"], "label of image 2 is np.str_('nan')"),
        ([1.0, 2.0, float("inf"), 1.0], "label of image 2 is np.float64(inf), which is not a number"),
        (np.ma.masked_array([1, 2, 1, 2], [0, 0, 1, 0]), "labels are a masked array"),
        (np.eye(4), "labels have shape [4, 4]; expected [4], one an image; of one-hot labels it is labels.argmax(-1)"),
    ],
)
def test_labels_that_are_missing_are_refused(labels, message):
    with pytest.raises((TypeError, ValueError)) as e:
        bmjax.Dataset.from_arrays(pixels(4, 8, 8, 3), labels)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((4, 8, 8, 3))}, "images are float64"),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, "images have shape [4, 8, 8]"),
        ({"labels": [0, 1]}, "labels have shape [2]; expected [4]"),
        ({"labels": [0.0, 1.0, 0.0, 1.0]}, "labels are float64; expected int32"),
        ({"labels": list("abab")}, "labels are <U1; expected int32"),
        ({"labels": [0, 1, 2, 0]}, "label of image 2 is 2; expected 0 to 1"),
        ({"labels": [0, -1, 1, 0]}, "label of image 1 is -1"),
        ({"classes": ("a", "a")}, "classes are ('a', 'a'); expected at least one, all different"),
        ({"classes": "ab"}, "classes is 'ab' (str); expected a tuple of text"),
        ({"classes": (0, 1)}, "classes hold 0 (int)"),
        ({"ids": ("p",)}, "ids are 1; expected 4"),
        ({"hashes": ()}, "hashes are 0; expected 4"),
        ({"groups": ("g", "h")}, "groups are 2; expected 4"),
        ({"sides": ("train", "val", "test", "dev")}, "sides hold 'dev'"),
    ],
)
def test_a_wrong_dataset_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError)) as e:
        data(**changes)
    assert message in str(e.value)


MODEL = ModelConfig(backbone="densenet_tiny", weights=None)


def tiny():
    return bmjax.create(MODEL, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bmjax.predict_probs("runs/a", pixels(1, 8, 8, 3)), "run is 'runs/a'; expected a Run"),
        (lambda: bmjax.load_dataset(bmjax.Config()), "expected a bmjax.config.DataConfig; that of a Config is its"),
        (lambda: bmjax.load_dataset("cells"), "config is 'cells'; expected a bmjax.config.DataConfig"),
        (lambda: bmjax.load_dataset(DataConfig(), progress=1), "progress is 1; expected True or False"),
        (lambda: bmjax.split_dataset(pixels(1, 2, 2, 3), DataConfig()), "expected a bmjax.Dataset"),
        (lambda: bmjax.split_dataset(data(), bmjax.Config()), "expected a bmjax.config.DataConfig"),
        (lambda: bmjax.create(bmjax.Config(), 2), "expected a bmjax.config.ModelConfig; that of a Config is its field"),
        (lambda: bmjax.create(MODEL, 0), "num_classes is 0; expected at least 1"),
        (lambda: bmjax.create(MODEL, 2.0), "num_classes is 2.0; expected a whole number"),
        (lambda: bmjax.create(MODEL, True), "num_classes is True; expected a whole number"),
        (lambda: bmjax.create(MODEL, ("a", "b")), "num_classes is ('a', 'b') (tuple)"),
        (lambda: bmjax.create(MODEL, 2, "float23"), "dtype is 'float23'; expected one of 'float32', 'bfloat16'"),
        (lambda: bmjax.create(MODEL, 2, "float16"), "dtype is 'float16'; expected one of"),
        (lambda: bmjax.init(MODEL, jax.random.key(0), 32), "expected a bmjax.Classifier"),
        (lambda: bmjax.init(tiny(), 0, 32), "key is 0; expected a key, as jax.random.key(0)"),
        (lambda: bmjax.init(tiny(), jax.random.key(0), 0), "image_size is 0; expected at least 1"),
        (lambda: bmjax.init(tiny(), jax.random.key(0), (32, 32)), "image_size is (32, 32) (tuple); expected a whole"),
        (lambda: bmjax.init(tiny(), jax.random.key(0), 1), "images are 1x1 pixels; expected more"),
        (lambda: bmjax.load_run("x", "bst"), "which is 'bst'; expected one of 'best', 'last'; did you mean 'best'?"),
        (lambda: bmjax.load_run(None), "run_dir is None; expected the path"),
        (lambda: bmjax.load_run("x", devices=0), "devices is 0; expected at least 1"),
        (lambda: bmjax.evaluate("x", "vall"), "split is 'vall'; expected one of 'train', 'val', 'test'; did you mean"),
        (lambda: bmjax.evaluate("x", "val", "lst"), "which is 'lst'; expected one of 'best', 'last'; did you mean"),
        (lambda: bmjax.evaluate("x", data=data()), "data is Dataset; expected None or (bmjax.Dataset, its Splits)"),
        (lambda: bmjax.train("experiment.py"), "config is 'experiment.py'; expected a bmjax.Config"),
        (lambda: bmjax.train(MODEL), "(ModelConfig); expected a bmjax.Config"),
        (lambda: bmjax.train(bmjax.Config(), resume="no"), "resume is 'no'; expected True or False"),
        (lambda: bmjax.train(bmjax.Config(), data=pixels(2, 4, 4, 3)), "(ndarray); expected a bmjax.Dataset"),
        (lambda: bmjax.train(bmjax.Config(), callbacks=print), "callbacks is"),
        (lambda: bmjax.train(bmjax.Config(), callbacks=[print, "x"]), "callbacks[1] is 'x'; expected a function"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((TypeError, ValueError)) as e:
        call()
    assert message in str(e.value)
