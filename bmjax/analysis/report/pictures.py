"""Cells within a page: small ones on sheets, and the most confident mistakes larger, with maps beside them."""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bmjax.data.batches import evenly
from bmjax.runs.records import Predictions, most_wrong

if TYPE_CHECKING:
    from bmjax.runs.folder import Run

log = logging.getLogger(__name__)
SIDE = 64
"""Pixels of a small cell: whole blocks of JPEG's, so that neighbours on a sheet do not run into each other."""
COLUMNS, ROWS = 20, 20
MOST, EACH, SHOWN = 2000, 24, 12
"""Small cells at most, right ones of each class, and mistakes shown large."""
LARGE = 144
_QUALITY, _QUALITY_LARGE = 60, 82


@dataclasses.dataclass(frozen=True)
class Thumbnails:
    """Sheets of small cells as data URLs, and the place of each shown prediction (by its row) on them."""

    sheets: tuple[str, ...] = ()
    places: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake shown large: its row in the predictions, and the picture, "" without images."""

    row: int
    picture: str = ""


def usable(predictions: Predictions | None, images: np.ndarray | None) -> bool:
    """Whether the images are those of the predictions, as far as their number tells."""
    return images is not None and predictions is not None and int(predictions.index.max()) < len(images)


def chosen(predictions: Predictions, most: int = MOST, each: int = EACH) -> np.ndarray:
    """Rows of the cells to show: all mistakes, the most confident first, and right ones of each class, spread evenly
    over its confidences; at most `most`."""
    wrong = most_wrong(predictions, most)
    right = []
    for label in range(len(predictions.classes)):
        of_class = np.flatnonzero((predictions.labels == label) & (predictions.predicted == label))
        ordered = of_class[np.argsort(-predictions.confidence[of_class], kind="stable")]
        right.append(ordered[evenly(len(ordered), each)])
    return np.concatenate([wrong, *right])[:most].astype(int)


def thumbnails(predictions: Predictions, images: np.ndarray, most: int = MOST) -> Thumbnails:
    """Small cells of a split's predictions; `images` uint8 [n, h, w, 3] are the dataset's."""
    rows = chosen(predictions, most)
    sheets = []
    for start in range(0, len(rows), COLUMNS * ROWS):
        part = rows[start : start + COLUMNS * ROWS]
        lines = -(-len(part) // COLUMNS)
        sheet = Image.new("RGB", (COLUMNS * SIDE, lines * SIDE), "white")
        for i, row in enumerate(part):
            cell = Image.fromarray(np.asarray(images[predictions.index[row]]))
            sheet.paste(cell.resize((SIDE, SIDE), Image.Resampling.BOX), (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
        sheets.append(data_url(sheet, _QUALITY))
    return Thumbnails(tuple(sheets), {int(row): i for i, row in enumerate(rows)})


def data_url(picture: Image.Image, quality: int) -> str:
    """A picture as the address of a JPEG that holds it."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def mistakes(
    predictions: Predictions, images: np.ndarray | None, run: Run | None = None
) -> tuple[list[Mistake], list[str]]:
    """(the most confident mistakes, the names of the maps beside each cell): attention and Grad-CAM of the class it was
    taken for, where the run that was read is given and its step is that of the predictions."""
    rows = most_wrong(predictions, SHOWN)
    if images is None or not len(rows):
        return [Mistake(int(row)) for row in rows], []
    cells = np.stack([np.asarray(images[i]) for i in predictions.index[rows]])
    maps = {}
    if run is not None:
        from bmjax.analysis.explain.maps import Explainer

        maps = Explainer(run.model).maps(run.variables, cells, predictions.predicted[rows])
        maps.pop("Grad-CAM++")
    from bmjax.analysis.report.figures import beside_maps

    found = []
    for i, row in enumerate(rows):
        # The maps are drawn at the cell's own size.
        picture = Image.fromarray(beside_maps(cells[i], [values[i] for values in maps.values()], least=1))
        width = round(LARGE * picture.width / picture.height)
        picture = picture.resize((width, LARGE), Image.Resampling.BICUBIC)
        found.append(Mistake(int(row), data_url(picture, _QUALITY_LARGE)))
    return found, list(maps)
