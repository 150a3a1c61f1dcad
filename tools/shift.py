"""Shifted copies of a split, as another laboratory would give them, and what a run makes of them.

    python -m tools.shift RUN [RUN ...] [--split val] [--views 8] [--calibrated] [--out FOLDER]
    python -m tools.shift RUN [--kinds stain balance] [--match-colours] [--adapt]
    python -m tools.shift RUN --kinds none --unequal 10 [--adapt-prior]

prints accuracy and calibration by kind and strength, of the kinds that `--kinds` names, or of all. `--unequal 10`
leaves images out until the first class is ten times as frequent as the last, so that `--adapt-prior` has something to
find. `--out` writes the copies, FOLDER/<kind> <strength>/<class>/*.png, and a table of them, with their pixels' size
where the run knows a scale, for `bmjax eval RUN --on "FOLDER/<kind> <strength>/cells.csv"`. The copies are of images as
the run reads them:

- stain: the amount of haematoxylin times 1 + s and of eosin times 1 - s (Ruifrok and Johnston's colours);
- scale: the cell so many times as large; what is beyond the image's border is mirrored;
- defocus: a Gaussian whose deviation is this share of the side;
- brightness: every value times this;
- balance: red times 1 + this and blue times 1 - this, as another lamp or white balance gives;
- gamma: every value, as a share of 255, to this power;
- saturation: every pixel's distance from grey times this;
- jpeg: a JPEG of this quality, colours subsampled, as Pillow writes it;
- laboratory: all of these at once, drawn once for a laboratory of this number (`Laboratory.drawn`).

The middle strength of each kind is marked: the recipe is to keep 90 % of its accuracy there. Laboratories have no
order; the mean of their accuracies is printed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bmjax.analysis.evaluate.calibration import figures
from bmjax.analysis.evaluate.judge import Judge, Target, target_of_split
from bmjax.analysis.evaluate.reader import adapted_priors, at_priors, check_adaptable
from bmjax.cli.output import add_checkpoint
from bmjax.data.augment.colour import saturation
from bmjax.data.augment.optics import blur
from bmjax.data.images.decode import resize_images
from bmjax.data.images.stain import hed_jitter
from bmjax.runs.folder import load_run
from bmjax.runs.intervals import wilson_interval

# The middle strengths come second of three, second and third of four.
SHIFTS: dict[str, tuple[float, ...]] = {
    "stain": (0.05, 0.1, 0.2),
    "scale": (0.6, 0.8, 1.25, 1.6),
    "defocus": (0.005, 0.01, 0.02),
    "brightness": (0.7, 0.85, 1.15, 1.3),
    "balance": (0.05, 0.1, 0.2),
    "gamma": (0.7, 0.85, 1.15, 1.4),
    "saturation": (0.6, 0.8, 1.2, 1.5),
    "jpeg": (70, 40, 20),
    "laboratory": (1, 2, 3, 4, 5, 6),
}


def middle(kind: str) -> tuple[float, ...]:
    """The middle strengths of a kind; none of laboratories, which have no order."""
    return SHIFTS[kind][1:-1] if kind != "laboratory" else ()


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """What one laboratory does to every image: strengths by kind; `gains`: of the lamp in R, G and B."""

    stain: float
    scale: float
    gains: tuple[float, ...]
    defocus: float
    gamma: float
    saturation: float
    jpeg: int

    @classmethod
    def drawn(cls, number: int) -> Laboratory:
        """The laboratory of a number, at least 1. All are uniform, factors in their logarithm, up to between the middle
        and the strongest of each kind; ours. An even number's laboratory strays as far as the one before it, to the
        other side."""
        draw = np.random.default_rng([(number + 1) // 2, 2091]).uniform(-1, 1, 10) * (1 if number % 2 else -1)
        stain, scale, light, red, green, blue, defocus, gamma, saturation, jpeg = map(float, draw)
        gains = np.exp(0.2 * light + 0.15 * np.array([red, green, blue]))
        return cls(
            stain=0.15 * stain,
            scale=math.exp(0.4 * scale),
            gains=tuple(gains.tolist()),
            defocus=0.006 * (1 + defocus),
            gamma=math.exp(0.3 * gamma),
            saturation=math.exp(0.4 * saturation),
            jpeg=round(67.5 + 27.5 * jpeg),
        )

    def images(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, s, s, 3] as this laboratory has them: stain, lens, lamp, focus, camera, file."""
        images = shifted(shifted(images, "stain", self.stain), "scale", self.scale)
        images = np.clip((images * np.array(self.gains)).round(), 0, 255).astype(np.uint8)
        for kind in ("defocus", "gamma", "saturation", "jpeg"):
            images = shifted(images, kind, getattr(self, kind))
        return images


