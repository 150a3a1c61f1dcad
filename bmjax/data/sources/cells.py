"""Drawn marrow cells: what each class looks like, and what lies around it."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

CLASSES = ("BLA", "EOS", "LYT", "MON", "NGS", "NIF", "PMO")

# Optical densities of a thick layer, for red, green and blue light: -log of the colour left.
CHROMATIN = (1.25, 1.95, 0.62)
BASOPHILIC = (0.86, 0.80, 0.20)  # blue cytoplasm, rich in RNA
GREY_BLUE = (0.52, 0.50, 0.20)
PINK = (0.16, 0.34, 0.13)
ORANGE = (0.22, 0.85, 0.62)  # eosinophilic granules
AZURE = (0.75, 1.75, 0.40)  # azurophilic granules
RED_CELL = (0.30, 0.40, 0.42)


@functools.lru_cache(maxsize=64)
def spread(size: int, grid: int) -> np.ndarray:
    """Bilinear weights [size, grid] from a coarse grid to pixels."""
    place = (np.arange(size, dtype=np.float32) + 0.5) / size * (grid - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(grid, dtype=np.float32))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What every picture of one size shares: coordinates y, x float32 [h, w], -1..1, and the side of a pixel."""

    size: int

    @functools.cached_property
    def yx(self) -> tuple[np.ndarray, np.ndarray]:
        line = ((np.arange(self.size, dtype=np.float32) + 0.5) / self.size) * 2 - 1
        return line[:, None], line[None, :]

    @property
    def pixel(self) -> float:
        return 2.0 / self.size

    def cloud(self, rng: np.random.Generator, scale: float) -> np.ndarray:
        """Smooth noise [h, w] about 0, of standard deviation near 1, with grains of `scale`."""
        grid = max(3, round(2 / scale))  # whatever the size, so that a cell looks alike at every size
        values = rng.standard_normal((grid, grid), np.float32)
        weights = spread(self.size, grid)
        return (weights @ values @ weights.T) * 1.5

    def coverage(self, inside: np.ndarray, softness: float = 0.0) -> np.ndarray:
        """Signed distance (> 0 inside) -> 0..1, with an edge as wide as a pixel or `softness`."""
        return np.clip(inside / max(self.pixel, softness) + 0.5, 0, 1)


@functools.lru_cache(maxsize=8)
def canvas_of(size: int) -> Canvas:
    return Canvas(size)


