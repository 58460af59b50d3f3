"""What the oldest PyTorch that the metadata admits cannot do is not used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for folder in ("spartan_kernels", "python") for path in (ROOT / folder).rglob("*.py"))


def checks_against_unions(source: str) -> list[int]:
    """Lines that call `isinstance(x, A | B)`, which `torch.compile` cannot trace before PyTorch 2.10."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        and any(isinstance(argument, ast.BinOp) for argument in node.args)
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_types_are_checked_against_tuples(path: Path) -> None:
    assert checks_against_unions(path.read_text()) == []


def test_a_check_against_a_union_is_found() -> None:
    assert checks_against_unions("y = 1\nif isinstance(x, int | float):\n    pass") == [2]
    assert checks_against_unions("isinstance(x, (int, float))") == []