def _each(images: np.ndarray, change: Callable[[jax.Array], jax.Array]) -> np.ndarray:
    step = jax.jit(jax.vmap(change))
    parts = [np.asarray(step(part.astype(np.float32))) for part in np.array_split(images, max(1, len(images) // 64))]
    return np.clip(np.concatenate(parts).round(), 0, 255).astype(np.uint8)


def _as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def shifted(images: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """Images uint8 [n, s, s, 3] -> shifted copies of the same shape.

    Raises:
      ValueError: the kind is none of `SHIFTS`.
    """
    side = images.shape[1]
    if kind == "stain":
        scale = jnp.array([1 + strength, 1 - strength, 1], jnp.float32)
        return _each(images, lambda image: hed_jitter(image, scale, jnp.zeros(3, jnp.float32)))
    if kind == "scale":
        return np.stack(list(resize_images(images, side, side / strength)))
    if kind == "defocus":
        return _each(images, lambda image: blur(image, jnp.float32(strength * side), strength * side))
    if kind == "brightness":
        return np.clip((images * strength).round(), 0, 255).astype(np.uint8)
    if kind == "balance":
        return np.clip((images * np.array([1 + strength, 1, 1 - strength])).round(), 0, 255).astype(np.uint8)
    if kind == "gamma":
        return (255 * (images / 255) ** strength).round().astype(np.uint8)
    if kind == "saturation":
        return _each(images, lambda image: saturation(image, jnp.float32(strength)))
    if kind == "laboratory":
        return Laboratory.drawn(round(strength)).images(images)
    if kind == "jpeg":
        return np.stack([_as_jpeg(np.ascontiguousarray(image), round(strength)) for image in images])
    raise ValueError(f"shift {kind!r}; expected one of {', '.join(SHIFTS)}")


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one shift; `kept`: accuracy as a share of that without."""

    kind: str
    strength: float
    accuracy: float
    low: float
    high: float
    kept: float
    least_recall: float
    confidence: float
    ece: float
    nll: float


def unequal(target: Target, ratio: float, classes: Sequence[str]) -> Target:
    """Some of the images: the first class `ratio` times as frequent as the last, those between in equal steps of the
    logarithm; chosen by seed 0.

    Raises:
      ValueError: the ratio is not above 0, or a class has no image.
    """
    if not ratio > 0:
        raise ValueError(f"--unequal is {ratio:g}; expected a number > 0")
    counts = np.bincount(target.labels, minlength=len(classes))
    if empty := [name for name, n in zip(classes, counts, strict=True) if not n]:
        raise ValueError(f"--unequal: no image of {', '.join(empty)} in the split; expected some of each class")
    shares = ratio ** -np.linspace(0, 1, len(counts))
    wanted = np.maximum(np.floor(min(counts / shares) * shares + 1e-9).astype(int), 1)
    order = np.random.default_rng(0).permutation(len(target))
    kept = np.sort(np.concatenate([order[target.labels[order] == c][:n] for c, n in enumerate(wanted)]))
    parts = tuple((data, rows[kept]) for data, rows in target.parts)
    return Target(parts, target.labels[kept], tuple(target.ids[i] for i in kept))


def measure(
    judge: Judge,
    target: Target,
    kinds: Sequence[str] | None = None,
    *,
    match: bool = False,
    adapt: bool = False,
    adapt_prior: bool = False,
    out: Path | None = None,
) -> Iterator[Row]:
    """A row without a shift, then one for each shift of the kinds; None: of all."""
    plain = None
    plan = [
        ("none", 0.0),
        *((kind, strength) for kind in (SHIFTS if kinds is None else kinds) for strength in SHIFTS[kind]),
    ]
    source = judge.validation().probs.mean(0, dtype=np.float64) if adapt_prior else np.zeros(0)
    own = [reader.variables for reader in judge.readers]
    for kind, strength in plan:
        images = [data.images[rows] for data, rows in target.parts]
        if kind != "none":
            images = [shifted(part, kind, strength) for part in images]
        if out is not None:
            _write(out / f"{kind} {strength:g}", images[0], target, judge)
        for reader, variables in zip(judge.readers, own, strict=True):
            reader.variables, reader.colours = variables, None
        if match:
            judge.match_colours(images)
        if adapt:
            judge.adapt(images)
        probs = judge.images(images).probs
        if adapt_prior:
            probs = at_priors(probs, source, adapted_priors(probs, source))
        right = probs.argmax(1) == target.labels
        recalls = [right[target.labels == c].mean() for c in np.unique(target.labels)]
        plain = float(right.mean()) if plain is None else plain
        found = figures(target.labels, probs)
        yield Row(
            kind,
            strength,
            float(right.mean()),
            *wilson_interval(int(right.sum()), len(right)),
            kept=float(right.mean()) / max(plain, 1e-9),
            least_recall=float(min(recalls)),
            confidence=float(probs.max(1).mean()),
            ece=found["ece"],
            nll=found["nll"],
        )


def _write(folder: Path, images: np.ndarray, target: Target, judge: Judge) -> None:
    """Writes the copies, and cells.csv, by which the first run reads them as they are."""
    data, rows = judge.runs[0].config.data, []
    scale = {"pixel_size": data.field_size / data.image_size} if data.field_size else {}
    for i, (image, label) in enumerate(zip(images, target.labels, strict=True)):
        path = folder / judge.classes[int(label)] / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        rows.append({"path": path.relative_to(folder).as_posix(), "label": judge.classes[int(label)]} | scale)
    with (folder / "cells.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


HEADER = (
    "| shift | strength | accuracy, % (95 % interval) | of that without, % | least recall, % | mean confidence | ECE "
    "| NLL |\n|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A row as Markdown; middle strengths are bold."""
    strength = f"{row.strength:g}" if row.kind != "none" else ""
    if row.kind != "none" and row.strength in middle(row.kind):
        strength = f"**{strength}**"
    accuracy = f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
    cells = [row.kind, strength, accuracy, f"{100 * row.kept:.0f}", f"{100 * row.least_recall:.0f}"]
    cells += [f"{row.confidence:.2f}", f"{row.ece:.3f}", f"{row.nll:.2f}"]
    return f"| {' | '.join(cells)} |"


def check(judge: Judge, options: argparse.Namespace) -> None:
    """What can be known to be wrong before the split is opened.

    Raises:
      ValueError: an option asks for what the runs don't have, or is out of range.
    """
    if options.unequal is not None and not options.unequal > 0:
        raise ValueError(f"--unequal is {options.unequal:g}; expected a number > 0")
    if options.match_colours:
        judge.training_colours()
    if options.adapt_prior:
        judge.validation()
    for run in judge.runs if options.adapt else ():
        check_adaptable(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; several are averaged")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--views", type=int, choices=(1, 2, 4, 8), default=1)
    parser.add_argument("--kinds", nargs="+", choices=("none", *SHIFTS), default=list(SHIFTS), help="none: no shift")
    parser.add_argument("--unequal", type=float, metavar="R", help="the first class R times as frequent as the last")
    parser.add_argument("--match-colours", action="store_true", help="colours brought to the training's")
    parser.add_argument("--adapt", action="store_true", help="norms' statistics estimated on each shifted split")
    parser.add_argument("--adapt-prior", action="store_true", help="classes' frequencies estimated on it")
    parser.add_argument("--calibrated", action="store_true", help="by the calibration kept with the runs")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the copies here")
    parser.add_argument("--data.root", dest="data_root", metavar="FOLDER", help="where the runs' data are now")
    add_checkpoint(parser)
    options = parser.parse_args()
    runs = [load_run(run, options.which, trust=options.trust) for run in options.runs]
    if options.out is not None and (stain := runs[0].config.data.stain) != "none":
        raise ValueError(
            f"--out: {runs[0].run_dir} was trained with data.stain {stain!r}, and copies of its images would be "
            "normalised twice; expected a run without, or no --out"
        )
    judge = Judge(runs, views=options.views, calibrated=options.calibrated)
    check(judge, options)
    target = target_of_split(runs, options.split, options.data_root)
    if options.unequal is not None:
        target = unequal(target, options.unequal, judge.classes)
    print(f"{len(target)} images of the {options.split} split\n\n{HEADER}")
    worst, elsewhere = 1.0, []
    kinds = [kind for kind in options.kinds if kind != "none"]
    ways = {"match": options.match_colours, "adapt": options.adapt, "adapt_prior": options.adapt_prior}
    for row in measure(judge, target, kinds, **ways, out=options.out):
        print(line(row), flush=True)
        if row.kind != "none" and row.strength in middle(row.kind):
            worst = min(worst, row.kept)
        if row.kind == "laboratory":
            elsewhere.append(row.accuracy)
    if elsewhere:
        print(f"\nin {len(elsewhere)} laboratories the mean accuracy is {100 * np.mean(elsewhere):.1f} %")
    if any(middle(kind) for kind in kinds):
        print(f"\nat the middle strengths at least {100 * worst:.0f} % of the accuracy is kept (wanted: 90)")


if __name__ == "__main__":
    main()
