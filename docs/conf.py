"""The documentation site: `make docs` builds it, with warnings as errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT), str(ROOT / "python")]

project = "spartan-kernels"
copyright = "spartan-kernels maintainers"
version = release = re.findall(
    r'^__version__ = "(.+)"$', (ROOT / "spartan_kernels" / "__init__.py").read_text(encoding="utf-8"), re.M
)[0]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_extensions",
]
exclude_patterns = ["_build"]
default_role = "code"  # single backquotes in docstrings
nitpicky = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_math_renderer = "mathml"  # of site_extensions: no script from another host

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# trainers: large, and only their names are needed
autodoc_mock_imports = ["transformers", "accelerate", "lightning", "peft"]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style"), ("Attributes", "params_style")]

html_theme = "furo"
html_title = f"spartan-kernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
