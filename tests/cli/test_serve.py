"""`bmjax serve` answers many at once, survives what is sent to it, and its page works in a real browser."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import signal
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from bmjax.analysis.evaluate.looks import looks
from bmjax.analysis.evaluate.reader import Reader, Seen
from bmjax.analysis.evaluate.reference import Reference, make_reference, read_reference, write_reference
from bmjax.analysis.export.program import facts_of, make_function, portable
from bmjax.analysis.export.stablehlo import export_stablehlo, write_stablehlo
from bmjax.analysis.serve.engine import MAX_PIXELS, engine_of_export, engine_of_runs, read_upload
from bmjax.analysis.serve.watch import Watch
from bmjax.cli import serve
from bmjax.cli.main import main
from bmjax.data.images.decode import quiet
from bmjax.data.splits import Splits
from bmjax.runs.folder import Run
from bmjax.training.predict import predict_probs, unlabelled
from tests.helpers.browser import chromium
from tests.helpers.processes import environment, free_port
from tests.helpers.small_run import SHOWN, SIZE, small_run

WITHOUT = 'the server needs pip install -e ".[serve]"'
uvicorn = pytest.importorskip("uvicorn", reason=WITHOUT)
pytest.importorskip("python_multipart", reason=WITHOUT)
served = pytest.importorskip("bmjax.analysis.serve.app", reason=WITHOUT)


def as_png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side, text=b""):
    """A PNG of so many pixels a side, of a few bytes: one row is there."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + text + chunk(b"IDAT", zlib.compress(bytes(3 * side + 1))) + chunk(b"IEND", b"")
    )


