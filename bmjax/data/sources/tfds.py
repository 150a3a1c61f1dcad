"""What TensorFlow Datasets wrote as array_record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bmjax.data.sources.listing import Listing
from bmjax.data.sources.parts import _listing, _Part
from bmjax.files import reading


def list_tfds(root: str | Path) -> Listing:
    """A data set that TFDS wrote as array_record: the folder of one version, with features image and label.

    Names are those of the feature `path` where there is one. Splits named train, validation and test are kept.

    Raises:
      FileNotFoundError: no such data set.
      ValueError: damaged, not in array_record, or features are missing; names the folder.
    """
    if not str(root) or not (Path(root) / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"config field 'data.root' is {str(root)!r}; expected the folder that `bmjax data build` names, "
            "with a dataset_info.json"
        )
    try:
        with reading(root, "data set of TFDS"):
            return _listed(root)
    except ValueError as e:  # protobuf's have several lines
        raise ValueError(" ".join(str(e).splitlines())) from e


def _listed(root: str | Path) -> Listing:
    import tensorflow_datasets as tfds  # here alone: it is slow to import, and no other source needs it

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
