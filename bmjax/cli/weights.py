"""The verbs of the command line that are about weight files: `bmjax weights ...`, and predicting ImageNet's classes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds `weights` and its own verbs to a parser's."""
    parser = verbs.add_parser("weights", help="list, fetch, port and verify weight files")
    parser.set_defaults(run=run)
    inner = parser.add_subparsers(dest="action", required=True)
    p = inner.add_parser("list", help="list the published files")
    p.add_argument("backbone", nargs="?", help="only those of one backbone")
    p = inner.add_parser("fetch", help="download a published file into the cache, and check it")
    p.add_argument("record", help="a record's name, as `bmjax weights list` prints it")
    p = inner.add_parser("port", help="turn a weight file into safetensors that carry their record")
    p.add_argument(
        "weights", help="a record's name, or the path of a file (.h5, .weights.h5, .keras, .safetensors, .pth)"
    )
    p.add_argument("out", help="the file to write, ending in .safetensors")
    p.add_argument("--backbone", help="the backbone that the file is of; needed with a path")
    p.add_argument("--preprocess", help="mode, where the file's training differed from its source's rule")
    p.add_argument(
        "--head",
        choices=("drop", "keep"),
        default="drop",
        help="of a fine-tuned model: leave its head out, or take its single dense layer as the top; default: drop",
    )
    p = inner.add_parser("verify", help="prove a file against its record, and against Keras where it is installed")
    p.add_argument("weights", help="a record's name, or the path of a file")
    p.add_argument("--backbone", help="the backbone that the file is of; needed with a path, but for ported files")
    p.add_argument("--record", help="name of the record to hold a path's file to")
    p.add_argument("--size", type=int, help="side of the test images in pixels; by default the record's")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": list_records,
        "fetch": fetch,
        "port": port,
        "verify": verify,
    }
    return actions[options.action](options)


def record_lines(backbone: str | None = None) -> list[str]:
    """A few words on each published file, those of one backbone where it is given."""
    from bmjax.environment import cache_folder
    from bmjax.weights.catalog import RECORDS

    def state(file_name: str) -> str:
        return "fetched" if (cache_folder() / "weights" / file_name).is_file() else "not fetched yet"

    return [
        f"{r.name:28} {r.parameters:,} values, {r.input_size} pixels, {r.preprocess}, {r.licence}, "
        f"{state(r.file_name)}\n{'':31}{r.checksum or 'no checksum published'}\n{'':31}{r.url}"
        for r in RECORDS
        if backbone in (None, r.backbone)
    ]


def list_records(options: argparse.Namespace) -> int:
    lines = record_lines(options.backbone)
    if not lines:
        from bmjax.registry import unknown
        from bmjax.weights.catalog import RECORDS

        raise unknown("backbone with published weights", options.backbone, {r.backbone for r in RECORDS})
    print(*lines, sep="\n")
    return 0


def _named(name: str) -> Any:
    """The catalog's record of that name, or None."""
    from bmjax.weights.catalog import RECORDS

    return next((record for record in RECORDS if record.name == name), None)


def fetch(options: argparse.Namespace) -> int:
    from bmjax.registry import unknown
    from bmjax.weights import catalog, download

    record = _named(options.record)
    if record is None:
        raise unknown("weight record", options.record, (r.name for r in catalog.RECORDS))
    print(download.fetch(record))
    return 0


def _file(options: argparse.Namespace) -> tuple[Path, str, Any]:
    """(path, backbone, record or None) of `options.weights`, fetched if need be."""
    from bmjax.weights import download
    from bmjax.weights.port import backbone_of

    record = _named(options.weights)
    if record is not None:
        return download.fetch(record), record.backbone, record
    path = Path(options.weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file, nor a record's name (`bmjax weights list`)")
    backbone = options.backbone or backbone_of(path)
    if backbone is None:
        raise ValueError(f"{path}: the file doesn't say which backbone it is of; give it as --backbone")
    return path, backbone, None


def port(options: argparse.Namespace) -> int:
    from bmjax.cli.output import check_out
    from bmjax.weights.port import port as port_weights

    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"the file to write is {options.out!r}; expected a name ending in .safetensors")
    check_out(out, what="the file to write")
    path, backbone, record = _file(options)
    check_out(out, [path], what="the file to write")
    ported = port_weights(path, backbone, out, record, preprocess=options.preprocess, head=options.head)
    print(f"{out}: {ported.parameters:,} values of {ported.backbone}, preprocessing {ported.preprocess}")
    return 0


def verify(options: argparse.Namespace) -> int:
    from bmjax.registry import unknown
    from bmjax.weights import catalog
    from bmjax.weights.verify import verify as verify_file

    path, backbone, record = _file(options)
    if options.record is not None:
        record = _named(options.record)
        if record is None:
            raise unknown("weight record", options.record, (r.name for r in catalog.RECORDS))
    print(*verify_file(path, backbone, record, size=options.size), sep="\n")
    return 0


def predict_imagenet(backbone: str, weights: str, paths: Sequence[Path], top: int) -> int:
    """Prints the likeliest `top` of ImageNet's classes for each image."""
    from bmjax.weights.imagenet import class_names, classify

    if not 1 <= top <= 1000:
        raise ValueError(f"--top is {top}; expected 1 to 1000")
    probabilities, record = classify(backbone, weights, paths)
    print(f"{record.name}: {record.input_size} pixels, preprocessing {record.preprocess}")
    for path, row in zip(paths, probabilities, strict=True):
        print(f"{path}:")
        for i in (-row).argsort(kind="stable")[:top]:
            print(f"  {row[i]:.4f}  {class_names()[i][1]}")
    return 0
