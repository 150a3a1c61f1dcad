"""Data: sources, decoded cache, splits, batches, preprocessing, augmentation."""

from bmjax.data.dataset import Dataset
from bmjax.data.load import list_source, load_dataset, read_files
from bmjax.data.sources.listing import Listing
from bmjax.data.splits import Splits, dataset_summary, read_split, split_dataset, write_split

__all__ = [
    "Dataset", "Listing", "Splits", "dataset_summary", "list_source", "load_dataset", "read_files", "read_split",
    "split_dataset", "write_split",
]  # fmt: skip
