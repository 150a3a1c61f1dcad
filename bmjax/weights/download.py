"""Fetches a published weight file into the cache."""

from __future__ import annotations

from pathlib import Path

from bmjax import download
from bmjax.environment import cache_folder
from bmjax.weights.record import WeightRecord


def fetch(
    record: WeightRecord, cache_dir: str | Path | None = None, *, progress: bool = True, wait: float = 1.0
) -> Path:
    """Path of the record's file in the cache, downloaded if it is not there; as `bmjax.download.fetch`."""
    folder = Path(cache_dir) if cache_dir is not None else cache_folder() / "weights"
    return download.fetch(record, folder, otherwise="give its path as model.weights", progress=progress, wait=wait)
