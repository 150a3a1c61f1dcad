"""The map is that of the code, tables list what there is, and the site builds without a warning or a broken link."""

import html.parser
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from tests.helpers import pages
from tests.test_floors import FLOORS, PACKAGE

ROOT, DOCS = pages.ROOT, pages.DOCS


def test_the_map_has_the_floors_of_the_code():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    shown = {int(floor): re.findall(r"`(\w+)`", rooms) for floor, rooms in rows}
    assert shown == dict(enumerate(FLOORS))


def test_files_that_pages_name_exist():
    """Paths of the package, tools, tests and experiments in single backticks, and the targets of links."""
    missing = []
    for page in pages.PAGES:
        text = page.read_text()
        named = re.findall(r"`((?:bmjax|tools|tests|experiments)/[\w/.]+)`", text)
        named += re.findall(r"python (tools/[\w/]+\.py)", text) + re.findall(r"(experiments/\w+\.py)", text)
        missing += [(page.name, name) for name in named if not (ROOT / name).exists() and "NAME" not in name]
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target and not (page.parent / target).exists():
                missing.append((page.name, target))
    assert missing == []


def test_the_maps_modules_exist():
    named = re.findall(
        r"`((?:layers|training|runs|analysis|model|data)/[\w/]+\.py)`", (DOCS / "architecture.md").read_text()
    )
    named += re.findall(r"(?:data|training|model|weights)/[\w/]+\.py", (DOCS / "architecture.svg").read_text())
    assert named
    assert [name for name in named if not (PACKAGE / name).is_file()] == []


def test_every_experiment_is_listed():
    text = (DOCS / "experiments.md").read_text()
    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "experiments").rglob("*.py"))]
    assert [path for path in found if path not in text] == []


class Page(html.parser.HTMLParser):
    """The links, pictures, style sheets and anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets, self.anchors = list[str](), set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CONTRIBUTING.md says."""
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module, reason='the site needs pip install -e ".[docs]"')
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


def test_the_site_has_no_broken_link(site):
    read = {path: Page(path) for path in site.rglob("*.html")}
    assert len(read) > 20
    broken = []
    for path, page in read.items():
        for target in page.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            fragment = urllib.parse.unquote(parts.fragment)
            if not file.exists() or (fragment and file in read and fragment not in read[file].anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


def test_the_site_works_offline(site):
    """Nothing is loaded from elsewhere, no machine's path is shown, and no package registry is named."""
    loads = re.compile(
        r"""<(?:script|img|iframe)[^>]+src=["']?(?:https?:)?//|<link[^>]+rel=["']stylesheet["'][^>]+//"""
    )
    fetched = re.compile(r"@import|url\([\"']?(?:https?:)?//")
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not loads.search(text), path
        assert not re.search(r"pypi|/(?:home|root|work)/|googleapis", text), path
    for path in site.rglob("*.css"):
        assert not fetched.search(path.read_text()), path
