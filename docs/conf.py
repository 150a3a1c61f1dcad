"""Sphinx's settings. `python -m sphinx -W docs build/site` builds the site; nothing in it is fetched from a network."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "bmjax"
author = "the bmjax maintainers"
release = version = metadata.version("bmjax")
extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "notebook"]
exclude_patterns = ["_ext"]

html_theme = "furo"
html_title = f"bmjax {release}"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path: list[str] = []
highlight_language = "text"
toc_object_entries = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings: list[str] = []  # none: a warning is an error

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
