"""The Keras layout is read strictly; the download resumes, checks, and says what to do."""

import dataclasses
import hashlib
import http.server
import threading

import h5py
import jax
import numpy as np
import pytest

from bmjax import model, weights
from bmjax.backbones import create_backbone
from bmjax.config import ModelConfig
from bmjax.weights import catalog, download, keras_h5

KERAS_LEAF = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance", "kernel": "kernel", "bias": "beta"}


def tiny_variables(seed=0):
    model = create_backbone("densenet_tiny")
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), variables)


def write_h5(path, variables, *, published_names=True, change=None):
    """The layout of Keras's published files; `change(layers)` edits the list of (name, {weight: array})."""
    layers = [("input_1", {})]
    for name in weights.layer_order("densenet_tiny"):
        arrays = {KERAS_LEAF[leaf]: a for leaf, a in variables["params"][name].items()}
        arrays |= {KERAS_LEAF[leaf]: a for leaf, a in variables["batch_stats"].get(name, {}).items()}
        old = name.replace("conv1_", "conv1/") if published_names and name in ("conv1_conv", "conv1_bn") else name
        layers.append((old, arrays))
    if change:
        change(layers)
    with h5py.File(path, "w") as f:
        f.attrs["layer_names"] = [name.encode() for name, _ in layers]
        for name, arrays in layers:
            group = f.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{kind}:0".encode() for kind in arrays]
            for kind, array in arrays.items():
                group[f"{name}/{kind}:0"] = array
    return path


@pytest.mark.parametrize("published_names", [True, False])
def test_reads_published_and_current_names(tmp_path, published_names):
    source = tiny_variables(1)
    path = write_h5(tmp_path / "w.h5", source, published_names=published_names)
    loaded = weights.load_into(tiny_variables(2), "densenet_tiny", str(path))
    jax.tree.map(np.testing.assert_array_equal, loaded, source)


def test_a_file_fits_a_backbone_with_attention_at_several_stages(tmp_path):
    """Strictly, as without: every leaf from the file, none of attention asked for."""
    source = tiny_variables(1)
    path = write_h5(tmp_path / "w.h5", source)
    config = ModelConfig(
        backbone="densenet_tiny", weights=str(path), attention="se+cbam", attach=("conv2", "last"), attention_gate=True
    )
    variables = model.init(model.create(config, 3), jax.random.key(0), 32, config)
    for name, tree in source.items():
        jax.tree.map(np.testing.assert_array_equal, variables[name]["backbone"], dict(tree))
    attention = {f"attention_{stage}{gate}" for stage in ("conv2", "conv4") for gate in ("", "_gate")}
    assert set(variables["params"]) == {"backbone", "head"} | attention
    write_h5(path, source, change=missing)
    with pytest.raises(ValueError, match="1 layers missing from the file, the first 'bn'"):
        model.init(model.create(config, 3), jax.random.key(0), 32, config)


def renamed(layers):
    layers[3] = ("conv2_block1_9_bn", layers[3][1])


def swapped(layers):
    layers[1], layers[2] = layers[2], layers[1]


def reshaped(layers):
    layers[1] = (layers[1][0], {"kernel": np.zeros((7, 7, 3, 9), np.float32)})


def missing(layers):
    del layers[-1]


def extra(layers):
    layers.append(("predictions", {"kernel": np.zeros((1, 1), np.float32)}))


