"""Data sets in parts that other libraries have written to disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from bmjax.data.sources.listing import SIDES, Listing


@dataclasses.dataclass(frozen=True)
class _Part:
    """The images of one of a data set's own splits; `get(i)` gives the bytes of image i."""

    names: Sequence[str]
    labels: Sequence[int | None]
    groups: Sequence[str]
    get: Callable[[int], bytes]


def _listing(root: str, classes: Sequence[str], parts: dict[str, _Part]) -> Listing:
    several = len(parts) > 1  # one split alone is no split yet
    if several and (odd := sorted(split for split in parts if split.lower() not in SIDES)):
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
        sides=tuple(SIDES[split.lower()] for split, part in parts.items() for _ in part.names) if several else (),
    )
