"""What Hugging Face `datasets` saved to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute

from bmjax.data.sources.columns import as_text
from bmjax.data.sources.labels import classes_of, known
from bmjax.data.sources.listing import Listing
from bmjax.data.sources.parts import _listing, _Part


def list_huggingface(root: str | Path) -> Listing:
    """What `datasets` saved with `save_to_disk`: columns image, label and, where known, group.

    An image's name is its number and, where known, that of its file. Splits named train, validation and test are kept.

    Raises:
      FileNotFoundError: no such data set.
      ValueError: the library is not installed, or columns are missing.
    """
    if not any((Path(root) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise FileNotFoundError(f"config field 'data.root' is {str(root)!r}; expected a folder made by save_to_disk")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        message = "config field 'data.source' is 'huggingface', which needs the library datasets"
        raise ValueError(f"{message}; expected it to be installed: pip install 'bmjax[huggingface]'") from e

    loaded = datasets.load_from_disk(str(root))
    loaded = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    tables = {}
    for split, part in loaded.items():
        if missing := [name for name in ("image", "label") if name not in part.column_names]:
            raise ValueError(f"{root}: no column {', '.join(missing)} among {', '.join(part.column_names)}")
        tables[split] = part.with_format("arrow")[:]  # a memory map; rows stay on disk
    label = next(iter(loaded.values())).features["label"]
    if isinstance(label, datasets.ClassLabel):
        classes = label.names
    else:
        found = {split: _texts(table["label"]) for split, table in tables.items()}
        names, classes = classes_of([name for part in found.values() for name in part if name])
        # In the order of the rows: what is missing has no class.
        following = iter(names)
        of_row = {split: [next(following) if name else None for name in part] for split, part in found.items()}
    parts = {}
    for split, table in tables.items():
        images = table["image"]
        if isinstance(label, datasets.ClassLabel):
            labels = table["label"].to_pylist()
        else:
            number = {name: i for i, name in enumerate(classes)}
            labels = [None if name is None else number[name] for name in of_row[split]]
        paths = pyarrow.compute.struct_field(images, "path").to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        names = [f"{i:06d}/{Path(path).name}" if path else f"{i:06d}" for i, path in enumerate(paths)]
        groups = _texts(table["group"]) if "group" in table.column_names else [""] * len(names)
        parts[split] = _Part(names, labels, groups, lambda i, images=images: _bytes_of(images[i].as_py()))
    return _listing(str(root), classes, parts)


def _texts(column: Any) -> list[str]:
    """The values as text, "" where one is missing."""
    return [known(as_text(value)) for value in column.to_pylist()]


def _bytes_of(image: dict[str, Any] | None) -> bytes:
    # save_to_disk takes the bytes of every file along, so a row without bytes has no image.
    if image is None or image["bytes"] is None:
        raise ValueError("the row has no image")
    return image["bytes"]
