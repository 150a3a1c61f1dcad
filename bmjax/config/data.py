"""Where the cells come from, how they are split, and how training images are changed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from bmjax.config.checks import check, check_part, check_parts, check_types

SOURCES = ("synthetic", "folder", "table", "archive", "tfds", "huggingface", "arrays")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the cells come from and how they are split."""

    source: str = "synthetic"
    """What `root` is. `folder`: one folder of images per class. `table`: a CSV or parquet file of path, label, and
    where known split, group, pixel_size and laboratory. `archive`: a zip or tar of such a folder. `tfds`: what
    `bmjax data build` made. `huggingface`: what `datasets` saved to disk. `synthetic`: nothing; cells are rendered.
    `arrays`: images given from Python, `bmjax.train(config, data=...)`. One of yours, `module:name` or `path.py`: a
    function of `root` that gives a bmjax.Listing."""
    root: str = ""
    """The folder or file with the images (all sources but `synthetic`)."""
    image_size: int = 224
    """Images are resized to image_size x image_size pixels once, when the cache is built."""
    pixel_size: float = 0.0
    """Micrometres to a pixel of the files, those that a table gives with each image aside; 0: not known."""
    field_size: float = 0.0
    """Micrometres that the side of an image shows to the network: the square in the middle of each file, mirrored
    beyond its border, so that cells have one scale whatever the microscope; 0: the whole file, squeezed to a square."""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of train, validation and test. Of the last two one may be 0, or both: with 1 0 0 all images are trained
    on, the last epoch is kept, and nothing is reported."""
    split_seed: int = 0
    """Seed of the split, apart from the run's seed, so that runs over seeds share one split."""
    split_by: Literal["image", "group", "block"] = "image"
    """What stays on one side: copies of an `image`; a `group` of the source (patient, slide); a `block` of images of
    one class with neighbouring file numbers, which often are of one slide. Copies stay together in each."""
    block_size: int = 100
    """File numbers to a block."""
    stratify: bool = False
    """Each class has its exact shares, where by default it has them up to chance. Added files then move a few others
    unless `manifest` holds them."""
    folds: int = 0
    """Cross-validation: the number of folds, of which `fold` is the test split and `split`'s first two shares divide
    the rest; 0: none. Repeats are further values of `split_seed`."""
    fold: int = 0
    """The fold that is the test split, from 0."""
    duplicates: str = ""
    """A CSV of path and group: images of one group are near duplicates and stay on one side."""
    manifest: str = ""
    """The split.csv of an earlier run: what it names keeps its side; only other images are assigned."""
    stain: Literal["none", "reinhard", "macenko"] = "none"
    """Normalisation of every image's stain, when it is read."""
    stain_reference: tuple[float, ...] = ()
    """What to normalise to, 6 numbers for `reinhard` or 8 for `macenko`, as `bmjax data stain FOLDER` prints them;
    empty: those of the marrow collection."""
    match_colours: bool = False
    """Each laboratory's images (a table's column `laboratory`) are brought to the colours of all laboratories when they
    are read, by one gain and power of each channel. Images of another laboratory are brought to those of training by
    `--match-colours` of `bmjax predict` and `bmjax eval --on`. Arrays given from Python are taken as they are."""
    strict: bool = False
    """An unreadable image is an error instead of a line in the summary, and so is a given split that tears copies
    apart."""
    cache_dir: str = ""
    """Folder of the decoded-image cache; empty: the user's cache folder (BMJAX_CACHE or ~/.cache/bmjax)."""
    synthetic_per_class: int = 100
    """Cells rendered per class (source `synthetic`)."""

    def field_pixels(self, pixel_size: float = 0.0) -> float | None:
        """The side of the field in pixels of a file, of `pixel_size` or else the configured one; None: the whole file.

        Raises:
          ValueError: the pixels' size is not known.
        """
        if not self.field_size:
            return None
        if not (size := pixel_size or self.pixel_size):
            raise ValueError(
                f"config field 'data.field_size' is {self.field_size:g}, and the pixels' size is not known; expected "
                "data.pixel_size, a table's column pixel_size, or for other images --pixel-size"
            )
        return self.field_size / size

    def __post_init__(self) -> None:
        check_part(self, "source", "data.source", SOURCES)
        check_types(self, "data.")
        check(self.image_size >= 16, "data.image_size", self.image_size, "at least 16 pixels")
        ok = len(self.split) == 3 and self.split[0] > 0 and all(s >= 0 for s in self.split)
        ok = ok and math.isclose(sum(self.split), 1.0, abs_tol=1e-6)
        check(ok, "data.split", self.split, "three shares, the first > 0, the others >= 0, sum 1")
        check(self.pixel_size >= 0, "data.pixel_size", self.pixel_size, "micrometres, or 0")
        check(self.field_size >= 0, "data.field_size", self.field_size, "micrometres, or 0")
        check(self.block_size >= 1, "data.block_size", self.block_size, "at least 1")
        check(self.folds == 0 or self.folds >= 2, "data.folds", self.folds, "0 or at least 2")
        check(0 <= self.fold < max(self.folds, 1), "data.fold", self.fold, f"0 to {max(self.folds, 1) - 1}")
        numbers = {"none": 0, "reinhard": 6, "macenko": 8}[self.stain]
        expected = f"{numbers} numbers for stain {self.stain!r}, or none"
        ok = len(self.stain_reference) in (0, numbers)
        check(ok, "data.stain_reference", self.stain_reference, expected)
        ok = not self.match_colours or self.source != "synthetic"
        check(ok, "data.match_colours", self.match_colours, "False for rendered cells")
        check(self.synthetic_per_class >= 2, "data.synthetic_per_class", self.synthetic_per_class, "at least 2")


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "other_laboratory": {
        "hed": 0.05, "balance": 0.15, "gamma": 0.2, "saturation": 0.3, "brightness": 0.1, "contrast": 0.2, "hue": 0.02,
        "zoom": 0.35, "blur": 0.008, "jpeg": 40,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images, on the device; zero or False switches one off."""

    preset: Literal["none", "other_laboratory"] = "none"
    """`other_laboratory`: stain, lamp, camera, scale, focus and JPEG's loss vary as between laboratories (hed 0.05,
    balance 0.15, gamma 0.2, saturation 0.3, brightness 0.1, contrast 0.2, hue 0.02, zoom 0.35, blur 0.008, jpeg 40); a
    field that is set beside it, to another number than 0, counts instead."""
    flip: bool = True
    """Mirror left-right and up-down, each with probability one half."""
    right_angles: bool = True
    """Rotate by 0, 90, 180 or 270 degrees, equally likely."""
    rotate: float = 0.0
    """Free rotation, uniform in +- this many degrees."""
    shift: float = 0.0
    """Shift, uniform in +- this share of the side."""
    zoom: float = 0.0
    """Zoom factor, uniform in 1 +- this."""
    brightness: float = 0.0
    """Added brightness, uniform in +- this share of 255."""
    contrast: float = 0.0
    """Contrast factor about the image mean, uniform in 1 +- this."""
    hue: float = 0.0
    """Hue rotation, uniform in +- this share of the full circle."""
    balance: float = 0.0
    """The lamp's balance: a gain of each channel, uniform in 1 +- this."""
    gamma: float = 0.0
    """The camera's gamma: an exponent whose logarithm is uniform in +- this."""
    saturation: float = 0.0
    """Saturation factor, uniform in 1 +- this."""
    hed: float = 0.0
    """Stain jitter: the amounts of haematoxylin, eosin and DAB times 1 +- this, plus +- this optical
    density."""
    blur: float = 0.0
    """Defocus, with probability one half: a Gaussian of a deviation uniform in 0 to this share of the side."""
    jpeg: int = 0
    """JPEG's loss, with probability one half: quality uniform in this to 100; 0 is off."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Random operations, before all others. `randaugment`: `policy_operations` of them at `policy_magnitude`;
    `trivialaugment`: one, at any strength."""
    policy_operations: int = 2
    """randaugment: operations in a row."""
    policy_magnitude: int = 9
    """randaugment: strength, 0..30."""
    erase: float = 0.0
    """Random erasing: the probability that a rectangle is filled with noise."""
    mixup: float = 0.0
    """alpha of mixup: images and labels are mixed with others' of the batch, shares drawn from Beta(alpha, alpha)."""
    cutmix: float = 0.0
    """alpha of cutmix, as mixup's; with both, each image is mixed by one of them, half and half."""
    extra: tuple[str, ...] = ()
    """Augmentations of yours, after all others: `module:name` or `path.py` of a pure function of (image [h, w, 3],
    key) that gives an image of that shape."""

    def resolved(self) -> AugmentConfig:
        """With the preset's values in the fields that are off, and no preset."""
        values = {name: value for name, value in PRESETS[self.preset].items() if not getattr(self, name)}
        return dataclasses.replace(self, preset="none", **values)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of the batch."""
        return bool(self.mixup or self.cutmix)

    def __post_init__(self) -> None:
        check_parts(self, "extra", "augment.extra")
        check_types(self, "augment.")
        for name in (
            "rotate",
            "shift",
            "zoom",
            "brightness",
            "contrast",
            "hue",
            "balance",
            "gamma",
            "saturation",
            "hed",
            "blur",
            "erase",
            "mixup",
            "cutmix",
        ):
            check(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "a number >= 0")
        for name in ("brightness", "contrast", "shift", "hed"):
            check(getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "a share, at most 1")
        check(self.hue <= 0.5, "augment.hue", self.hue, "a share of the circle of colours, at most 0.5")
        check(self.erase <= 1, "augment.erase", self.erase, "a probability, 0..1")
        check(self.policy_operations >= 1, "augment.policy_operations", self.policy_operations, "at least 1")
        check(0 <= self.policy_magnitude <= 30, "augment.policy_magnitude", self.policy_magnitude, "0..30")
        for name in ("balance", "saturation"):
            check(getattr(self, name) < 1, f"augment.{name}", getattr(self, name), "a number < 1")
        check(self.gamma <= 2, "augment.gamma", self.gamma, "at most 2: an exponent of 7.4")
        check(self.zoom < 1, "augment.zoom", self.zoom, "a number < 1")
        check(self.blur <= 0.1, "augment.blur", self.blur, "a share of the side, at most 0.1")
        check(0 <= self.jpeg <= 100, "augment.jpeg", self.jpeg, "a quality, 1..100, or 0")
