"""Data sets that other libraries have written to disk: TFDS (array_record) and Hugging Face `datasets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.data.sources import SIDES, Listing


@dataclasses.dataclass(frozen=True)
class _Part:
    """The images of one of a data set's own splits; `get(i)` gives the bytes of image i."""

    names: Sequence[str]
    labels: Sequence[int | None]
    groups: Sequence[str]
    get: Callable[[int], bytes]


def _listing(root: str, classes: Sequence[str], parts: dict[str, _Part]) -> Listing:
    several = len(parts) > 1  # one split alone is no split yet
    if several and (odd := sorted(set(parts) - set(SIDES))):
        raise ValueError(f"{root}: splits {', '.join(odd)}; expected {', '.join(filter(None, SIDES))}, or only one")
    for split, part in parts.items():
        for name, label in zip(part.names, part.labels, strict=True):
            if label is None or not 0 <= label < len(classes):
                raise ValueError(
                    f"{root}: {split} {name} has label {label}; expected one of the classes for each image"
                )
    places = [(part, i) for part in parts.values() for i in range(len(part.names))]
    groups = tuple(group for part in parts.values() for group in part.groups)
    return Listing(
        origin=root,
        classes=tuple(classes),
        ids=tuple(f"{split}/{name}" if several else name for split, part in parts.items() for name in part.names),
        labels=np.array([label for part in parts.values() for label in part.labels], np.int32),
        read=lambda i: places[i][0].get(places[i][1]),
        groups=groups if any(groups) else (),
        sides=tuple(SIDES[split] for split, part in parts.items() for _ in part.names) if several else (),
    )


def list_tfds(root: str | Path) -> Listing:
    """A data set that TFDS wrote as array_record: the folder of one version, with features image and label.

    Names are those of the feature `path` where there is one. Splits named train, validation and test are kept.

    Raises:
      FileNotFoundError: no such data set.
      ValueError: not in array_record, or features are missing.
    """
    if not str(root) or not (Path(root) / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"config field 'data.root' is {str(root)!r}; expected the folder that `bmjax data build` names, "
            "with a dataset_info.json"
        )
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(root))
    features = builder.info.features
    if missing := [name for name in ("image", "label") if name not in features]:
        raise ValueError(f"{root}: no feature {', '.join(missing)} among {', '.join(features)}")
    if (found := builder.info.file_format.value) != "array_record":
        raise ValueError(f"{root}: its files are {found}; expected array_record, which is read without TensorFlow")
    parts = {}
    for split in builder.info.splits:
        rows = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        names, labels = [], []
        for i, row in enumerate(rows):
            names.append(row["path"].decode() if "path" in features else f"{i:06d}")
            labels.append(int(row["label"]))
        parts[split] = _Part(names, labels, [""] * len(names), lambda i, rows=rows: rows[i]["image"])
    listing = _listing(str(root), features["label"].names, parts)
    return dataclasses.replace(listing, name=builder.info.full_name)


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

    import pyarrow.compute

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
        found = {v for table in tables.values() for v in table["label"].to_pylist() if v is not None}
        classes = sorted(map(str, found))
    parts = {}
    for split, table in tables.items():
        images = table["image"]
        values = table["label"].to_pylist()
        labels = (
            values
            if isinstance(label, datasets.ClassLabel)
            else [None if v is None else classes.index(str(v)) for v in values]
        )
        paths = pyarrow.compute.struct_field(images, "path").to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        names = [f"{i:06d}/{Path(path).name}" if path else f"{i:06d}" for i, path in enumerate(paths)]
        groups = (
            [str(g or "") for g in table["group"].to_pylist()] if "group" in table.column_names else [""] * len(names)
        )
        parts[split] = _Part(names, labels, groups, lambda i, images=images: _bytes_of(images[i].as_py()))
    return _listing(str(root), classes, parts)


def _bytes_of(image: dict[str, Any] | None) -> bytes:
    # save_to_disk takes the bytes of every file along, so a row without bytes has no image.
    if image is None or image["bytes"] is None:
        raise ValueError("the row has no image")
    return image["bytes"]
