"""Data: sources, decoded cache, splits, batches, preprocessing, augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from bmjax.config import DataConfig
from bmjax.data.archives import list_archive
from bmjax.data.cache import listed_dataset, stained
from bmjax.data.dataset import Dataset
from bmjax.data.decode import decode_files
from bmjax.data.prepared import list_huggingface, list_tfds
from bmjax.data.sources import Listing, list_folder, list_table
from bmjax.data.splits import Splits, dataset_summary, read_split, split_dataset, write_split
from bmjax.environment import cache_folder

__all__ = [
    "Dataset",
    "Listing",
    "Splits",
    "dataset_summary",
    "list_source",
    "load_dataset",
    "read_files",
    "read_split",
    "split_dataset",
    "write_split",
]

_SOURCES: dict[str, Callable[[str], Listing]] = {
    "folder": list_folder,
    "table": list_table,
    "archive": list_archive,
    "tfds": list_tfds,
    "huggingface": list_huggingface,
}


def list_source(config: DataConfig) -> Listing:
    """The images that a configuration names, none of them read yet; not for rendered cells.

    Raises:
      FileNotFoundError, ValueError: they are not there or not as expected; names the place.
    """
    return _SOURCES[config.source](config.root)


def load_dataset(config: DataConfig, *, progress: bool = True) -> Dataset:
    """The dataset a configuration names, from the cache where it has been decoded before.

    Raises:
      FileNotFoundError, ValueError: it is not there or not as expected; names the place.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir else cache_folder() / "images"
    if config.source == "synthetic":
        from bmjax.data.synthetic import synthetic_dataset

        if config.stain != "none":
            raise ValueError(f"config field 'data.stain' is {config.stain!r}; expected 'none' for rendered cells")
        return synthetic_dataset(config.synthetic_per_class, config.image_size, cache_dir, progress=progress)
    return listed_dataset(list_source(config), config, cache_dir, progress=progress)


def read_files(paths: Sequence[str | Path], config: DataConfig) -> Iterable[np.ndarray | str]:
    """Files as `load_dataset` would read them: uint8 RGB [h, w, 3], or the reason why one can't be read."""
    return stained(decode_files(paths, config.image_size), config)