class Density:
    """Optical density [h, w, 3] that layers add to."""

    def __init__(self, canvas: Canvas):
        self.value = np.zeros((3, canvas.size, canvas.size), np.float32)

    def add(self, layer: np.ndarray, colour: tuple[float, float, float]) -> None:
        for channel, density in enumerate(colour):
            self.value[channel] += layer * np.float32(density)

    def replace(self, cover: np.ndarray, keep: float = 0.0) -> None:
        """Takes away what lies under a cover 0..1, all but the share `keep`."""
        self.value *= 1 - cover * np.float32(1 - keep)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A cell's own coordinates: centre, turn and a wobbling outline shared by its parts."""

    canvas: Canvas
    y: np.ndarray
    x: np.ndarray

    @classmethod
    def at(cls, canvas: Canvas, centre: tuple[float, float], angle: float) -> Frame:
        y, x = canvas.yx
        y, x = y - np.float32(centre[0]), x - np.float32(centre[1])
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return cls(canvas, cos * y - sin * x, sin * y + cos * x)

    def blob(
        self, rng: np.random.Generator, radius: float, place=(0.0, 0.0), stretch: float = 1.0, wobble: float = 0.05
    ) -> np.ndarray:
        """Signed distance (about) to the edge of a wobbling ellipse."""
        y = (self.y - np.float32(place[0])) * np.float32(stretch)
        x = (self.x - np.float32(place[1])) / np.float32(stretch)
        distance = np.sqrt(y * y + x * x) + 1e-6
        # cos and sin of multiples of the angle without trigonometry: powers of a unit complex number.
        unit = (x + 1j * y) / distance
        power, outline = unit * unit, np.float32(1.0)
        for k in (2, 3, 4, 5):
            a, b = rng.normal(0, wobble / k, 2)
            outline = outline + power.real * np.float32(a) + power.imag * np.float32(b)
            power = power * unit
        return np.float32(radius) * outline - distance

    def capsule(self, a, b, radius: float) -> np.ndarray:
        """Signed distance to the edge of a thick stroke from a to b."""
        ay, ax = (np.float32(v) for v in a)
        dy, dx = np.float32(b[0] - a[0]), np.float32(b[1] - a[1])
        y, x = self.y - ay, self.x - ax
        along = np.clip((y * dy + x * dx) / (dy * dy + dx * dx + np.float32(1e-9)), 0, 1)
        return np.float32(radius) - np.hypot(y - along * dy, x - along * dx)

    def grains(self, rng: np.random.Generator, spacing: float, radius: float, share: float) -> np.ndarray:
        """Round grains 0..1 [h, w], one a square of a turned, jittered lattice in a `share` of its squares."""
        angle = rng.uniform(0, 2 * np.pi)
        cos, sin = np.float32(np.cos(angle) / spacing), np.float32(np.sin(angle) / spacing)
        v, u = cos * self.y - sin * self.x, sin * self.y + cos * self.x
        row, column = np.floor(v), np.floor(u)
        n = 64
        room = min(radius / spacing, 0.4)
        jitter = rng.uniform(room, 1 - room, (2, n, n)).astype(np.float32)
        size = rng.uniform(0.7, 1.2, (n, n)).astype(np.float32) * (rng.random((n, n)) < share)
        i, j = row.astype(np.int32) % n, column.astype(np.int32) % n
        distance = np.hypot(v - row - jitter[0][i, j], u - column - jitter[1][i, j]) * np.float32(spacing)
        return self.canvas.coverage(size[i, j] * np.float32(radius) - distance) * (size[i, j] > 0)


@dataclasses.dataclass
class Cell:
    """A cell's parts: outlines as signed distances, layers of stain as 0..1."""

    body: np.ndarray
    nucleus: np.ndarray
    cytoplasm: tuple[float, float, float]
    cytoplasm_amount: float
    chromatin_amount: float
    chromatin_grain: float
    chromatin_contrast: float
    granules: list[tuple[np.ndarray, tuple[float, float, float], bool]] = dataclasses.field(default_factory=list)
    """(layer, colour, also over the nucleus)"""
    pale: list[np.ndarray] = dataclasses.field(default_factory=list)
    """Holes in the cytoplasm: vacuoles, the zone about the Golgi apparatus."""
    nucleoli: list[np.ndarray] = dataclasses.field(default_factory=list)


def blast(rng: np.random.Generator, frame: Frame, scale: float) -> Cell:
    """Large round nucleus that nearly fills the cell, fine even chromatin, one to three pale nucleoli."""
    radius = scale * rng.uniform(0.44, 0.56)
    stretch = rng.uniform(0.92, 1.08)
    inner = radius * rng.uniform(0.82, 0.9)
    off = rng.normal(0, radius * 0.04, 2)
    nucleoli = [
        frame.canvas.coverage(frame.blob(rng, radius * rng.uniform(0.13, 0.2), off + rng.uniform(-0.4, 0.4, 2) * inner))
        for _ in range(rng.integers(1, 4))
    ]
    return Cell(
        body=frame.blob(rng, radius, stretch=stretch, wobble=0.05),
        nucleus=frame.blob(rng, inner, off, stretch, 0.04),
        cytoplasm=BASOPHILIC,
        cytoplasm_amount=rng.uniform(0.85, 1.15),
        chromatin_amount=rng.uniform(0.62, 0.78),
        chromatin_grain=0.05,
        chromatin_contrast=0.10,
        nucleoli=nucleoli,
    )


