"""Fields of a configuration set by their dotted names, on the command line or from Python."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from bmjax.config.base import Config, from_json, to_json
from bmjax.config.checks import as_json
from bmjax.registry import unknown

# A dataclass that may also be given by the name of a part of one's own, and the field that takes the name.
_BY_NAME = {"model.head": "model.head.name"}
_WORDS = {"none": "None", "null": "None", "true": "True", "false": "False"}


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field below a dataclass; a tuple of dataclasses stands without its index."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if isinstance(inner, type):
            found |= field_types(inner, f"{name}.")
        else:
            found[name] = hint
    return found


def field_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Dotted name -> the text below the field in its class, of every field below a dataclass."""
    found: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, after in itertools.zip_longest(body.body, body.body[1:]):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        hint = hints[node.target.id]
        inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if isinstance(inner, type):
            found |= field_docs(inner, f"{prefix}{node.target.id}.")
        elif isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[prefix + node.target.id] = str(after.value.value)
    return found


def _spoken(arguments: Sequence[str]) -> list[str]:
    """Arguments with `none`, `true` and `false` as Python writes them, where the field takes such values."""
    hints, words = field_types(Config), list(arguments)
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        flag, equals, value = word[2:].partition("=")
        if (field := _BY_NAME.get(flag)) is not None:
            words[i], flag = f"--{field}{equals}{value}", field
        name = ".".join(p for p in flag.replace("-", "_").split(".") if not p.isdigit())
        hint = hints.get(name)
        options = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        known = {"None"} if types.NoneType in options else set()
        known |= {"True", "False"} if bool in options else set()
        at = i if equals else i + 1
        if not equals and at < len(words):
            value = words[at]
        spoken = _WORDS.get(value.lower())
        if spoken is not None and spoken in known:
            words[at] = f"--{flag}={spoken}" if equals else spoken
    return words


def _literal(text: str) -> Any:
    """A list or a dict as JSON or Python writes it; None where the text is neither, or is no such value."""
    if text[:1] not in ("[", "{", "("):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value
    return None


def _leaves(name: str, value: Any, hints: dict[str, Any]) -> dict[str, Any]:
    """Dotted field -> value, of a value that stands for a group of fields: {"lr": 0.1} for `optim`."""
    plain = ".".join(part for part in name.split(".") if not part.isdigit())
    inner = dict(enumerate(value)) if isinstance(value, list) and plain not in hints else value
    if not isinstance(inner, dict) or plain in hints:
        return {name: value}
    return {k: v for key, one in inner.items() for k, v in _leaves(f"{name}.{key}", one, hints).items()}


def _structured(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Fields whose value is written as one list or dict, and the other arguments.

    So do agents of W&B's sweeps call a program: --model.head.widths=[64, 32] --optim={'name': 'sgd', 'lr': 0.1}.
    """
    hints = field_types(Config)
    found: dict[str, Any] = {}
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        plain = ".".join(part for part in name.split(".") if not part.isdigit())
        known = any(field == plain or field.startswith(f"{plain}.") for field in hints)
        is_dict, value = typing.get_origin(hints.get(plain)) is dict, None
        if word.startswith("--") and known and hints.get(plain) is not str:
            value = as_json(name, _literal(text if equals else (words or [""])[0]))
        if value is None or (is_dict and not isinstance(value, dict)):
            rest.append(word)
            continue
        if not equals:
            words.pop(0)
        if is_dict:  # options are checked with what they are options of, which may be another argument
            rest += [flag, json.dumps(value)]
        else:
            found |= _leaves(name, value, hints)
    return found, rest


def override(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """The configuration with fields set by their dotted names: `--optim.lr 0.1 --stages.0.epochs 5`.

    Types are checked; an unknown or wrong argument exits with status 2 and a suggestion. A list or a dict may be given
    as one word, as JSON or Python writes it; a dict of fields sets those of its group.

    Raises:
      ValueError: a value is out of range, or of no form that a run's record can hold; names the field.
    """
    structured, arguments = _structured(arguments)
    config = changed(config, structured) if structured else config
    registry = tyro.constructors.ConstructorRegistry()

    def parse(words: list[str]) -> dict[str, Any]:
        try:
            value = json.loads(words[0])
        except RecursionError as e:
            raise ValueError("too many brackets within each other") from e
        if not isinstance(value, dict):
            raise ValueError(f"{words[0]!r} is no JSON object")
        return value

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if typing.get_origin(info.type) is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    # Every field is a plain flag: no sub-commands for optional values, no True/False pairs of flags.
    flags = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(Config, default=config, args=_spoken(arguments), prog=prog, config=flags, registry=registry)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with fields set by their dotted names: {"optim.lr": 0.1, "stages.0.epochs": 5}.

    Raises:
      ValueError: no such field, or a value of the wrong type or out of range; names it.
    """
    tree: Any = json.loads(to_json(config))
    for name, value in changes.items():
        if not isinstance(name, str):
            raise ValueError(f"a field to change is {name!r}; expected its name, such as 'optim.lr'")
        value = as_json(name, value)
        name = _BY_NAME.get(name, name) if isinstance(value, str) else name
        holder: Any = None
        key: Any = None
        node: Any = tree
        for part in name.split("."):
            known = [str(i) for i in range(len(node))] if isinstance(node, list) else list(node)
            if part not in known:
                raise unknown(f"part of {name!r}:", part, known)
            holder, key = node, int(part) if isinstance(node, list) else part
            node = holder[key] if isinstance(holder[key], (dict, list)) else {}
        holder[key] = value
    return from_json(json.dumps(tree))
