"""Imports run one way: spartan -> spartan_kernels.ops -> dispatch -> a backend, and no backend knows another."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spartan
import spartan_kernels

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path(spartan_kernels.__file__).parent
SPARTAN = Path(spartan.__file__).parent
BACKENDS = ("reference", "triton", "native")


def imports(path: Path, package: str) -> set[str]:
    """Absolute dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def files(root: Path) -> list[tuple[Path, str]]:
    """Python files under a package with the package each belongs to."""
    found = sorted(root.rglob("*.py"))
    return [(path, ".".join(path.parent.relative_to(root.parent).parts)) for path in found]


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_kernels_never_import_spartan() -> None:
    for path, package in files(KERNELS):
        assert not [name for name in imports(path, package) if inside(name, "spartan")], path


def test_no_backend_imports_another_or_what_calls_it() -> None:
    forbidden = {"spartan_kernels.ops", "spartan_kernels.dispatch"}
    for path, package in files(KERNELS / "backends"):
        parts = path.relative_to(KERNELS / "backends").with_suffix("").parts
        if parts[0] not in BACKENDS:
            continue
        others = {f"spartan_kernels.backends.{name}" for name in BACKENDS if name != parts[0]}
        for name in imports(path, f"spartan_kernels.{package}"):
            assert not any(inside(name, package) for package in others | forbidden), (path, name)


def test_ops_import_no_backend() -> None:
    for path, package in files(KERNELS / "ops"):
        names = imports(path, f"spartan_kernels.{package}")
        assert not [name for name in names if inside(name, "spartan_kernels.backends")], path


def test_spartan_reaches_kernels_through_their_public_face() -> None:
    for path, package in files(SPARTAN):
        names = imports(path, package)
        assert not [n for n in names if inside(n, "spartan_kernels.backends") or n.endswith("._native")], path


def test_only_one_file_calls_the_extension() -> None:
    callers = {
        path.relative_to(KERNELS).as_posix()
        for path, package in files(KERNELS)
        if any(inside(name, "spartan_kernels._native") for name in imports(path, package))
    }
    assert callers <= {"backends/native.py"}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import spartan.nn", "spartan_kernels", "spartan.nn"),
        ("def f():\n    from spartan import nn", "spartan_kernels", "spartan.nn"),
        ("from ..native import run", "spartan_kernels.backends.triton", "spartan_kernels.backends.native.run"),
        ("from . import native", "spartan_kernels.backends", "spartan_kernels.backends.native"),
    ],
)
def test_imports_are_seen_in_every_form(tmp_path: Path, source: str, package: str, expected: str) -> None:
    (tmp_path / "module.py").write_text(source)
    assert expected in imports(tmp_path / "module.py", package)


def test_importing_spartan_imports_neither_triton_nor_matplotlib() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import spartan;"
        "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in ('triton', 'matplotlib', 'rich')))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
