"""What is wrong with a data set, before a network is trained on it: files, copies, splits, labels, shortcuts.

Each check gives findings. An error breaks what a result would claim: an image that stands on both sides of a split in
two files, or classes that are told by how their files were saved. A warning wants to be looked at.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bmjax.analysis.audit import shortcuts
from bmjax.analysis.audit.shortcuts import Shortcut
from bmjax.config.data import DataConfig
from bmjax.data.dataset import Dataset
from bmjax.data.groups import connected
from bmjax.data.images.duplicates import Pairs, find_pairs, groups_of, thumbnails
from bmjax.data.images.inspection import ENDINGS, FileFacts, inspect_files, metadata_features
from bmjax.data.load import list_source, load_dataset
from bmjax.data.splits import NAMES, Splits, kept_together, split_dataset

# Bounds of ours. A shortcut's are shares of the way from guessing to no error, for the interval's lower end.
SHORTCUT_WARNING, SHORTCUT_ERROR = 0.05, 0.5
FEW = 30  # test images of a class, below which its recall is hardly known: +- 0.18 at n = 30
SQUEEZED = 1.5  # the longer side over the shorter one
BLANK = 4.0  # grey levels: standard deviation of an image without a cell
ODD = 8.0  # median absolute deviations, scaled to standard deviations, from the median


@dataclasses.dataclass(frozen=True)
class Finding:
    """`images` are names of those it is about, the worst first."""

    level: Literal["error", "warning", "note"]
    subject: str
    text: str
    images: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LabelErrors:
    """Rows whose label is likely wrong, the likeliest first, with what a classifier of features says instead."""

    rows: np.ndarray
    probs: np.ndarray
    balanced_accuracy: float


@dataclasses.dataclass(frozen=True)
class Audit:
    """All that was found. `facts` are by row of `dataset`; `splits` is None where there can be none; `pairs` are near
    duplicates, `groups` int [n] the certain ones' groups. `laboratories` are by row, "" where one is unknown; none
    where the source names none. `medians` of colour and focus are by class, `medians_there` by laboratory."""

    config: DataConfig
    dataset: Dataset
    facts: list[FileFacts]
    splits: Splits | None
    pairs: Pairs
    groups: np.ndarray
    laboratories: tuple[str, ...]
    medians: dict[str, dict[str, float]]
    medians_there: dict[str, dict[str, float]]
    shortcuts: list[Shortcut]
    label_errors: LabelErrors | None
    findings: list[Finding]

    @property
    def broken(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.level == "error" for finding in self.findings)


def _count(n: int, one: str, several: str = "") -> str:
    """`1 image`, `2 images`."""
    return f"{n} {one if n == 1 else several or one + 's'}"


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def check_files(dataset: Dataset, facts: Sequence[FileFacts], strict: bool = False) -> list[Finding]:
    """Unreadable files, and those that are not what the others are."""
    found = []
    if dataset.skipped:
        names = tuple(path for path, _ in dataset.skipped)
        reasons = _some([f"{path} ({why})" for path, why in dataset.skipped])
        text = f"{_count(len(names), 'file')} can't be read and left out: {reasons}"
        found.append(Finding("error" if strict else "warning", "files", text, names))

    def add(chosen: Sequence[bool], noun: str, text: str) -> None:
        names = tuple(name for name, bad in zip(dataset.ids, chosen, strict=True) if bad)
        if names:
            found.append(Finding("warning", "files", f"{_count(len(names), noun)} {text}: {_some(names)}", names))

    size = dataset.images.shape[1]
    ended = [name.lower().endswith(tuple(e for ends in ENDINGS.values() for e in ends)) for name in dataset.ids]
    wrong = [
        has and not name.lower().endswith(ENDINGS[f.format])
        for has, name, f in zip(ended, dataset.ids, facts, strict=True)
    ]
    add(wrong, "file", "of another kind than the name says")
    add([f.frames > 1 for f in facts], "file", "with several frames, of which only the first counts")
    sides = [(min(f.width, f.height), max(f.width, f.height)) for f in facts]
    add([b > SQUEEZED * a for a, b in sides], "image", "far from square, to be squeezed")
    add([2 * a < size for a, _ in sides], "image", f"smaller than half of {size} pixels, to be enlarged")
    for what, values in (
        ("colour mode", [f.mode for f in facts]),
        ("format", [f.format for f in facts]),
        ("size", [f"{f.width}x{f.height}" for f in facts]),
    ):
        (usual, n), *others = Counter(values).most_common()
        if others and n >= 0.95 * len(values):  # where most agree, the others stand out
            add([v != usual for v in values], "image", f"of another {what} than the others' {usual}")
    return found


def check_pictures(dataset: Dataset, grey: np.ndarray) -> list[Finding]:
    """Images unlike the others, by their thumbnails: blank, or odd in brightness, contrast or sharpness."""
    found = []
    flat = grey.reshape(len(grey), -1)
    contrast = np.array([image.std() for image in flat])
    blank = contrast < BLANK
    if blank.any():
        names = tuple(dataset.ids[i] for i in np.flatnonzero(blank))
        found.append(
            Finding("warning", "images", f"{_count(len(names), 'image')} all but blank: {_some(names)}", names)
        )
    steps = np.array([np.abs(np.diff(image.astype(np.int16), axis=1)).mean() for image in grey])
    statistics = {"brightness": np.array([image.mean() for image in flat]), "contrast": contrast, "sharpness": steps}
    for name, values in statistics.items():
        spread = 1.4826 * np.median(np.abs(values - np.median(values)))
        far = np.abs(values - np.median(values)) / max(spread, 1e-6)
        order = np.argsort(-far, kind="stable")
        names = tuple(dataset.ids[i] for i in order if far[i] > ODD and not blank[i])
        if names and spread > 0:
            text = f"{_count(len(names), 'image')} of a {name} over {ODD:g} deviations from the others': {_some(names)}"
            found.append(Finding("warning", "images", text, names))
    return found


def check_classes(dataset: Dataset) -> list[Finding]:
    """How unequal the classes are."""
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    if counts[most] < 10 * counts[least]:
        return []
    text = f"{dataset.classes[most]} has {counts[most]} images, {dataset.classes[least]} {counts[least]}: "
    text += "look at macro F1 and balanced accuracy, and at train.sampling and train.class_weights"
    return [Finding("note", "classes", text)]


def _groups_with_several(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rows whose group holds more than one value, sorted by group."""
    pairs = np.unique(np.stack([groups, values], axis=1), axis=0)
    several = np.unique(pairs[1:, 0][pairs[1:, 0] == pairs[:-1, 0]])
    rows = np.flatnonzero(np.isin(groups, several))
    return rows[np.argsort(groups[rows], kind="stable")]


