"""Shows a notebook, as it was executed, as a page of the site: its cells become Markdown, its pictures stay within."""

from __future__ import annotations

import json
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx


def output(found: dict[str, Any]) -> str:
    """One output of a cell as Markdown: a picture, a table, or text."""
    if found["output_type"] == "stream":
        return f"```text\n{''.join(found['text']).rstrip()}\n```"
    data = found["data"]
    if "image/png" in data:
        alt = found.get("metadata", {}).get("alt", "the cell's picture")
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="{alt}" src="data:image/png;base64,{encoded}">'
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def markdown(notebook: str) -> str:
    """The cells of a notebook in nbformat 4, and what they printed."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts += [f"```python\n{source}\n```", *map(output, cell["outputs"])]
    return "\n\n".join(parts) + "\n"


class NotebookParser(MystParser):
    """Reads `.ipynb`."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        super().parse(markdown(inputstring), document)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