def eosinophil(rng: np.random.Generator, frame: Frame, scale: float) -> Cell:
    """Two lobes, a cytoplasm packed with coarse orange granules."""
    radius = scale * rng.uniform(0.42, 0.53)
    lobe, apart = radius * rng.uniform(0.34, 0.42), radius * rng.uniform(0.34, 0.44)
    bend, shift = rng.uniform(-0.25, 0.25) * radius, rng.uniform(0.05, 0.3) * radius
    a, b = (shift + bend, -apart), (shift - bend, apart)
    nucleus = np.maximum(
        np.maximum(frame.blob(rng, lobe, a, wobble=0.1), frame.blob(rng, lobe * rng.uniform(0.8, 1.1), b, wobble=0.1)),
        frame.capsule(a, b, lobe * rng.uniform(0.2, 0.45)),
    )
    return Cell(
        body=frame.blob(rng, radius, stretch=rng.uniform(0.92, 1.08), wobble=0.06),
        nucleus=nucleus,
        cytoplasm=PINK,
        cytoplasm_amount=rng.uniform(0.8, 1.2),
        chromatin_amount=rng.uniform(0.8, 1.0),
        chromatin_grain=0.09,
        chromatin_contrast=0.14,
        # Two lattices, one over the other, hide that they are lattices.
        granules=[
            (frame.grains(rng, 0.11, 0.036, 0.9) * np.float32(rng.uniform(0.7, 1.0)), ORANGE, False) for _ in range(2)
        ],
    )


def lymphocyte(rng: np.random.Generator, frame: Frame, scale: float) -> Cell:
    """Small; a dense round nucleus with clumps, a thin blue rim, at times to one side."""
    radius = scale * rng.uniform(0.29, 0.37)
    inner = radius * rng.uniform(0.82, 0.93)
    return Cell(
        body=frame.blob(rng, radius, stretch=rng.uniform(0.9, 1.1), wobble=0.07),
        nucleus=frame.blob(rng, inner, rng.normal(0, radius * 0.08, 2), rng.uniform(0.92, 1.08), 0.06),
        cytoplasm=BASOPHILIC,
        cytoplasm_amount=rng.uniform(0.55, 0.85),
        chromatin_amount=rng.uniform(1.0, 1.2),
        chromatin_grain=0.11,
        chromatin_contrast=0.16,
    )


def monocyte(rng: np.random.Generator, frame: Frame, scale: float) -> Cell:
    """Large; a folded or kidney-shaped nucleus of lacy chromatin, grey-blue cytoplasm with vacuoles."""
    radius = scale * rng.uniform(0.5, 0.62)
    inner = radius * rng.uniform(0.58, 0.68)
    kidney = frame.blob(rng, inner, (rng.uniform(0.05, 0.2) * radius, 0.0), rng.uniform(0.78, 0.9), 0.12)
    # The fold: a bite from one side, deep enough to make a kidney or a horseshoe.
    depth = rng.uniform(0.0, 0.3) * inner
    bite = frame.capsule((-1.2 * inner, rng.normal(0, 0.1) * inner), (-depth, rng.normal(0, 0.1) * inner), inner * 0.3)
    pale = [
        frame.canvas.coverage(frame.blob(rng, rng.uniform(0.025, 0.045), rng.uniform(-0.8, 0.8, 2) * radius))
        for _ in range(rng.integers(2, 7))
    ]
    return Cell(
        body=frame.blob(rng, radius, stretch=rng.uniform(0.9, 1.1), wobble=0.1),
        nucleus=np.minimum(kidney, -bite),
        cytoplasm=GREY_BLUE,
        cytoplasm_amount=rng.uniform(0.8, 1.2),
        chromatin_amount=rng.uniform(0.68, 0.88),
        chromatin_grain=0.08,
        chromatin_contrast=0.22,
        pale=pale,
    )