def check_copies(dataset: Dataset, pairs: Pairs, groups: np.ndarray) -> list[Finding]:
    """Copies within the data, and copies that carry different labels."""
    found = []
    copies = len(dataset) - len(set(dataset.hashes))
    if copies:
        times = Counter(dataset.hashes)
        names = tuple(n for n, h in zip(dataset.ids, dataset.hashes, strict=True) if times[h] > 1)
        text = f"{_count(copies, 'byte for byte copy', 'byte for byte copies')} of other images: {_some(names)}"
        found.append(Finding("warning", "copies", text, names))
    sizes = np.bincount(groups)
    near = np.flatnonzero(sizes[groups] > 1)
    if len(near):
        names = tuple(dataset.ids[i] for i in near[np.argsort(groups[near], kind="stable")])
        text = f"{len(near)} images that are copies or near duplicates, "
        text += f"in {_count(int((sizes > 1).sum()), 'group')}: "
        found.append(Finding("warning", "copies", text + _some(names), names))
    if suspected := len(pairs) - int(pairs.certain.sum()):
        found.append(Finding("note", "copies", f"{_count(suspected, 'further pair')} much alike; look at the pictures"))
    conflicts = _groups_with_several(groups, dataset.labels)
    if len(conflicts):
        names = tuple(dataset.ids[i] for i in conflicts)
        text = f"{len(names)} images whose copies or near duplicates are of another class: {_some(names)}"
        found.append(Finding("error", "labels", text, names))
    return found


