"""`bmjax completion`: a script that completes verbs and options in a shell, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds `completion` to a parser's verbs."""
    p = verbs.add_parser("completion", help="print a script that completes verbs and options in a shell")
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    p.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    try:
        import shtab  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ValueError("completion needs the library shtab; pip install 'bmjax[completion]'") from e
    print(shtab.complete(options.all_verbs, options.shell))
    return 0
