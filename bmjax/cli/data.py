"""The verbs of the command line that are about data: `bmjax data ...`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.config.experiment import load_experiment
from bmjax.config.override import override
from bmjax.files import printable

MOST_PIXELS = 4096
"""The side that `bmjax data stain` resizes to at most: it holds all images at once."""


def add_parser(verbs: Any) -> None:
    """Adds `data` and its own verbs to a parser's."""
    parser = verbs.add_parser("data", help="build published data sets, or examine your own")
    parser.set_defaults(run=run)
    inner = parser.add_subparsers(dest="action", required=True)
    p = inner.add_parser("build", help="write a published data set as array_record, for --data.source tfds")
    p.add_argument("name", choices=("bm_cytomorphology", "bloodmnist"))
    p.add_argument("--config", help="all (default) or seven; px28 (default), px64, px128 or px224; or a name of yours")
    p.add_argument(
        "--classes",
        nargs="+",
        metavar="ABBREVIATION[=CLASS]",
        help="bm_cytomorphology: only these, grouped by the classes named; --config is then a name of yours",
    )
    p.add_argument("--from", dest="source", metavar="FOLDER", help="bm_cytomorphology: where it was unpacked")
    p.add_argument("--partial", action="store_true", help="bm_cytomorphology: take what is there of the collection")
    p.add_argument("--out", help="folder to write into; by default tfds in the user's cache folder")
    p.add_argument("--downloads", help="bloodmnist: folder of downloads; by default downloads in --out")
    p = inner.add_parser(
        "audit",
        help="examine images, labels and split before training on them",
        usage="bmjax data audit EXPERIMENT [options] [--FIELD VALUE ...]",
        description="Examines the images that an experiment would train on, their labels and their split: unreadable "
        "and odd files, copies and near duplicates, conflicting labels, shortcuts. Exits with 1 if a finding breaks a "
        "claim.",
        epilog="Any field of the configuration follows by its dotted name, as in --data.root FOLDER.",
        allow_abbrev=False,
    )
    p.add_argument("experiment", help="a Python file with config(), a config.json, or a run's folder")
    p.set_defaults(run=audit, takes_fields=True)
    p.add_argument("--out", default="audit", help="folder of audit.html, audit.json, ... (default: %(default)s)")
    p.add_argument(
        "--features",
        action="store_true",
        help="look for wrong labels too, with the features of the experiment's backbone (needs bmjax[audit])",
    )
    p = inner.add_parser("stain", help="print what --data.stain is to normalise to, by images of yours")
    p.add_argument("paths", nargs="+", help="images, or folders of images")
    p.add_argument("--size", type=int, default=224, help="they are resized to so many pixels (default: %(default)s)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    return {"build": build, "stain": stain}[options.action](options)


def stain(options: argparse.Namespace) -> int:
    """Prints the references of each method of normalisation that images amount to, as flags."""
    from bmjax.data.images.decode import decode_files
    from bmjax.data.images.stain import METHODS, statistics
    from bmjax.data.sources.folder import image_files

    if not 1 <= options.size <= MOST_PIXELS:
        raise ValueError(f"--size is {options.size}; expected 1 to {MOST_PIXELS} pixels")
    paths = image_files(options.paths)
    read = list(decode_files(paths, options.size))
    images = [image for image in read if not isinstance(image, str)]
    for path, reason in zip(paths, read, strict=True):
        if isinstance(reason, str):
            print(f"  {printable(path)}: {printable(reason)}", file=sys.stderr)
    if not images:
        raise ValueError(f"none of {len(paths)} images can be read; expected some")
    print(f"medians over {len(images)} images:")
    for name in METHODS:
        print(f"--data.stain {name} --data.stain_reference {' '.join(map(str, statistics(images, name)))}")
    return 0


def audit(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes the audit of what an experiment would train on; 1 if a claim is broken."""
    config, _ = load_experiment(options.experiment)
    config = override(config, rest, f"bmjax data audit {options.experiment}")
    if (out := Path(options.out)).exists() and not out.is_dir():
        raise NotADirectoryError(f"--out is {options.out!r}, which is a file; expected a folder to write into")

    from bmjax.analysis.audit.checks import audit as examine
    from bmjax.analysis.audit.page import write_audit
    from bmjax.training.features import pooled_features

    found = examine(config.data, (lambda dataset: pooled_features(config, dataset)) if options.features else None)
    for finding in found.findings:
        print(f"{finding.level:7} {finding.subject}: {finding.text}")
    path = write_audit(found, options.out)
    print(f"{len(found.dataset)} images in {len(found.dataset.classes)} classes; report: {path}")
    return int(found.broken)


def parse_mapping(words: Sequence[str]) -> dict[str, str]:
    """["NGB=neutrophil", "BLA"] -> {"NGB": "neutrophil", "BLA": "BLA"}.

    Raises:
      ValueError: an abbreviation stands twice or alone before its sign.
    """
    mapping: dict[str, str] = {}
    for word in words:
        abbreviation, equals, name = word.partition("=")
        if abbreviation in mapping or not abbreviation or (equals and not name):
            raise ValueError(f"--classes has {word!r}; expected each abbreviation once, as in NGB=neutrophil or BLA")
        mapping[abbreviation] = name or abbreviation
    return mapping


def _marrow_config(options: argparse.Namespace) -> Any:
    from bmjax.data.builders.bm_cytomorphology import BmCytomorphology, CytomorphologyConfig
    from bmjax.registry import unknown

    known = {config.name: config for config in BmCytomorphology.BUILDER_CONFIGS}
    name = options.config or ("" if options.classes else "all")
    if options.classes:
        if not name or name in known:
            raise ValueError(f"--config is {name!r}; expected a name of yours for --classes, other than all and seven")
        mapping = parse_mapping(options.classes)
        config = CytomorphologyConfig(name=name, description=" ".join(options.classes), mapping=mapping)
    elif name in known:
        config = known[name]
    else:
        raise unknown("config of bm_cytomorphology", name, known)
    # A part goes by another name, so that nothing takes it for the collection.
    return dataclasses.replace(config, name=f"{name}_partial", complete=False) if options.partial else config


def build(options: argparse.Namespace) -> int:
    from bmjax.environment import cache_folder

    out = Path(options.out) if options.out else cache_folder() / "tfds"
    if options.name == "bm_cytomorphology" and (not options.source or not Path(options.source).is_dir()):
        raise FileNotFoundError(f"--from is {options.source!r}; expected the folder where the collection was unpacked")

    import tensorflow_datasets as tfds

    if options.name == "bm_cytomorphology":
        from bmjax.data.builders.bm_cytomorphology import BmCytomorphology

        builder: Any = BmCytomorphology(data_dir=out, config=_marrow_config(options))
    else:
        from bmjax.data.builders.bloodmnist import Bloodmnist

        builder = Bloodmnist(data_dir=out, config=options.config or "px28")
    if Path(builder.data_dir).exists():
        raise FileExistsError(f"{builder.data_dir} is built already; expected none there: delete it to build it again")
    builder.download_and_prepare(
        download_dir=options.downloads or out / "downloads",
        download_config=tfds.download.DownloadConfig(manual_dir=options.source),
        file_format="array_record",
    )
    splits = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    print(f"{builder.data_dir}: {splits} images in {builder.info.features['label'].num_classes} classes")
    print(f"To train on it: bmjax train EXPERIMENT --data.source tfds --data.root {builder.data_dir}")
    return 0
