"""The page and the API as an ASGI application.

GET / is the page; GET /api/model the facts of the model; POST /api/classify takes images (multipart form, or one image
as the body) and answers with JSON: `results`, and `foreign`, how the last images of all clients differ from those of
training. No image is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bmjax.analysis.evaluate.foreign import REMEDY
from bmjax.analysis.evaluate.reader import NO_NUMBER
from bmjax.analysis.evaluate.refusal import UNSURE
from bmjax.analysis.export.program import Facts
from bmjax.analysis.report.pictures import data_url
from bmjax.analysis.serve.batching import Batcher, Full
from bmjax.analysis.serve.engine import Answer, Engine, read_upload
from bmjax.analysis.serve.guard import Guard
from bmjax.analysis.serve.watch import Watch

log = logging.getLogger(__name__)
MAX_FILES, MAX_FILE_BYTES, MAX_BODY_BYTES = 64, 16 << 20, 64 << 20
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_UPLOAD_SECONDS, _DECODED_AT_ONCE = 60.0, 2
_QUALITY = 88
_PAGE = Path(__file__).parent / "page"
_KINDS = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}


def make_app(engine: Engine, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """The application; `hosts`: names that requests may have in their Host header, "*" for any."""
    batcher = Batcher(engine, engine.batch)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.decoding = anyio.CapacityLimiter(_DECODED_AT_ONCE)
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()

    app = Starlette(
        routes=[
            Route("/", _page("index.html")),
            Route("/app.js", _page("app.js")),
            Route("/style.css", _page("style.css")),
            Route("/api/model", _model),
            Route("/api/classify", _classify, methods=["POST"]),
        ],
        middleware=[
            Middleware(Guard, most=MAX_BODY_BYTES),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )
    app.state.engine, app.state.batcher, app.state.warned = engine, batcher, False
    return app


def _page(name: str) -> Any:
    content = (_PAGE / name).read_bytes()

    async def page(_: Request) -> Response:
        return Response(content, media_type=_KINDS[name])

    return page


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _model(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    limits = {"files": MAX_FILES, "file_bytes": MAX_FILE_BYTES, "body_bytes": MAX_BODY_BYTES}
    facts = {name: value for name, value in dataclasses.asdict(engine.facts).items() if name != "reading"}
    return JSONResponse(facts | {"maps": engine.has_maps, "limits": limits})


async def _uploads(request: Request) -> list[tuple[str, bytes | str]]:
    """(name, bytes or why there are none) of each image of a request."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        body = await request.body()
        return [("image", body if len(body) <= MAX_FILE_BYTES else _too_large(len(body)))]
    found: list[tuple[str, bytes | str]] = []
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FILES) as form:
        for _, value in form.multi_items():
            if isinstance(value, UploadFile):
                size = value.size or 0
                found.append((value.filename or "", await value.read() if size <= MAX_FILE_BYTES else _too_large(size)))
    return found


def _too_large(size: int) -> str:
    return f"{size} bytes; expected at most {MAX_FILE_BYTES}"


async def _classify(request: Request) -> Response:
    batcher: Batcher = request.app.state.batcher
    try:
        async with asyncio.timeout(_UPLOAD_SECONDS):
            uploads = await _uploads(request)
    except TimeoutError as e:
        raise HTTPException(408, f"the upload took more than {_UPLOAD_SECONDS:.0f} s") from e
    except ClientDisconnect:
        return Response(status_code=400)
    if not uploads:
        raise HTTPException(400, "no image; expected files in a multipart form, or one image as the body")
    try:
        with batcher.room(len(uploads)):
            found = {"results": await asyncio.gather(*(_one(request, *upload) for upload in uploads))}
    except Full as e:
        raise HTTPException(503, "too many images wait; try again", {"retry-after": "2"}) from e
    watch: Watch | None = request.app.state.engine.watch
    foreign = await anyio.to_thread.run_sync(watch.words) if watch is not None else []
    if foreign and not request.app.state.warned:
        request.app.state.warned = True
        log.warning("the images sent lately look unlike those of training:\n  %s\n%s", "\n  ".join(foreign), REMEDY)
    return JSONResponse(found | {"foreign": foreign})


async def _one(request: Request, name: str, data: bytes | str) -> dict[str, Any]:
    """The answer to one image, or why there is none."""
    state, facts = request.app.state, request.app.state.engine.facts
    try:
        if isinstance(data, str):
            raise ValueError(data)
        image = await anyio.to_thread.run_sync(read_upload, data, facts, limiter=state.decoding)
        said: Answer = await state.batcher(image)
        if not np.isfinite(said.probs).all():
            raise ValueError(NO_NUMBER)
        if state.engine.watch is not None:
            await anyio.to_thread.run_sync(
                state.engine.watch.add, image, said.probs, said.inside, limiter=state.decoding
            )
        shown = await anyio.to_thread.run_sync(pictures, image, said.map, limiter=state.decoding)
    except (ValueError, RuntimeError) as e:
        return {"name": name, "error": str(e)}
    return {"name": name, **answer(said.probs, facts), **shown}


def answer(probs: np.ndarray, facts: Facts) -> dict[str, Any]:
    """What is said of probabilities [k]."""
    top = int(probs.argmax())
    undecided = bool(probs[top] < facts.undecided_below)
    return {
        "class": facts.classes[top],
        "probability": round(float(probs[top]), 5),
        "answer": UNSURE if undecided else facts.classes[top],
        "undecided": undecided,
        "probabilities": {name: round(float(p), 5) for name, p in zip(facts.classes, probs, strict=True)},
    }


def pictures(image: np.ndarray, over: np.ndarray | None) -> dict[str, str | None]:
    """An image uint8 [s, s, 3] as the model reads it, and the map [s, s] over it, as addresses that hold them."""
    seen = data_url(Image.fromarray(image), _QUALITY)
    if over is None:
        return {"seen": seen, "map": None}
    from bmjax.analysis.report.figures import beside_maps

    both = beside_maps(image, [over], least=1)
    return {"seen": seen, "map": data_url(Image.fromarray(both[:, image.shape[1] :]), _QUALITY)}
