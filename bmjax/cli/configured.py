"""What verbs share that take an experiment and overrides: their parser, their help by group, the configuration."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from bmjax.config.base import Config
from bmjax.config.experiment import load_experiment
from bmjax.config.override import field_docs, field_types, override
from bmjax.registry import unknown

Verb = Callable[[argparse.Namespace, Sequence[str]], int]
HELP = ("-h", "--help")


def add_configured(verbs: Any, name: str, text: str, run: Verb) -> argparse.ArgumentParser:
    """Adds a verb that takes an experiment and overrides of its fields."""
    # Abbreviations are off, and --help is left, so that what follows the experiment reaches the configuration.
    p = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="Any field of the configuration follows by its dotted name, as in --optim.lr 0.01; "
        f"`bmjax {name} EXPERIMENT --help GROUP` lists those of a group: {', '.join(groups())}.",
        usage=f"bmjax {name} EXPERIMENT [options] [--FIELD VALUE ...]",
        add_help=False,
        allow_abbrev=False,
    )
    p.add_argument("experiment", nargs="?", help="a Python file with config(), a config.json, or a run's folder")
    p.set_defaults(run=run, parser=p, configured=True)
    return p


def add_hosts(p: argparse.ArgumentParser) -> None:
    """Adds the options of a verb that several hosts run together (docs/scaling.md)."""
    p.add_argument("--hosts", type=int, metavar="N", help="processes that run this together; 1: ignore the cluster's")
    p.add_argument("--host", type=int, metavar="I", help="which of them this is, 0 to N - 1")
    p.add_argument("--coordinator", metavar="ADDRESS:PORT", help="host 0's address and a free port of it")


def groups() -> list[str]:
    """The groups of fields: the dataclasses that a Config holds, and "run" for its own."""
    return ["run", *dict.fromkeys(name.split(".")[0] for name in field_types(Config) if "." in name)]


def help_asked(words: Sequence[str]) -> str | None:
    """The group whose fields are asked for, "" for the verb's own help; None where no help is asked for."""
    at = next((i for i, word in enumerate(words) if word in HELP), None)
    if at is None:
        return None
    after = words[at + 1] if at + 1 < len(words) else ""
    return "" if after.startswith("-") else after


def print_fields(group: str, config: Config) -> None:
    """The fields of a group: name, type, value in `config`, and what they are.

    Raises:
      ValueError: there is no such group.
    """
    if group not in groups():
        raise unknown("group of fields", group, groups())
    docs, values = field_docs(Config), _values(config)
    for name, hint in field_types(Config).items():
        if (name.split(".")[0] if "." in name else "run") != group:
            continue
        kind = " | ".join(t.__name__ for t in typing.get_args(hint)) if type(hint).__name__ == "UnionType" else None
        kind = kind or (hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", ""))
        print(f"--{name}  {kind}  (here: {values.get(name, '')})")
        if docs.get(name):
            print(textwrap.indent(textwrap.fill(" ".join(docs[name].split()), 108), "    "))


def _values(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> value; of a tuple of dataclasses the first one's."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        first = value[0] if isinstance(value, tuple) and value else value
        if dataclasses.is_dataclass(first):
            found |= _values(first, f"{name}.")
        else:
            found[name] = repr(value)
    return found


def configuration(options: argparse.Namespace, rest: Sequence[str]) -> tuple[Config, ModuleType | None]:
    """The experiment's configuration with its overrides, and its module."""
    config, module = load_experiment(options.experiment)
    return override(config, rest, f"bmjax {options.verb} {options.experiment}"), module