def unknown_kind(layers):
    layers[1] = (layers[1][0], {"depthwise": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "layer 3 with weights is 'conv2_block1_9_bn'; expected 'conv2_block1_0_bn'"),
        (swapped, "layer 1 with weights is 'conv1_bn'; expected 'conv1_conv'"),
        (reshaped, r"leaf 'params/conv1_conv/kernel' has shape \(7, 7, 3, 9\); expected \(7, 7, 3, 8\)"),
        (missing, "1 layers missing from the file, the first 'bn'"),
        (extra, "1 layers left over in the file, the first 'predictions'"),
        (unknown_kind, "is of kind 'depthwise'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    path = write_h5(tmp_path / "w.h5", tiny_variables(), change=change)
    with pytest.raises(ValueError, match=message) as error:
        weights.load_into(tiny_variables(), "densenet_tiny", str(path))
    assert str(path) in str(error.value)


def test_files_that_are_no_weight_files(tmp_path):
    whole = write_h5(tmp_path / "w.h5", tiny_variables()).read_bytes()
    for name, content in (("text.h5", b"hello"), ("empty.h5", b""), ("half.h5", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a readable HDF5 file"):
            keras_h5.read(tmp_path / name)
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["x"] = 1
    with pytest.raises(ValueError, match="no attribute 'layer_names'"):
        keras_h5.read(tmp_path / "other.h5")
    with pytest.raises(FileNotFoundError, match="no such weight file"):
        keras_h5.read(tmp_path / "none.h5")
    with pytest.raises(ValueError, match="did you mean 'imagenet'"):
        weights.load_into(tiny_variables(), "densenet_tiny", "imagnet")


class Server(http.server.BaseHTTPRequestHandler):
    content = b""
    mode = "good"
    requests: list = []  # noqa: RUF012

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.requests.append(start)
        if self.mode == "404":
            self.send_error(404)
            return
        if self.mode == "no ranges":
            start = 0
        body = self.content[start:]
        if self.mode == "wrong":
            body = bytes(len(body))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # A dropped connection: the header promises all, a third of the rest comes.
        drop = self.mode == "always drops" or (self.mode in ("drops", "no ranges") and len(self.requests) <= 2)
        self.wfile.write(body[: len(body) // 3] if drop else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.content, Server.mode, Server.requests = np.random.default_rng(0).bytes(3_000_000), "good", []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    md5 = hashlib.md5(Server.content).hexdigest()
    url = f"http://127.0.0.1:{httpd.server_port}/weights.h5"
    yield dataclasses.replace(catalog.RECORDS[0], url=url, checksum=f"md5:{md5}")
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize("mode", ["good", "drops", "no ranges"])
def test_a_file_is_fetched_once_and_whole(server, tmp_path, mode):
    Server.mode = mode
    path = download.fetch(server, tmp_path, progress=False, wait=0)
    assert path.read_bytes() == Server.content
    assert [p.name for p in tmp_path.iterdir()] == ["weights.h5"]
    if mode == "drops":
        assert Server.requests == [0, 1_000_000, 1_666_666], "did not go on where it broke off"
    asked = len(Server.requests)
    assert download.fetch(server, tmp_path, progress=False) == path
    assert len(Server.requests) == asked


def test_what_goes_wrong_says_what_to_do(server, tmp_path):
    Server.mode = "404"
    with pytest.raises(ConnectionError, match=r"answers 404.*To fetch it by hand: download http.*weights\.h5"):
        download.fetch(server, tmp_path, progress=False, wait=0)
    Server.mode = "wrong"
    with pytest.raises(ValueError, match=r"expected .*It was deleted"):
        download.fetch(server, tmp_path, progress=False, wait=0)
    assert list(tmp_path.iterdir()) == []
    Server.mode = "always drops"
    with pytest.raises(ConnectionError, match="not fetched in 5 attempts"):
        download.fetch(server, tmp_path, progress=False, wait=0)
    kept = (tmp_path / "weights.h5.part").stat().st_size
    assert kept > 2_000_000
    Server.mode, Server.requests = "good", []
    assert download.fetch(server, tmp_path, progress=False, wait=0).read_bytes() == Server.content
    assert Server.requests == [kept]
    (tmp_path / "weights.h5").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="Delete it to fetch it again"):
        download.fetch(server, tmp_path, progress=False)


def test_no_network_gives_the_manual_steps(tmp_path):
    record = dataclasses.replace(catalog.RECORDS[0], url="http://127.0.0.1:9/weights.h5")
    with pytest.raises(ConnectionError, match=r"put it at .*or give its path as model\.weights"):
        download.fetch(record, tmp_path, progress=False, wait=0)


@pytest.mark.parametrize("record", catalog.RECORDS, ids=lambda r: r.name)
def test_records_have_the_exact_number_of_values(record):
    model = create_backbone(record.backbone, include_top=record.top)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == record.parameters
    assert model.epsilon == record.epsilon


@pytest.mark.shared
def test_real_weights_give_keras_features_on_real_cells(shared):
    import keras
    from PIL import Image

    path = shared / "weights/densenet169_weights_tf_dim_ordering_tf_kernels_notop.h5"
    cells = sorted((shared / "data/bm7/BLA").glob("*.jpg"))[:2]
    images = np.stack([np.asarray(Image.open(c).resize((96, 96))) for c in cells]).astype(np.float32)
    model = create_backbone("densenet169")
    x = np.asarray(keras.applications.densenet.preprocess_input(images.copy()))
    empty = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(lambda: model.init(jax.random.key(0), x[:1]))
    )
    loaded = weights.load_into(empty, "densenet169", str(path))
    ours = np.asarray(jax.jit(model.apply)(loaded, x))
    with jax.numpy_rank_promotion("allow"):
        reference = keras.applications.DenseNet169(include_top=False, weights=str(path), input_shape=(96, 96, 3))
        theirs = np.asarray(reference(x))
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
