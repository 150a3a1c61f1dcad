"""Every command of README and docs is one that the command line takes, with fields that the configuration has."""

import re
import shlex

import pytest

from bmjax.cli.main import make_parser
from bmjax.config.experiment import load_experiment
from bmjax.config.override import override
from tests.helpers import pages

PLACEHOLDERS = {"RATE": "0.1", "P": "0.3", "UM": "0.1", "EXPERIMENT": "experiments/quickstart.py"}


def commands():
    """(page, words) of each line that calls bmjax, lines that go on joined, without brackets and comments."""
    found = []
    for page in pages.PAGES:
        text = re.sub(r" *\\\n\s*", " ", page.read_text())
        for line in re.findall(r"^ *(bmjax [a-z].*)$", text, re.MULTILINE):
            plain = re.sub(r" \| --\S+ \S+| \.\.\.|[\[\]]", "", line.split("  #")[0].split(" # ")[0])
            words = [PLACEHOLDERS.get(word, word.replace("stablehlo|onnx", "onnx")) for word in shlex.split(plain)]
            found.append(pytest.param(words[1:], id=f"{page.stem}: {line[:60]}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_it_is_taken(words, monkeypatch):
    monkeypatch.chdir(pages.ROOT)
    options, rest = make_parser().parse_known_args(words)
    if not getattr(options, "configured", False) and words[:2] != ["data", "audit"]:
        assert not rest
    elif str(options.experiment).startswith("experiments/"):
        config = override(load_experiment(options.experiment)[0], rest, "a page")
        if words[0] == "sweep":
            assert not config.train.final_test, "a sweep refuses it"
