"""The code on the pages of docs/: fenced blocks, files named in their first line, and commands."""

import contextlib
import doctest
import io
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w/]+\.py)\n")


class Block(NamedTuple):
    """A fenced block: the words after the fence, its text, and the line it begins at."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(m[2].strip(), re.sub(f"^{m[1]}", "", m[3], flags=re.MULTILINE), text[: m.start()].count("\n") + 1)
        for m in _BLOCK.finditer(text)
    ]


def file_name(block: Block) -> str | None:
    """The file that a block of Python is, where its first line says so: `# poly.py`."""
    found = _FILE.match(block.text) if block.language == "python" else None
    return found[1] if found else None


def commands(page: Path) -> list[str]:
    """The lines of a page's plain blocks that call bmjax."""
    lines = (line for block in blocks(page) if block.language == "" for line in block.text.splitlines())
    return [line for line in lines if line.startswith("bmjax ")]


def write_files(page: Path, folder: Path) -> None:
    """Writes the files that a page shows."""
    for block in blocks(page):
        if name := file_name(block):
            (folder / name).write_text(block.text)


def run_blocks(page: Path, namespace: dict) -> str:
    """Runs a page's blocks of Python that are no file, in order, in one namespace; gives what they printed.

    A session with `>>>` is held to what it shows, up to white space and `...`.
    """
    printed = io.StringIO()
    for block in blocks(page):
        if block.language != "python" or file_name(block):
            continue
        place = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.text.startswith(">>> "):
            run_session(block.text, namespace, place)
        else:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
    return printed.getvalue()


def run_session(text: str, namespace: dict, place: str) -> None:
    """Runs an interactive session; raises an AssertionError that shows where it differs."""
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    test = doctest.DocTestParser().get_doctest(text, namespace, place, place, 0)
    runner, out = doctest.DocTestRunner(optionflags=flags), io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.run(test, out=out.write, clear_globs=False)
    namespace.update(test.globs)
    assert runner.failures == 0, out.getvalue()


@contextlib.contextmanager
def in_folder(folder: Path, monkeypatch):
    """Runs what is inside in a folder whose modules can be imported, and forgets them afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(folder)):
                del sys.modules[name]