def check_split(dataset: Dataset, config: DataConfig, groups: np.ndarray) -> tuple[Splits | None, list[Finding]]:
    """The split that a run would make, and what it tears apart."""
    try:
        splits = split_dataset(dataset, config)
    except ValueError as e:
        return None, [Finding("error", "split", str(e))]
    found = []
    side = np.zeros(len(dataset), np.int64)
    for k, name in enumerate(NAMES):
        side[getattr(splits, name)] = k
    known = "given" if dataset.sides or config.manifest else "made"
    _, by_hash = np.unique(dataset.hashes, return_inverse=True)
    relations = [("byte for byte copies", by_hash, "leave out all but one of each")]
    advice = "pass the near_duplicates.csv written here as --data.duplicates"
    if known == "given" or config.duplicates:
        advice = "leave out all but one of each"
    relations.append(("near duplicates", groups, advice))
    if dataset.groups:
        _, by_group = np.unique(dataset.groups, return_inverse=True)
        unknown = np.array([not group for group in dataset.groups])
        alone = by_group.max() + 1 + np.arange(len(dataset))  # an image without a group belongs to no one
        what = "images of one group (patient, slide)"
        relations.append((what, np.where(unknown, alone, by_group), "--data.split_by group keeps them together"))
    for what, numbers, advice in relations:
        torn = _groups_with_several(numbers, side)
        if len(torn):
            names = tuple(dataset.ids[i] for i in torn)
            text = f"{what} stand on several sides of the split that is {known}, {len(torn)} images in "
            text += f"{_count(len(np.unique(numbers[torn])), 'group')}: {_some(names)}; {advice}"
            found.append(Finding("error", "split", text, names))
    counts = np.bincount(dataset.labels[splits.test], minlength=len(dataset.classes))
    if few := [f"{name} ({n})" for name, n in zip(dataset.classes, counts, strict=True) if n < FEW]:
        text = f"{_count(len(few), 'class', 'classes')} with fewer than {FEW} test images, whose recall will hardly be "
        text += f"known: {_some(few, 8)}"
        found.append(Finding("warning", "split", text))
    return splits, found


def check_shortcuts(found: Sequence[Shortcut]) -> list[Finding]:
    """What classifiers reached that did not see the cell."""
    findings = []
    for s in found:
        if s.excess < SHORTCUT_WARNING:
            continue
        text = (
            f"{s.sees} tell the classes with balanced accuracy {s.balanced_accuracy:.3f} ({s.low:.3f} to {s.high:.3f}, "
        )
        text += f"n {s.n}), where guessing has {s.chance:.3f}"
        if s.told:
            text += f"; nearly without error {', '.join(s.told)}"
        level = "error" if s.told or s.excess >= SHORTCUT_ERROR else "warning"
        findings.append(Finding(level, "shortcuts", text))
    return findings


def find_shortcuts(
    dataset: Dataset, facts: Sequence[FileFacts], units: np.ndarray, laboratories: Sequence[str]
) -> tuple[list[Shortcut], dict, dict]:
    """(shortcuts, medians by class of the statistics of colour and focus, the same by laboratory), on a sample of the
    images."""
    rows = shortcuts.sample(dataset.labels)
    labels, some = dataset.labels[rows], [facts[i] for i in rows]
    # One at a time: the sample alone may be larger than memory.
    statistics = np.stack([shortcuts.image_statistics(dataset.images[i]) for i in rows])
    border = np.stack([shortcuts.border_features(dataset.images[i]) for i in rows])
    inputs = [
        ("border", "the outermost twelfth of the images alone", border),
        ("metadata", "formats, sizes in pixels and compression of the files alone", metadata_features(some)),
        ("length", "lengths of the files in bytes alone", np.array([[f.bytes] for f in some], np.float32)),
    ]
    there: dict[str, dict[str, float]] = {}
    if laboratories:
        names, numbers = np.unique(np.array(laboratories)[rows], return_inverse=True)
        inputs.append(("laboratory", "the laboratories' names alone", np.eye(len(names), dtype=np.float32)[numbers]))
        there = shortcuts.medians_by(statistics, numbers, names.tolist())
    found = [shortcuts.shortcut(name, sees, x, labels, units[rows], dataset.classes) for name, sees, x in inputs]
    return found, shortcuts.medians_by(statistics, labels, dataset.classes), there


