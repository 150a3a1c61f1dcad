"""Batches. Global batch k is a pure function of the data, the seed and k, so a resume needs no iterator's state."""

from __future__ import annotations

import functools
import math
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar, cast

import grain
import numpy as np

from bmjax.data.dataset import Dataset

Sampling = Literal["uniform", "balanced"]
T = TypeVar("T")


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Steps after which every one of n images has been seen at least once; at least 1."""
    return max(1, math.ceil(n / batch_size))


def evenly(n: int, most: int) -> np.ndarray:
    """At most so many places of n, evenly spread from the first to the last; int64, each once."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)


class _Rows:
    """Rows without end, in batches: item k is the rows int32 [b] of batch k. A source of Grain's."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows, self.size, self._seed = rows, batch_size, seed
        # Reading threads stand a few batches apart, so they need few permutations at a time.
        self.order = functools.lru_cache(maxsize=4)(self._draw)

    def _draw(self, n: int, *what: int) -> np.ndarray:
        # NumPy's: Grain's shuffle takes 7 to 35 microseconds an index, which is longer than a head's step on it.
        return np.random.default_rng((self._seed, *what)).permutation(n)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> np.ndarray:
        """One reshuffled epoch after another without a gap."""
        n, start, end = len(self.rows), k * self.size, (k + 1) * self.size
        parts = [self.order(n, epoch)[max(0, start - epoch * n) :] for epoch in range(start // n, -(-end // n))]
        return self.rows[np.concatenate(parts)[: self.size]]


class _Balanced(_Rows):
    """As `_Rows`, every class once in each stretch of k, in an order drawn for the stretch; of each class one
    reshuffled epoch after another."""

    def __init__(self, rows: np.ndarray, labels: np.ndarray, batch_size: int, seed: int):
        super().__init__(rows, batch_size, seed)
        self._of_class = [rows[labels == c] for c in np.unique(labels)]
        self.order = functools.lru_cache(maxsize=4 * len(self._of_class))(self._draw)

    def __getitem__(self, k: int) -> np.ndarray:
        return np.stack([self._row(index) for index in range(k * self.size, (k + 1) * self.size)])

    def _row(self, index: int) -> Any:
        k = len(self._of_class)
        stretch, i = divmod(index, k)
        # In a fixed order, a micro-batch, which is every other image or so of a batch, could hold few classes.
        c = self.order(k, k, stretch)[i]
        rows = self._of_class[c]
        epoch, j = divmod(stretch, len(rows))
        return rows[self.order(len(rows), c, epoch)[j]]


def _batches(rows: np.ndarray, labels: np.ndarray, batch_size: int, seed: int, sampling: Sampling) -> _Rows:
    """Batches of rows int32 [n], whose labels are int [n]."""
    if sampling == "uniform":
        return _Rows(rows, batch_size, seed)
    return _Balanced(rows, labels, batch_size, seed)


def batch_places(
    labels: np.ndarray, batch_size: int, seed: int, start: int, count: int, sampling: Sampling = "uniform"
) -> np.ndarray:
    """Places among training rows of labels int [n] that `TrainBatches` puts into its batches `start` to
    `start + count`: int32 [count, b]. Kept, since runs of several variants over the same seeds ask for the same ones;
    not to be written to."""
    known = labels if sampling == "balanced" else np.zeros(len(labels))  # what the places depend on
    return _places(known.astype(np.int32).tobytes(), batch_size, seed, start, count, sampling)


@functools.lru_cache(maxsize=4096)
def _places(labels: bytes, batch_size: int, seed: int, start: int, count: int, sampling: Sampling) -> np.ndarray:
    of_row = np.frombuffer(labels, np.int32)
    batches = _batches(np.arange(len(of_row), dtype=np.int32), of_row, batch_size, seed, sampling)
    return np.stack([batches[k] for k in range(start, start + count)])


class TrainBatches:
    """Shuffled training batches, one process's rows of each.

    The stream is one reshuffled epoch after another without a gap: batch k holds places k*b to (k+1)*b of it, so no
    image is dropped and every batch is full, whatever the sizes. With `sampling` "balanced" each class has a stream of
    its own, and they take turns. A batch is {"image": uint8 [b, h, w, 3],
    "label": int32 [b], "index": int32 [b] (row of the dataset), "position": int32 [b] (place in the global batch)}.

    Raises:
      ValueError: the batch doesn't divide evenly over the processes, or there is nothing to train on.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 2,
        sampling: Sampling = "uniform",
    ):
        if len(rows) == 0:
            raise ValueError("there is no image to train on; expected at least one")
        if batch_size % process_count:
            raise ValueError(f"train.batch_size is {batch_size}; expected a multiple of the {process_count} processes")
        self._dataset, self._workers, self._size = dataset, workers, batch_size
        local = batch_size // process_count
        self._mine = np.arange(process_index * local, (process_index + 1) * local, dtype=np.int32)
        # Rows are gathered a batch at a time: one fancy index into the memory map instead of b Python objects.
        order = _batches(np.asarray(rows, np.int32), dataset.labels[rows], batch_size, seed, sampling)
        source = cast(Any, order)  # Grain asks for len() and [k]; its types ask for a Sequence
        self._batches = grain.MapDataset.source(source).map(self._gather)

    def _gather(self, rows: Any) -> dict[str, np.ndarray]:
        mine = rows[self._mine]
        return {
            "image": np.asarray(self._dataset.images[mine]),
            "label": self._dataset.labels[mine],
            "index": mine,
            "position": self._mine,
        }

    def batch(self, k: int) -> dict[str, np.ndarray]:
        """Global batch k, this process's rows."""
        batch = self._batches[k]
        assert batch is not None  # Grain's None stands for a filtered element; nothing is filtered.
        return batch

    def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches from `start` on, without end, read ahead by threads."""
        options = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=2 * self._workers)
        return iter(self._batches[start:].to_iter_dataset(options))


def read_ahead(items: Iterator[T], count: int = 2) -> Iterator[T]:
    """The items in their order; a thread reads the next ones while the last is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item


def eval_batches(
    dataset: Dataset, rows: np.ndarray, batch_size: int, part: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order, in batches of one shape; the last is padded.

    A batch is as in training, without "position", and with "weight" float32 [b], 1 for an image and 0 for padding.
    `part` (i, n): images are those of part i of n equal parts of each batch, all else is of the whole batch.
    """
    i, n = part
    mine = slice(i * batch_size // n, (i + 1) * batch_size // n)
    rows = np.asarray(rows, np.int32)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        weight = np.zeros(batch_size, np.float32)
        weight[: len(chosen)] = 1.0
        chosen = np.concatenate([chosen, np.repeat(chosen[-1:], batch_size - len(chosen))])
        yield {
            "image": np.asarray(dataset.images[chosen[mine]]),
            "label": dataset.labels[chosen],
            "index": chosen,
            "weight": weight,
        }
