"""The command line: one module a verb."""

from bmjax.cli.main import main

__all__ = ["main"]
