"""Every block of Python on a page runs, and every public name has an example on one."""

import collections
import importlib
import re

import pytest

from tests.helpers import pages

ROOMS = (
    "",
    "analysis",
    "attention",
    "backbones",
    "cli",
    "config",
    "data",
    "layers",
    "model",
    "runs",
    "training",
    "weights",
)
API = sorted((pages.DOCS / "api").glob("*.md"))
OWN_TEST = {pages.DOCS / "extending.md"}
PAGES = [p for p in pages.PAGES if p not in OWN_TEST and any(b.language == "python" for b in pages.blocks(p))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_its_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    pages.write_files(page, tmp_path)
    with pages.in_folder(tmp_path, monkeypatch):
        pages.run_blocks(page, {})


def public() -> dict[int, list[str]]:
    """Object -> its public names."""
    found = collections.defaultdict(list)
    for room in ROOMS:
        home = importlib.import_module(f"bmjax.{room}" if room else "bmjax")
        for name in home.__all__:
            found[id(getattr(home, name))].append(f"{home.__name__}.{name}")
    return found


def documented() -> dict[str, str]:
    """Dotted name of each entry of the reference -> the examples below it."""
    found = {}
    for page in API:
        for part in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
            name = re.search(r"^\.\. auto\w+:: ([\w.]+)$", part, re.MULTILINE)
            assert name, f"{page}: a section without a directive: {part.splitlines()[0]}"
            assert name[1] not in found, f"{name[1]} is there twice"
            found[name[1]] = "".join(re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL))
    return found


def test_every_public_name_is_in_the_reference_with_an_example():
    entries = documented()
    missing = {names[0] for names in public().values() if not set(names) & set(entries)}
    assert missing == set()
    assert [name for name, example in entries.items() if name.rpartition(".")[2] not in example] == []
    every = {name for names in public().values() for name in names}
    assert set(entries) - every == set()


def test_every_public_object_has_a_docstring():
    entries = documented()
    bare = []
    for name in entries:
        home, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(home), attribute)
        if getattr(found, "__module__", "").startswith("bmjax") and not (found.__doc__ or "").strip():
            bare.append(name)
    assert bare == []


def test_a_page_that_differs_is_told(tmp_path):
    with pytest.raises(AssertionError, match="Expected"):
        pages.run_session(">>> 1 + 1\n3\n", {}, "here")
