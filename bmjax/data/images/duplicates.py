"""Near duplicates: one photograph in two files, mirrored, turned, re-encoded, resized, brighter or darker.

Two steps. A description that none of these changes much, and the eight symmetries of a square not at all, finds each
image's nearest neighbours: the sizes of low frequencies (a perceptual hash without its rounding, after Zauner 2010).
Then each candidate pair is laid over each other in all eight ways, and their fine detail must correlate. Cells of one
class resemble each other in shape, but hardly in detail.

Not found: cuts, shifts and free rotations of an image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from bmjax.data.groups import connected

SIZE = 64  # pixels a side, of the images compared
FREQUENCIES = 12  # of 32, each way, in the description
NEIGHBOURS = 10  # candidates an image
MAX_DISTANCE = 0.5  # of the descriptions of a candidate pair, whose length is 1
# Correlations of detail, between those of copies and of different cells on real ones: tools/bench/bench_audit.py.
CERTAIN = 0.88
SUSPECTED = 0.8


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of images int [p], `first` < `second`, with the correlation of their detail, the closest pair first."""

    first: np.ndarray
    second: np.ndarray
    correlation: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.first, self.second, self.correlation

    def where(self, kept: np.ndarray) -> Pairs:
        """The pairs at places, or where a mask is true."""
        return Pairs(*(array[kept] for array in self.arrays))

    @property
    def certain(self) -> np.ndarray:
        """Which pairs are taken for copies, bool [p]; the others are worth a look."""
        return self.correlation >= CERTAIN


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Images uint8 [n, h, w, 3] -> grey uint8 [n, 64, 64], by Pillow's bilinear filter, an average where it shrinks."""
    out = np.empty((len(images), SIZE, SIZE), np.uint8)
    for i, image in enumerate(images):  # one at a time: the images may be a memory map larger than memory
        small = Image.fromarray(np.asarray(image)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)  # BOX is lopsided
        out[i] = np.asarray(small.convert("L"))
    return out


def _detail(grey: np.ndarray) -> np.ndarray:
    """Grey [n, s, s] less its blur, float32: without brightness, shading and the cell's coarse shape."""
    from scipy.ndimage import gaussian_filter

    grey = grey.astype(np.float32)
    return grey - gaussian_filter(grey, (0, 2, 2), mode="reflect")


def describe(grey: np.ndarray) -> np.ndarray:
    """Thumbnails [n, 64, 64] -> float32 [n, 156] of length 1, the same for an image mirrored or turned.

    A mirror changes the signs of the cosine transform's coefficients, and a quarter turn also swaps its axes: the sum
    and the difference of |C(u, v)| and |C(v, u)| stay.
    """
    from scipy.fft import dctn

    found = []
    for start in range(0, len(grey), 1024):
        part = grey[start : start + 1024].astype(np.float32)
        half = _detail(part.reshape(-1, SIZE // 2, 2, SIZE // 2, 2).mean((2, 4)))
        size = np.abs(np.asarray(dctn(half, axes=(1, 2), norm="ortho"))[:, :FREQUENCIES, :FREQUENCIES])
        u, v = np.triu_indices(FREQUENCIES)
        one, other = size[:, u, v], size[:, v, u]
        vector = np.concatenate([one + other, np.abs(one - other)], axis=1)
        found.append(vector / np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), 1e-3))
    return np.concatenate(found)


def _symmetries(images: np.ndarray) -> Iterator[np.ndarray]:
    """[n, s, s] in the eight ways to lay a square on itself."""
    for mirrored in (images, images[:, :, ::-1]):
        for turns in range(4):
            yield np.rot90(mirrored, turns, axes=(1, 2))


def _unit(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)


def correlate(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The highest correlation of detail of thumbnails [p, 64, 64] over the eight symmetries, [p]; 0 without detail."""
    one, other = _detail(one), _unit(_detail(other))
    return np.max([np.einsum("pi,pi->p", _unit(way), other) for way in _symmetries(one)], axis=0)


def _identical(grey: np.ndarray) -> Pairs:
    """Each thumbnail that an earlier one equals, with the last of those."""
    last: dict[bytes, int] = {}
    first, second = [], []
    for i, image in enumerate(grey):
        key = hashlib.sha256(image).digest()
        if key in last:
            first.append(last[key])
            second.append(i)
        last[key] = i
    return Pairs(np.array(first, np.int64), np.array(second, np.int64), np.ones(len(first), np.float32))


def _search(grey: np.ndarray, rows: np.ndarray, least: float) -> tuple[Pairs, bool]:
    """Pairs among some rows, and whether an image has more copies there than neighbours were looked at."""
    from sklearn.neighbors import NearestNeighbors

    n, neighbours = len(rows), min(NEIGHBOURS, len(rows) - 1)
    if neighbours < 1:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, np.zeros(0, np.float32)), False
    vectors = describe(grey[rows])
    # One more, for an image is its own neighbour; its own place need not be the first.
    distance, index = NearestNeighbors(n_neighbors=neighbours + 1, algorithm="brute").fit(vectors).kneighbors(vectors)
    one, place = np.nonzero((distance < MAX_DISTANCE) & (index != np.arange(n)[:, None]))
    both = np.unique(np.sort(np.stack([rows[one], rows[index[one, place]]], axis=1), axis=1), axis=0)
    correlation = np.zeros(len(both), np.float32)
    for start in range(0, len(both), 1024):
        part = both[start : start + 1024]
        correlation[start : start + 1024] = correlate(grey[part[:, 0]], grey[part[:, 1]])
    pairs = Pairs(both[:, 0], both[:, 1], correlation).where(correlation >= least)
    of_row = np.bincount(np.concatenate([pairs.first[pairs.certain], pairs.second[pairs.certain]]), minlength=1)
    return pairs, neighbours < n - 1 and bool(of_row.max() >= neighbours)


def find_pairs(grey: np.ndarray, least: float = SUSPECTED) -> Pairs:
    """Near duplicates among thumbnails uint8 [n, 64, 64], down to the correlation `least`: the suspected ones too.

    Each image is compared in detail with its nearest neighbours only, which scikit-learn finds in all n² pairs. Of many
    copies of one image not every pair is named, but `groups_of` has all in one group.
    """
    found = _identical(grey)
    while True:
        # One of each group: what is left to be found is between the groups.
        rows = np.unique(groups_of(len(grey), found.where(found.certain)), return_index=True)[1]
        pairs, more = _search(grey, rows, least)
        found = Pairs(*(np.concatenate(both) for both in zip(found.arrays, pairs.arrays, strict=True)))
        if not more:
            return found.where(np.argsort(-found.correlation, kind="stable"))


def groups_of(n: int, pairs: Pairs) -> np.ndarray:
    """The number of each of n images' group, int [n]: images that pairs connect, be it through others, share one."""
    return connected(n, pairs.first, pairs.second)
