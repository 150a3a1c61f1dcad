"""Before the application: how much a request may send, who may send it, and what a browser may do with the answer."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # Pictures come within the JSON, as data: addresses; everything else from this server alone.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses bodies of more than `most` bytes, announced or not, and what pages of other sites send; sets `HEADERS`.

    No header for CORS is ever set, so that scripts of other sites read nothing.
    """

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sends(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        if (refusal := self._refusal(scope, headers)) is not None:
            await refusal(scope, receive, sends)
            return
        seen = 0

        async def receives() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, self._too_large(seen))
            return message

        await self._app(scope, receives, sends)

    def _refusal(self, scope: Scope, headers: Headers) -> Any:
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return JSONResponse({"error": "content-length is no number"}, 400)
        if int(length) > self._most:
            return JSONResponse({"error": self._too_large(int(length))}, 413)
        if headers.get("sec-fetch-site") == "cross-site" and not _opens_page(scope["method"], headers):
            return JSONResponse({"error": "requests of other sites are refused"}, 403)
        return None

    def _too_large(self, size: int) -> str:
        return f"{size} bytes or more; expected at most {self._most} in a request"


def _opens_page(method: str, headers: Headers) -> bool:
    """Whether a user has followed a link to here: the page itself then opens, in a window of its own."""
    sent = (method, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    return sent == ("GET", "navigate", "document")
