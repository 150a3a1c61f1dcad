"""Requests of many clients as batches: images wait a few milliseconds for others, and go to the engine together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bmjax.analysis.serve.engine import Answer


class Full(Exception):
    """There is no room for more images."""


class Batcher:
    """Gathers at most `most` images, or those that come within `seconds` of the first; one batch runs at a time.

    `room`: images that may be on their way, from before they are decoded until they are answered.
    """

    def __init__(self, engine: Callable[[np.ndarray], Answer], most: int, seconds: float = 0.01, room: int = 512):
        self._engine, self._most, self._seconds, self._room = engine, most, seconds, room
        self._on_their_way = 0
        self._queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        self._pool = ThreadPoolExecutor(1, "engine")
        self.batches: list[int] = []
        """Sizes of the last batches."""

    @contextlib.contextmanager
    def room(self, n: int) -> Iterator[None]:
        """Keeps room for n images for as long as it is inside; raises Full where there is none."""
        if self._on_their_way + n > self._room:
            raise Full
        self._on_their_way += n
        try:
            yield
        finally:
            self._on_their_way -= n

    async def __call__(self, image: np.ndarray) -> Answer:
        """What the engine says of an image uint8 [s, s, 3]."""
        waiting = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((image, waiting))
        return await waiting

    async def work(self) -> None:
        """Answers what waits, until it is cancelled."""
        try:
            while True:
                await self._answer(await self._gather())
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        found = [await self._queue.get()]
        until = asyncio.get_running_loop().time() + self._seconds
        while len(found) < self._most:
            try:
                async with asyncio.timeout_at(until):
                    found.append(await self._queue.get())
            except TimeoutError:
                break
        return [(image, waiting) for image, waiting in found if not waiting.done()]  # a client may have gone

    async def _answer(self, found: list[tuple[np.ndarray, asyncio.Future]]) -> None:
        if not found:
            return
        self.batches = [*self.batches[-99:], len(found)]
        try:
            images = np.stack([image for image, _ in found])
            said = await asyncio.get_running_loop().run_in_executor(self._pool, self._engine, images)
        except Exception as e:  # the next batch may do better: the server goes on
            for _, waiting in found:
                if not waiting.done():
                    waiting.set_exception(RuntimeError(f"the model failed: {e}"))
            return
        for i, (_, waiting) in enumerate(found):
            if not waiting.done():
                waiting.set_result(said.row(i))
