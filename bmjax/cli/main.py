"""The command line: one module a verb, each adds its parser and says what runs. jax is imported by verbs that compute.

Exit status: 0 done; 1 a check or a claim failed; 2 wrong input, one line on standard error; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from bmjax import environment
from bmjax.cli import (
    check,
    compare,
    completion,
    data,
    differential,
    doctor,
    evaluate,
    explain,
    export,
    folds,
    names,
    new,
    predict,
    report,
    serve,
    show,
    study,
    sweep,
    train,
    weights,
)
from bmjax.cli.configured import help_asked, print_fields
from bmjax.config.experiment import load_experiment
from bmjax.files import printable
from bmjax.training.signals import Interrupted, Signals

VERBS = (
    train,
    sweep,
    folds,
    compare,
    show,
    evaluate,
    predict,
    report,
    differential,
    export,
    serve,
    names,
    weights,
    new,
    check,
    explain,
    study,
    data,
    doctor,
    completion,
)


_LISTS = ("paths", "images", "run_dirs", "models", "words")
"""Lists of runs, files or names, which argparse takes from one side of a verb's options alone."""


def make_parser() -> argparse.ArgumentParser:
    """The parser with all verbs."""
    parser = argparse.ArgumentParser(prog="bmjax", description="Classify bone-marrow cells with attention, in JAX.")
    parser.add_argument("--version", action="version", version=environment.version())
    verbs = parser.add_subparsers(dest="verb", required=True)
    for module in VERBS:
        module.add_parser(verbs)
    for p in [parser, *verbs.choices.values()]:
        p.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="say more, on errors too"
        )
        p.add_argument(
            "--deterministic", action="store_true", default=argparse.SUPPRESS, help="the same bits on GPUs too (slower)"
        )
        p.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="say only what went wrong")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    _set_logging(options)
    options.all_verbs = parser
    configured = getattr(options, "configured", False)
    asked = help_asked(rest) if configured else None
    if asked == "" or (asked is not None and options.experiment is None):
        options.parser.print_help()
        return 0
    if configured and options.experiment is None:
        options.parser.error(f"expected an experiment, as in: bmjax {options.verb} experiments/quickstart.py")
    if rest and not (configured or getattr(options, "takes_fields", False) or _taken(options, rest)):
        parser.error(f"{options.verb}: unrecognized arguments: {' '.join(rest)}")
    if getattr(options, "deterministic", False):
        environment.make_deterministic()
    verbose = getattr(options, "verbose", False) or bool(os.environ.get("BMJAX_DEBUG"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need be neither UTF-8 nor in the terminal's letters
            stream.reconfigure(errors="backslashreplace")
    with Signals():
        try:
            if asked:
                print_fields(asked, load_experiment(str(options.experiment))[0])
                return 0
            return _run(options, rest)
        except BrokenPipeError:  # who reads has seen enough, as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Interrupted as e:
            return e.code
        except KeyboardInterrupt:
            return 130
        except (ValueError, OSError, FloatingPointError) as e:
            if verbose:
                raise
            print(f"bmjax: {printable(e, lines=True)}", file=sys.stderr)
            return 2


def _taken(options: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Whether what is left after a verb's options are more of its runs or files, as in `predict RUN --adapt FOLDER`;
    then they are added to the others."""
    given = next((found for name in _LISTS if isinstance(found := getattr(options, name, None), list)), None)
    if given is None or any(word.startswith("-") for word in rest):
        return False
    given.extend(rest)
    return True


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs the verb; where it may run on several hosts, with them. Host 0 alone speaks."""
    if not hasattr(options, "hosts"):
        return options.run(options, rest)
    from bmjax.training import hosts

    hosts.join(options.hosts, options.host, options.coordinator)
    if not hosts.leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        logging.getLogger("bmjax").setLevel(logging.WARNING)
    code = options.run(options, rest)
    hosts.leave()
    return code


class _Printable(logging.Formatter):
    """Names of folders and classes are any text; none may steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def _set_logging(options: argparse.Namespace) -> None:
    level = logging.DEBUG if getattr(options, "verbose", False) else logging.INFO
    level = logging.WARNING if getattr(options, "quiet", False) else level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("bmjax").setLevel(level)
    environment.quiet_libraries()