def find_label_errors(dataset: Dataset, features: np.ndarray, units: np.ndarray) -> tuple[LabelErrors, list[Finding]]:
    """Labels that contradict out-of-fold predictions from a network's features [n, c]."""
    from bmjax.runs.confusion import balanced_accuracy, confusion_matrix

    k = len(dataset.classes)
    rows, probs = shortcuts.likely_label_errors(features, dataset.labels, units, k)
    score = float(balanced_accuracy(confusion_matrix(dataset.labels, probs.argmax(-1), k)))
    names = tuple(dataset.ids[i] for i in rows)
    text = f"{len(rows)} of {len(dataset)} labels are likely wrong, by a classifier of balanced accuracy {score:.3f}"
    found = [Finding("warning", "labels", f"{text}: {_some(names)}", names)] if len(rows) else []
    return LabelErrors(rows, probs, score), found


def audit(config: DataConfig, features: Any = None) -> Audit:
    """Looks at every image that a configuration names, and at the split that a run on it would make.

    `features` gives a network's features of a dataset, float [n, c], to search for wrong labels; None: no search.

    Raises:
      FileNotFoundError, ValueError: the data are not there or not as expected.
    """
    if config.source == "synthetic":
        raise ValueError("config field 'data.source' is 'synthetic'; expected images to audit, so set it and data.root")
    listing = list_source(config)
    every = dict(zip(listing.ids, inspect_files(listing), strict=True))
    lenient = dataclasses.replace(config, strict=False)  # what strict refuses is a finding here
    dataset = load_dataset(lenient)
    facts = [every[name] for name in dataset.ids]
    known = [f for f in facts if f is not None]
    if len(known) < len(facts):
        raise ValueError(f"{listing.origin}: files changed while they were read; expected them to stay")
    grey = thumbnails(dataset.images)
    pairs = find_pairs(grey)
    copies = groups_of(len(dataset), pairs.where(pairs.certain))
    findings = check_files(dataset, known, config.strict) + check_pictures(dataset, grey) + check_classes(dataset)
    findings += check_copies(dataset, pairs, copies)
    splits, found = check_split(dataset, lenient, copies)
    findings += found
    # What a run keeps together, and near duplicates: no classifier may see one and be asked for the other.
    units = copies if splits is None else _joined(kept_together(dataset, lenient), copies)
    # A source that names no laboratory, or the same one for all, says nothing by it.
    named = dict(zip(listing.ids, listing.laboratories, strict=True)) if len(set(listing.laboratories)) > 1 else {}
    laboratories = tuple(named[name] for name in dataset.ids) if named else ()
    reached, medians, there = find_shortcuts(dataset, known, units, laboratories)
    findings += check_shortcuts(reached)
    label_errors = None
    if features is not None:
        label_errors, found = find_label_errors(dataset, features(dataset), units)
        findings += found
    findings.sort(key=lambda f: ("error", "warning", "note").index(f.level))
    looked_at = (laboratories, medians, there, reached, label_errors, findings)
    return Audit(config, dataset, known, splits, pairs, copies, *looked_at)


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Numbers of groups that are equal where either of two numberings is, directly or through others."""
    shift = int(one.max()) + 1
    return connected(shift + int(other.max()) + 1, one, other + shift)[one]
