"""Data: sources, decoded cache, splits, batches, preprocessing, augmentation."""

from __future__ import annotations

from pathlib import Path

from bmjax.config import DataConfig
from bmjax.data.cache import folder_dataset
from bmjax.data.dataset import Dataset
from bmjax.data.splits import Splits, dataset_summary, read_split, split_dataset, write_split
from bmjax.environment import cache_folder

__all__ = ["Dataset", "Splits", "dataset_summary", "load_dataset", "read_split", "split_dataset", "write_split"]


def load_dataset(config: DataConfig, *, progress: bool = True) -> Dataset:
    """The dataset a configuration names, from the cache where it has been decoded before.

    Raises:
      FileNotFoundError, ValueError: the folder is not there or not as expected; names it.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir else cache_folder() / "images"
    if config.source == "synthetic":
        from bmjax.data.synthetic import synthetic_dataset

        return synthetic_dataset(config.synthetic_per_class, config.image_size, cache_dir, progress=progress)
    return folder_dataset(config.root, config.image_size, cache_dir, strict=config.strict, progress=progress)