def neutrophil(rng: np.random.Generator, frame: Frame, scale: float) -> Cell:
    """Three to five dense lobes on an arc, joined by threads; pale pink cytoplasm with fine granules."""
    radius = scale * rng.uniform(0.40, 0.5)
    n = int(rng.integers(3, 6))
    lobe = radius * rng.uniform(0.24, 0.29) * (1.18, 1.05, 0.95)[n - 3]
    ring = radius * rng.uniform(0.42, 0.52)
    angles = np.cumsum(rng.uniform(1.05, 1.4, n)) * (1.0 if n < 5 else 0.85)
    places = [
        (ring * r * np.sin(a), ring * r * np.cos(a)) for a, r in zip(angles, rng.uniform(0.75, 1.2, n), strict=True)
    ]
    nucleus = frame.blob(rng, lobe, places[0], rng.uniform(0.85, 1.15), 0.12)
    for a, b in itertools.pairwise(places):
        nucleus = np.maximum(nucleus, frame.blob(rng, lobe * rng.uniform(0.8, 1.15), b, rng.uniform(0.85, 1.15), 0.12))
        nucleus = np.maximum(nucleus, frame.capsule(a, b, lobe * rng.uniform(0.15, 0.35)))
    return Cell(
        body=frame.blob(rng, radius, stretch=rng.uniform(0.92, 1.08), wobble=0.06),
        nucleus=nucleus,
        cytoplasm=PINK,
        cytoplasm_amount=rng.uniform(0.8, 1.3),
        chromatin_amount=rng.uniform(0.95, 1.15),
        chromatin_grain=0.10,
        chromatin_contrast=0.14,
        granules=[(frame.grains(rng, 0.06, 0.018, 0.7) * np.float32(0.16), AZURE, False)],
    )


def promyelocyte(rng: np.random.Generator, frame: Frame, scale: float) -> Cell:
    """Large; an oval nucleus to one side with a pale zone beside it, blue cytoplasm with purple granules, which lie
    over the nucleus too."""
    radius = scale * rng.uniform(0.54, 0.66)
    inner = radius * rng.uniform(0.56, 0.66)
    off = radius * rng.uniform(0.26, 0.38)
    hof = frame.canvas.coverage(frame.blob(rng, inner * 0.45, (-inner * 0.45, 0.0)), 0.15) * np.float32(0.55)
    nucleoli = [
        frame.canvas.coverage(frame.blob(rng, inner * rng.uniform(0.14, 0.2), (off, rng.uniform(-0.3, 0.3) * inner)))
        for _ in range(rng.integers(0, 3))
    ]
    return Cell(
        body=frame.blob(rng, radius, stretch=rng.uniform(0.9, 1.1), wobble=0.06),
        nucleus=frame.blob(rng, inner, (off, 0.0), rng.uniform(0.85, 0.97), 0.06),
        cytoplasm=BASOPHILIC,
        cytoplasm_amount=rng.uniform(0.6, 0.9),
        chromatin_amount=rng.uniform(0.68, 0.85),
        chromatin_grain=0.07,
        chromatin_contrast=0.14,
        granules=[
            (frame.grains(rng, 0.14, 0.027, 0.75) * np.float32(rng.uniform(0.6, 0.9)), AZURE, True) for _ in range(2)
        ],
        pale=[hof],
        nucleoli=nucleoli,
    )


def smudge(rng: np.random.Generator, frame: Frame, scale: float) -> Cell:
    """A cell past naming: crushed, its chromatin without structure, running out into its surroundings."""
    radius = scale * rng.uniform(0.3, 0.5)
    core = frame.blob(rng, radius * rng.uniform(0.75, 0.95), stretch=rng.uniform(0.75, 1.25), wobble=0.3)
    for _ in range(rng.integers(0, 3)):  # tails, drawn out by the smear
        end = rng.uniform(-1.3, 1.3, 2) * radius
        core = np.maximum(core, frame.capsule((0.0, 0.0), end, radius * rng.uniform(0.1, 0.25)))
    return Cell(
        body=np.maximum(frame.blob(rng, radius, wobble=0.25), core + 0.03),
        nucleus=core,
        cytoplasm=BASOPHILIC,
        cytoplasm_amount=rng.uniform(0.2, 0.8),
        chromatin_amount=rng.uniform(0.8, 1.3),
        chromatin_grain=0.3,
        chromatin_contrast=0.05,
    )


KINDS = {
    "BLA": blast,
    "EOS": eosinophil,
    "LYT": lymphocyte,
    "MON": monocyte,
    "NGS": neutrophil,
    "NIF": smudge,
    "PMO": promyelocyte,
}


