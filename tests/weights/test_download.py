"""The download resumes, checks, says what to do, and trusts a file without a published checksum only once."""

import dataclasses
import hashlib
import http.server
import threading

import numpy as np
import pytest

from bmjax.download import is_whole
from bmjax.weights import catalog, download


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


def test_a_file_without_a_checksum_is_trusted_once_aloud(server, tmp_path, caplog):
    record = dataclasses.replace(server, checksum="")
    path = download.fetch(record, tmp_path, progress=False)
    sha256 = hashlib.sha256(Server.content).hexdigest()
    assert f"nothing proves that this is the file. sha256 is {sha256}" in caplog.text
    assert (tmp_path / "weights.h5.checksum").read_text() == f"sha256:{sha256}\n"
    caplog.clear()
    assert download.fetch(record, tmp_path, progress=False) == path
    assert caplog.text == ""
    assert is_whole(record, path)
    path.write_bytes(Server.content + b"more")
    assert not is_whole(record, path)
    with pytest.raises(ValueError, match=f"sha256 is .*; expected {sha256}. Delete it"):
        download.fetch(record, tmp_path, progress=False)
    path.unlink()
    Server.content = b"another file by now"
    with pytest.raises(ValueError, match=f"expected {sha256}. It was deleted"):
        download.fetch(record, tmp_path, progress=False)
