"""Executes a notebook's cells in order, in this process, and writes it back with what they printed and drew.

    python tools/notebook.py docs/notebook.ipynb

Needs no Jupyter: a cell's printed text, the value of its last expression, and a matplotlib figure or a PNG as that
value are kept as its outputs. The working folder is a temporary one.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def shown(value: Any) -> dict[str, Any] | None:
    """The value of a cell's last expression as the data of an output; None where there is nothing to show."""
    if value is None:
        return None
    text = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "savefig"):  # a figure of matplotlib
        file = io.BytesIO()
        value.savefig(file, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
        return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    if hasattr(value, "_repr_markdown_"):
        return {"text/markdown": value._repr_markdown_().splitlines(keepends=True), **text}
    return {"text/plain": repr(value).splitlines(keepends=True)}


def run_cell(source: str, namespace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Runs one cell; gives its outputs as nbformat 4 has them."""
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(last, name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if (data := shown(value)) is not None:
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its cells of code executed in the current folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = run_cell("".join(cell["source"]), namespace, f"<cell {count}>")
            cell = cell | {"execution_count": count, "outputs": outputs}
        cells.append(cell)
    return notebook | {"cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ.setdefault("BMJAX_CACHE", folder)
        done = execute(json.loads(path.read_text()))
        os.chdir(path.parent)
    path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