def draw_cell(density: Density, rng: np.random.Generator, frame: Frame, cell: Cell, softness: float = 0.0) -> None:
    """Adds a cell, over what lies there."""
    canvas = frame.canvas
    body, nucleus = canvas.coverage(cell.body, softness), canvas.coverage(np.minimum(cell.nucleus, cell.body), softness)
    density.replace(body, 0.1)
    plasma = body * (1 - nucleus)
    for pale in cell.pale:
        plasma = plasma * (1 - pale * np.float32(0.8))
    texture = 1 + np.float32(0.12) * canvas.cloud(rng, 0.08) + np.float32(0.12) * canvas.cloud(rng, 0.3)
    density.add(plasma * texture * np.float32(cell.cytoplasm_amount), cell.cytoplasm)
    chromatin = 1 + np.float32(cell.chromatin_contrast) * canvas.cloud(rng, cell.chromatin_grain)
    for nucleolus in cell.nucleoli:
        chromatin = chromatin * (1 - nucleolus * np.float32(0.38))
    density.add(nucleus * np.clip(chromatin, 0.2, 2) * np.float32(cell.chromatin_amount), CHROMATIN)
    # Granules keep clear of the cell's very edge.
    inner = canvas.coverage(cell.body - np.float32(0.02))
    for layer, colour, over_nucleus in cell.granules:
        where = inner * (1 - nucleus * np.float32(0.55)) if over_nucleus else plasma * inner
        density.add(layer * where, colour)


def draw_surroundings(density: Density, rng: np.random.Generator, canvas: Canvas, radius: float) -> None:
    """Plasma, debris, red cells and parts of neighbours, about a place left free for the cell."""
    film = np.clip(0.06 + 0.05 * canvas.cloud(rng, 0.4) + 0.03 * canvas.cloud(rng, 0.06), 0, None)
    density.add(film * np.float32(rng.uniform(0.2, 1.5)), PINK if rng.random() < 0.5 else GREY_BLUE)
    whole = Frame.at(canvas, (0.0, 0.0), rng.uniform(0, 2 * np.pi))
    if rng.random() < 0.4:  # specks of stain
        density.add(whole.grains(rng, 0.16, 0.02, rng.uniform(0.02, 0.25)) * np.float32(0.5), AZURE)
    for _ in range(rng.integers(0, 6)):
        size, angle = rng.uniform(0.24, 0.34), rng.uniform(0, 2 * np.pi)
        away = radius + size * rng.uniform(0.7, 1.9)
        frame = Frame.at(canvas, (away * np.sin(angle), away * np.cos(angle)), rng.uniform(0, 2 * np.pi))
        disc = frame.blob(rng, size, stretch=rng.uniform(0.85, 1.15), wobble=0.06)
        # Discs dented in the middle: paler there.
        thickness = canvas.coverage(disc) * (
            1 - np.float32(0.45) * canvas.coverage(disc - np.float32(size * 0.55), 0.2)
        )
        density.add(thickness * np.float32(rng.uniform(0.6, 1.3)), RED_CELL)
    for _ in range(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))):
        size, angle = rng.uniform(0.28, 0.5), rng.uniform(0, 2 * np.pi)
        away = max(radius, 0.45) + size * rng.uniform(1.0, 1.3)
        frame = Frame.at(canvas, (away * np.sin(angle), away * np.cos(angle)), rng.uniform(0, 2 * np.pi))
        body = frame.blob(rng, size, stretch=rng.uniform(0.88, 1.12), wobble=0.08)
        cover = canvas.coverage(body)
        density.replace(cover, 0.3)
        density.add(cover * np.float32(rng.uniform(0.3, 1.0)), (BASOPHILIC, GREY_BLUE, PINK)[rng.integers(3)])
        inside = canvas.coverage(body - np.float32(size * rng.uniform(0.08, 0.35)))
        grain = 1 + np.float32(0.14) * canvas.cloud(rng, 0.09)
        density.add(inside * grain * np.float32(rng.uniform(0.7, 1.15)), CHROMATIN)
