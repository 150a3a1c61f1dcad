"""A W&B server of one's own on this machine: it answers as little as W&B's client needs, refuses, hangs or dies."""

from __future__ import annotations

import http.server
import json
import socketserver
import struct
import threading
from typing import Any, Literal

Mode = Literal["answers", "500", "rst", "hangs"]


class Server:
    """Listens from `start` to `stop`, on the same port each time. `steps` are the global steps it was sent, `has_run`
    says whether it has taken a run."""

    def __init__(self, mode: Mode = "answers"):
        self.mode: Mode = mode
        self.steps: list[int] = []
        self.requests, self.has_run = 0, False
        self._port, self._server = 0, None
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> Server:
        self._ended.clear()
        outer = self

        class Handler(_Handler):
            server_of = outer

        class Listening(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads, allow_reuse_address, block_on_close = True, True, False

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        self._server = Listening(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends it; connections are closed, and new ones refused."""
        self._ended.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: Server

    def log_message(self, *_: Any) -> None: ...

    def _any(self) -> None:
        server = self.server_of
        server.requests += 1
        if server.mode == "rst":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(1, 13, linger)  # SO_LINGER of 0 s: closing resets
            self.connection.close()
            return
        if server.mode == "hangs":
            server._ended.wait()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server._ended.is_set():
            return
        if self.path.endswith("file_stream"):
            self._take(json.loads(body))
        out = self._graphql(json.loads(body)) if self.path == "/graphql" else {}
        data = json.dumps(out).encode()
        self.send_response(500 if server.mode == "500" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _any

    def _take(self, sent: dict[str, Any]) -> None:
        lines = (sent.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
        self.server_of.steps += [row["global_step"] for row in map(json.loads, lines) if "global_step" in row]

    def _graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        text, given = asked["query"], asked.get("variables") or {}
        if "upsertBucket" in text:
            self.server_of.has_run = True
            project = {"id": "UA==", "name": "bmjax", "entity": {"id": "RQ==", "name": "me"}}
            bucket = {"id": "QQ==", "name": given.get("name"), "displayName": "r", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}}
        if "createRunFiles" in text:
            files = [{"name": name, "uploadUrl": f"{self.server_of.url}/up"} for name in given["files"]]
            return {"data": {"createRunFiles": {"runID": "QQ==", "uploadHeaders": [], "files": files}}}
        return {"data": {}}