class Server:
    """The application on a real socket, in a thread."""

    def __init__(self, engine):
        self.app = served.make_app(engine)
        self._server = uvicorn.Server(uvicorn.Config(
            self.app, loop="asyncio", http="h11", ws="none", log_config=None, timeout_graceful_shutdown=2
        ))  # fmt: skip
        self._listener = serve._listening("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(30)
        self._listener.close()

    def ask(self, method, path, body=None, headers=None):
        """(status, headers, body) of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def post(self, *files, **headers):
        """(status, JSON) of images, by a multipart form."""
        parts = [
            b'--x\r\nContent-Disposition: form-data; name="images"; filename="' + name + b'"\r\n\r\n' + data + b"\r\n"
            for name, data in files
        ]
        headers |= {"Content-Type": "multipart/form-data; boundary=x"}
        status, _, body = self.ask("POST", "/api/classify", b"".join(parts) + b"--x--\r\n", headers)
        return status, json.loads(body)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def server(run):
    with quiet(), Server(engine_of_runs([run], [None], 0.36, 8)) as found:
        yield found


def test_it_says_what_the_run_says(server, run):
    images = [noise(i) for i in range(3)]
    status, found = server.post(*((f"{i}.png".encode(), as_png(image)) for i, image in enumerate(images)))
    assert status == 200
    expected = predict_probs(run, np.stack(images))
    for i, result in enumerate(found["results"]):
        assert result["name"] == f"{i}.png"
        np.testing.assert_allclose([result["probabilities"][name] for name in SHOWN], expected[i], atol=2e-5)
        assert result["class"] == SHOWN[expected[i].argmax()]
        assert result["undecided"] == (expected[i].max() < 0.36)
        assert result["answer"] == ("don't know" if result["undecided"] else result["class"])
        assert result["map"].startswith("data:image/jpeg;base64,")


def test_several_runs_are_served_as_their_mean(run, tmp_path):
    other = small_run(tmp_path / "other", seed=1)
    probs, maps, inside = engine_of_runs([run, other], [None, None], 0.5, 2)(np.stack([noise(i) for i in range(2)]))
    assert inside is None, "neither keeps features"
    each = [predict_probs(one, np.stack([noise(i) for i in range(2)])) for one in (run, other)]
    np.testing.assert_allclose(probs, np.mean(each, axis=0), atol=2e-5)
    assert maps is not None


def test_images_unlike_those_of_training_are_told(run):
    """By the last of them, from the tenth on; like ones say nothing."""
    watch = Watch(Reference.of_looks(looks(np.stack([noise(i) for i in range(40)]))), SIZE)
    probs = np.full(3, 1 / 3, np.float32)
    for i in range(40, 60):
        watch.add(noise(i), probs)
    assert watch.words() == []
    engine = engine_of_runs([run], [None], 0.36, 8)
    assert engine.watch is None, "this run keeps no reference"
    engine.watch = Watch(Reference.of_looks(looks(np.full((20, SIZE, SIZE, 3), 200, np.uint8))), SIZE)
    with quiet(), Server(engine) as server:
        first = server.post(*((f"{i}.png".encode(), as_png(noise(i))) for i in range(6)))[1]
        second = server.post(*((f"{i}.png".encode(), as_png(noise(i))) for i in range(6)))[1]
    assert first["foreign"] == []
    assert any(word.startswith("lightness is") and "median of 12 images" in word for word in second["foreign"])


def test_features_are_held_against_those_of_training(run, tmp_path):
    """As `predict` holds them, where the run keeps some: what looks alike may still be strange to the network."""
    kept = Run(tmp_path, run.config, run.model, run.variables, run.classes, run.step)
    data = unlabelled(np.stack([noise(i) for i in range(60)]), run.classes)
    splits = Splits(np.arange(40), np.arange(40, 60), np.zeros(0, int))
    write_reference(tmp_path, make_reference(data, splits, Reader(run)))
    engine, images = engine_of_runs([kept], [None], 0.36, 8), np.stack([noise(i) for i in range(60, 72)])
    reference, seen = read_reference(tmp_path), Reader(run).images(images)
    expected = reference.familiarity(reference.strangeness(seen))
    said = engine(images)
    found = []
    for i in range(12):
        one = said.row(i)
        inside = {name: x[None] for name, x in one.inside.items()}
        alone = Seen(one.probs[None], **inside, images=images[i : i + 1], rows=np.arange(1))
        found.append(reference.familiarity(reference.strangeness(alone))[0])
        engine.watch.add(images[i], one.probs, one.inside)
    np.testing.assert_allclose(found, expected, atol=0.05)  # a rank among 20
    assert engine.watch.words() == []
    narrow = dataclasses.replace(reference, features=reference.features[:, :-1])
    write_reference(tmp_path, narrow)
    with pytest.raises(ValueError, match=r"reference\.npz does not fit the run's features"):
        engine_of_runs([kept], [None], 0.36, 8)
    strange = 255 - images // 8
    for i, one in enumerate(map(engine(strange).row, range(12))):
        engine.watch.add(strange[i], one.probs, one.inside)
    assert any("stranger to the network than 95 %" in word for word in engine.watch.words())


def test_one_image_may_be_the_body(server):
    status, _, body = server.ask("POST", "/api/classify", as_png(noise(0)), {"Content-Type": "image/png"})
    assert status == 200
    assert len(json.loads(body)["results"]) == 1


def test_fifty_clients_at_once_are_answered_in_batches(server, run):
    expected = predict_probs(run, np.stack([noise(i) for i in range(50)])).max(1)
    server.app.state.batcher.batches.clear()
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda i: server.post((b"cell.png", as_png(noise(i)))), range(50)))
    assert [status for status, _ in found] == [200] * 50
    np.testing.assert_allclose([answer["results"][0]["probability"] for _, answer in found], expected, atol=2e-5)
    assert sum(server.app.state.batcher.batches) == 50
    assert max(server.app.state.batcher.batches) > 1


def test_bad_uploads_are_answered_and_the_next_is_served(server):
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(80_000_000)))
    bad = {
        b"empty.png": (b"", "not an image"),
        b"text.png": (b"hello", "not an image"),
        b"cut.png": (as_png(noise(0))[:200], ""),
        b"svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "not an image"),
        b"bomb.png": (bomb(60_000), "far too many pixels; expected at most 25000000"),
        b"large.png": (bomb(5_001), "25010001 pixels; expected at most 25000000"),
        b"text-bomb.png": (bomb(32, text), ""),
        b"profile-bomb.png": (bomb(32, profile), ""),
        b"many bytes.png": (bytes(served.MAX_FILE_BYTES + 1), "expected at most 16777216"),
    }
    status, found = server.post(*((name, data) for name, (data, _) in bad.items()), (b"good.png", as_png(noise(0))))
    assert status == 200
    *failed, good = found["results"]
    for result, (data, message) in zip(failed, bad.values(), strict=True):
        assert message in result["error"], (result, data[:20])
    assert good["class"] in SHOWN


def test_no_numbers_are_an_error_of_their_image_alone(run):
    """As of weights that overflow: JSON has no NaN, and the other images are answered."""
    engine = engine_of_runs([run], [None], 0.36, 8)
    whole = engine.__call__

    class Overflowing:
        def __call__(self, images):
            found = whole(images)
            dark = images.mean((1, 2, 3)) < 10
            return found._replace(probs=np.where(dark[:, None], np.nan, found.probs))

        def __getattr__(self, name):
            return getattr(engine, name)

    with quiet(), Server(Overflowing()) as server:
        black = as_png(np.zeros((SIZE, SIZE, 3), np.uint8))
        status, found = server.post((b"black.png", black), (b"good.png", as_png(noise(0))))
    assert status == 200
    assert found["results"][0]["error"] == "the network's probabilities of it are no numbers"
    assert found["results"][1]["class"] in SHOWN


def test_limits_of_a_request(server):
    many = [(b"a.png", as_png(noise(0)))] * (served.MAX_FILES + 1)
    assert server.post(*many)[0] == 400
    assert server.post()[0] == 400
    assert (
        server.ask("POST", "/api/classify", b"--x\r\ncut", {"Content-Type": "multipart/form-data; boundary=x"})[0]
        == 400
    )
    size = {"Content-Length": str(served.MAX_BODY_BYTES + 1)}
    status, _, body = server.ask("POST", "/api/classify", b"", size)
    assert status == 413
    assert "expected at most" in json.loads(body)["error"]
    assert server.ask("GET", "/api/classify")[0] == 405
    assert server.ask("GET", "/../../etc/passwd")[0] == 404


def test_room_is_kept_from_before_decoding_to_the_answer(server, monkeypatch):
    monkeypatch.setattr(server.app.state.batcher, "_room", 1)
    two = [(b"a.png", as_png(noise(0)))] * 2
    status, found = server.post(*two)
    assert (status, found) == (503, {"error": "too many images wait; try again"})
    for _ in range(2):  # it is given back, also of what can't be read
        assert server.post((b"bad.png", b"none"))[0] == 200
        assert server.post(two[0])[0] == 200


def test_a_body_without_a_length_is_cut_off(server, monkeypatch):
    guard = server.app.middleware_stack.app
    while not hasattr(guard, "_most"):
        guard = guard.app
    monkeypatch.setattr(guard, "_most", 1000)
    chunks = iter([bytes(600)] * 3)
    assert server.ask("POST", "/api/classify", chunks, {"Content-Type": "image/png"})[0] == 413


def test_other_sites_get_nothing(server):
    status, headers, _ = server.ask("GET", "/", headers={"Origin": "http://evil.example"})
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["x-content-type-options"] == "nosniff"
    assert not [name for name in headers if name.lower().startswith("access-control-")]
    other = {"Sec-Fetch-Site": "cross-site"}
    assert server.post((b"a.png", as_png(noise(0))), **other)[0] == 403
    link = other | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.ask("GET", "/", headers=link)[0] == 200, "a link to the page may be followed"
    assert server.ask("GET", "/", headers=link | {"Sec-Fetch-Dest": "iframe"})[0] == 403
    assert server.ask("POST", "/api/classify", as_png(noise(0)), link)[0] == 403
    assert server.ask("GET", "/api/model", headers={"Host": "evil.example"})[0] == 400


def test_the_page_in_a_browser(server, tmp_path):
    good, bad = tmp_path / "<img src=x onerror=alert(1)>.png", tmp_path / "bad.png"
    good.write_bytes(as_png(noise(1)))
    bad.write_bytes(b"none")
    cards = "document.querySelectorAll('#results > li').length"
    with chromium() as browser:
        page = browser.open(f"http://127.0.0.1:{server.port}/")
        page.wait("document.querySelector('#model').textContent.includes('densenet_tiny')")
        with page.choosing(good, bad):
            page.click("#drop")
        page.wait(f"{cards} == 2")
        assert "No answer" in page.text("li.failed")
        shown = page.text("li:not(.failed)")
        assert good.name in shown
        assert "%" in shown
        page.wait("[...document.images].length == 2 && [...document.images].every(i => i.complete && i.naturalWidth)")
        for place in ("#drop", "h1"):  # dropped anywhere on the page
            page.drop(place, good)
        page.wait(f"{cards} == 4")
        assert page.evaluate("document.querySelectorAll('li.failed').length") == 1
        # By keyboard alone: the chooser first, then what clears.
        page.evaluate("document.activeElement.blur()")
        page.press("Tab")
        assert page.evaluate("document.activeElement.id") == "files"
        with page.choosing(good):
            page.press("Enter")
        page.wait(f"{cards} == 5")
        page.press("Tab", "Enter")
        page.wait(f"{cards} == 0")
        assert page.evaluate("document.activeElement.id") == "files"
        assert page.problems == []
        assert all(url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:")) for url in page.requests)


def test_the_page_tells_that_images_are_foreign(run, tmp_path):
    engine = engine_of_runs([run], [None], 0.36, 8)
    engine.watch = Watch(Reference.of_looks(looks(np.full((20, SIZE, SIZE, 3), 200, np.uint8))), SIZE)
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for i, file in enumerate(files):
        file.write_bytes(as_png(noise(i)))
    with quiet(), Server(engine) as server, chromium() as browser:
        page = browser.open(f"http://127.0.0.1:{server.port}/")
        page.wait("document.querySelector('#model').textContent.includes('densenet_tiny')")
        assert page.evaluate("document.querySelector('#foreign').hidden")
        with page.choosing(*files):
            page.click("#drop")
        page.wait("document.querySelectorAll('#foreign li').length > 0")
        assert "lightness is" in page.text("#foreign")
        page.click("#clear")
        page.wait("document.querySelector('#foreign').hidden")
        assert page.problems == []


def test_an_export_is_served_without_maps(run, tmp_path):
    function = portable(make_function(run))
    write_stablehlo(tmp_path / "m.zip", *export_stablehlo(function, facts_of(run, None, 0.5)))
    engine = engine_of_export(tmp_path / "m.zip", 2)
    assert not engine.has_maps
    images = np.stack([noise(i) for i in range(5)])
    said = engine(images)
    np.testing.assert_allclose(said.probs, predict_probs(run, images), atol=1e-4)
    assert said.map is None
    assert engine.watch is None
    # A file as it comes, read by what the export says of reading.
    assert read_upload(as_png(np.zeros((50, 40, 3), np.uint8)), engine.facts).shape == (SIZE, SIZE, 3)
    with pytest.raises(ValueError, match=f"expected at most {MAX_PIXELS}"):
        read_upload(bomb(6000), engine.facts)


@pytest.mark.parametrize(
    ("number", "code", "host"), [(signal.SIGINT, 130, "127.0.0.1"), (signal.SIGTERM, 143, "127.0.0.2")]
)
def test_it_ends_on_a_signal(run, tmp_path, number, code, host):
    """The command itself, on an export: ready, asked once, ended."""
    path, port = tmp_path / "m.zip", free_port()
    write_stablehlo(path, *export_stablehlo(portable(make_function(run)), facts_of(run, None, 0.5)))
    command = [sys.executable, "-m", "bmjax", "serve", str(path), "--port", str(port), "--host", host]
    command += ["--batch-size", "1"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"http://{host}:{port} serves small, 3 classes, without attention maps"), line
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
            connection.request("GET", "/api/model")
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["run"]) == (200, "small")  # and the connection stays open
            process.send_signal(number)
            assert process.wait(30) == code
    finally:
        process.kill()
        process.communicate()


def test_wrong_input_is_one_line(tmp_path, capsys):
    (tmp_path / "m.zip").write_bytes(b"no zip")
    with contextlib.closing(serve._listening("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in (
            ((tmp_path / "none",), "is not there; expected a run's folder or a file of `bmjax export`"),
            ((tmp_path / "m.zip", "--port", "0"), "not a readable export of bmjax"),
            ((tmp_path / "m.zip", "--port", "70000"), "--port is 70000"),
            ((tmp_path / "m.zip", "--pixel-size", "0"), "--pixel-size is 0.0"),
            ((tmp_path, tmp_path / "m.zip"), "expected folders of runs, where several are given"),
            ((tmp_path / "m.zip", "--batch-size", "0"), "--batch-size is 0"),
            ((tmp_path / "m.zip", "--port", port), f"can't listen at 127.0.0.1:{port}"),
        ):
            assert main(["serve", *map(str, words)]) == 2
            assert message in capsys.readouterr().err


def test_only_loopback_is_quiet():
    assert serve._is_loopback("127.0.0.1")
    assert serve._is_loopback("::1")
    assert serve._is_loopback("localhost")
    assert not serve._is_loopback("0.0.0.0")
    assert not serve._is_loopback("cells.example")
