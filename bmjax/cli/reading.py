"""The options on how images are read and when an answer is "don't know", which several verbs share."""

from __future__ import annotations

import argparse

from bmjax.cli.output import add_checkpoint


def add_reading(p: argparse.ArgumentParser) -> None:
    """The options on how images are read, which `eval` and `predict` share."""
    p.add_argument(
        "--views", type=int, choices=(1, 2, 4, 8), default=1, help="means over so many flips and right angles"
    )
    p.add_argument("--calibrated", action="store_true", help="by the calibration that `eval --calibrate` kept")
    p.add_argument("--match-colours", action="store_true", help="bring these images to the colours of training")
    p.add_argument("--adapt", action="store_true", help="estimate the norms' statistics on these images")
    p.add_argument("--adapt-prior", action="store_true", help="estimate the classes' frequencies on these images")
    add_pixel_size(p)
    p.add_argument("--error-rate", type=float, metavar="RATE", help="say don't know, so that so few answers are wrong")
    p.add_argument(
        "--unfamiliar",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="say don't know of images with features stranger than all but this share of validation's",
    )
    add_checkpoint(p)


def add_pixel_size(p: argparse.ArgumentParser) -> None:
    """The option on the scale of files, which all verbs share that read some."""
    p.add_argument("--pixel-size", type=float, metavar="UM",
                   help="micrometres to a pixel of these images, if not as in training")  # fmt: skip


def check_reading(options: argparse.Namespace) -> None:
    """Refuses rates and sizes that are none, before anything is read."""
    check_pixel_size(options)
    _check_rate(options)
    if not 0 <= options.unfamiliar < 1:
        raise ValueError(f"--unfamiliar is {options.unfamiliar}; expected a share from 0 to below 1, such as 0.02")
    if options.unfamiliar and options.error_rate is None:
        raise ValueError(f"--unfamiliar is {options.unfamiliar}; expected --error-rate beside it")


def adaptations(options: argparse.Namespace) -> tuple[bool, bool, bool]:
    """Whether colours, norms and frequencies are adapted."""
    return options.match_colours, options.adapt, options.adapt_prior


def add_threshold(p: argparse.ArgumentParser) -> None:
    """The options on when an answer is "don't know", which `differential`, `export` and `serve` share."""
    p.add_argument("--error-rate", type=float, metavar="RATE",
                   help='"don\'t know" below the probability at which validation keeps this error rate')  # fmt: skip
    p.add_argument("--undecided", type=float, metavar="P", help='"don\'t know" below this probability (default: 0.5)')


def check_threshold(options: argparse.Namespace) -> None:
    """Refuses thresholds that are none, before anything is read."""
    if options.error_rate is not None and options.undecided is not None:
        raise ValueError(f"--undecided is {options.undecided} beside --error-rate; expected one of them")
    _check_rate(options)
    if options.undecided is not None and not 0 <= options.undecided <= 1:
        raise ValueError(f"--undecided is {options.undecided}; expected a probability from 0 to 1, such as 0.5")


def check_pixel_size(options: argparse.Namespace) -> None:
    """Refuses a size that is none."""
    if options.pixel_size is not None and not 0 < options.pixel_size < 1000:
        raise ValueError(f"--pixel-size is {options.pixel_size}; expected micrometres to a pixel, such as 0.1")


def _check_rate(options: argparse.Namespace) -> None:
    if options.error_rate is not None and not 0 < options.error_rate < 1:
        raise ValueError(f"--error-rate is {options.error_rate}; expected a share between 0 and 1, such as 0.05")
