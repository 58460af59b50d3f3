"""What the site adds to Sphinx: equations as MathML, and docstrings that are plain text, not reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

_SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Example|Source|Yields):")
_SPECIAL = re.compile(r"(?<!\\)([*|]|(?<=\w)_(?!\w))")


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def escaped(line: str) -> str:
    """`line` with what reStructuredText would read as markup escaped, outside of backquotes."""
    pieces = re.split(r"(`+[^`]*`+)", line)
    return "".join(piece if piece.startswith("`") else _SPECIAL.sub(r"\\\1", piece) for piece in pieces)


def as_markup(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText: an indented paragraph of its description is an equation."""
    result: list[str] = []
    literal = described = False
    for i, line in enumerate(lines):
        described = described or bool(_SECTIONS.match(line))
        starts = line.startswith("    ") and (i == 0 or not lines[i - 1].strip())
        if not described and starts and not literal:
            result += ["::", ""]
            literal = True
        elif line and not line.startswith(" "):
            literal = line.endswith("::")
        result.append(line if literal else escaped(line))
    return result


def _docstring(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_markup(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register both; the docstrings come before napoleon, which reads their sections."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
