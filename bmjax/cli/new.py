"""`bmjax new`: writes a starting file of one's own, whose check passes."""

from __future__ import annotations

import argparse
import keyword
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from bmjax.cli.check import KINDS

_NEXT = {
    "attention": "bmjax train EXPERIMENT --model.attention {0}",
    "backbone": "bmjax train EXPERIMENT --model.backbone {0} --model.weights none",
    "head": "bmjax train EXPERIMENT --model.head {0}",
    "loss": "bmjax train EXPERIMENT --train.loss {0}",
    "metric": "bmjax train EXPERIMENT --train.metrics {0} --train.monitor {1}",
    "optimizer": "bmjax train EXPERIMENT --optim.name {0} --optim.lr 1e-3",
    "augmentation": "bmjax train EXPERIMENT --augment.extra {0}",
    "source": "bmjax train EXPERIMENT --data.source {0} --data.root FOLDER",
    "callback": "bmjax.train(config, callbacks=[{1}]), or on_event = {1} in an experiment",
}


def add_parser(verbs: Any) -> None:
    """Adds `new` to a parser's verbs."""
    p = verbs.add_parser("new", help="write a starting file")
    p.set_defaults(run=run)
    p.add_argument("kind", choices=(*KINDS, "experiment"))
    p.add_argument("name", help="the part's name, and the file's")
    text = "folder of the file; by default the current one, and for attention bmjax/attention, where the name alone "
    p.add_argument("--out", help=text + "finds it")


def written(kind: str, name: str, path: str) -> str:
    """The text of a starting file: the kind's template with NAME, CLASS and TITLE filled in; of an experiment the
    quickstart under another name."""
    template = resources.files("bmjax.cli") / "templates" / f"{kind}.py.txt"
    text = template.read_text(encoding="utf-8")
    if kind == "experiment":
        return text.replace("experiments/quickstart.py", path).replace('name="quickstart"', f'name="{name}"')
    words = name.split("_")
    for placeholder, value in (
        ("TITLE", " ".join(words).capitalize()),
        ("CLASS", "".join(w.capitalize() for w in words)),
        ("NAME", name),
    ):
        text = text.replace(placeholder, value)
    return text


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes a part that passes its check, or an experiment that trains, to be changed.

    Raises:
      ValueError: the name can't be a module's.
      FileExistsError: there is such a file already.
    """
    del rest
    kind, name = options.kind, options.name
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_") or name != name.lower():
        raise ValueError(f"name is {name!r}; expected a Python module's: lower-case letters, digits and underscores")
    inside = kind == "attention" and not options.out
    folder = Path(__file__).parents[1] / "attention" if inside else Path(options.out or ".")
    if not folder.is_dir():
        raise FileNotFoundError(f"--out is {options.out!r}; there is no such folder")
    path = folder / f"{name}.py"
    text = written(kind, name, str(path))
    with path.open("x", encoding="utf-8") as f:
        f.write(text)
    if kind == "experiment":
        print(f"{path}\nnext: bmjax train {path}")
        return 0
    known_as = name if inside else str(path)
    asked = "" if kind == "attention" else f"{kind} "
    print(f"{path}\nnext: bmjax check {asked}{known_as}\nthen: {_NEXT[kind].format(known_as, name)}")
    return 0
