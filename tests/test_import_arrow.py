"""Imports run one way: spartan -> spartan_kernels.ops -> dispatch -> a backend, and no backend knows another.

In `spartan` they run one way too, from room to room: a room is a module or a package at its top.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spartan
import spartan_kernels
from spartan_kernels.dispatch import BACKENDS, SUPPORT

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path(spartan_kernels.__file__).parent
SPARTAN = Path(spartan.__file__).parent
COMPILED = ("native", "cuda")  # the backends that call the extension
# What every backend may import of `spartan_kernels.backends` besides its own folder.
SHARED = ("spartan_kernels.backends.shared",)
EXTENSION = "spartan_kernels.backends.extension"


def imports(path: Path, package: str) -> set[str]:
    """Absolute dotted names that a file imports, wherever in it: by a statement or by a constant name."""
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
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.lstrip(".")
            if name.startswith(("spartan.", "spartan_kernels.")) and " " not in name:
                names.add(name)
    return names


def files(root: Path) -> Iterator[tuple[Path, str]]:
    """Python files under a package with the dotted name of the package that each belongs to."""
    for path in sorted(root.rglob("*.py")):
        yield path, ".".join(path.parent.relative_to(root.parent).parts)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(kernels: Path) -> list[str]:
    """What the files of a `spartan_kernels` import against the arrow, as "file: name"."""
    found = []
    for path, package in files(kernels):
        parts = path.relative_to(kernels).with_suffix("").parts
        for name in imports(path, package):
            if refused(parts, name):
                found.append(f"{'/'.join(parts)}: {name}")
    return sorted(found)


def refused(parts: tuple[str, ...], name: str) -> bool:
    """Whether the module at this place in `spartan_kernels` may not import `name`."""
    if inside(name, "spartan"):
        return True
    if inside(name, "spartan_kernels._native"):
        return parts != ("backends", "extension")
    if parts[0] == "ops":
        return inside(name, "spartan_kernels.backends")
    if parts[0] != "backends":
        return False
    if any(inside(name, above) for above in ("spartan_kernels.ops", "spartan_kernels.dispatch")):
        return True
    if not inside(name, "spartan_kernels.backends"):
        return False
    folder = parts[1] if len(parts) > 2 else ""
    allowed = [
        *SHARED,
        *([EXTENSION] if folder in COMPILED else []),
        *([f"spartan_kernels.backends.{folder}"] * bool(folder)),
    ]
    return not any(inside(name, package) for package in allowed)


def test_no_module_of_the_kernels_imports_against_the_arrow() -> None:
    assert violations(KERNELS) == []


def test_every_backend_is_a_folder_with_the_stems_it_serves() -> None:
    folders = {path.name for path in (KERNELS / "backends").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(BACKENDS)
    for row in SUPPORT.values():
        for backend, support in row.items():
            assert (KERNELS / "backends" / backend / f"{support.stem}.py").exists(), (backend, support.stem)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("backends/native/masked_conv.py", "from spartan_kernels.backends.reference import masked_conv"),
        ("backends/native/masked_conv.py", "from spartan_kernels.backends import reference"),
        ("backends/cuda/rows.py", "def f():\n    from spartan_kernels.backends.native import rows"),
        ("backends/cuda/rows.py", "from ..native import rows"),
        ("backends/triton/tables.py", "from spartan_kernels.backends import extension"),
        (
            "backends/reference/survey.py",
            "import importlib\nimportlib.import_module('spartan_kernels.backends.triton')",
        ),
        ("backends/reference/survey.py", "import spartan_kernels.dispatch"),
        ("backends/native/rows.py", "from spartan_kernels import _native"),
        ("backends/native/rows.py", "import importlib\nimportlib.import_module('spartan_kernels._native')"),
        ("backends/shared.py", "from spartan_kernels.backends.reference import survey"),
        ("backends/extension.py", "from spartan_kernels import ops"),
        ("ops/hard_topk.py", "from spartan_kernels.backends.shared import expand"),
        ("layout.py", "from spartan import nn"),
    ],
)
def test_a_planted_import_against_the_arrow_is_found(tmp_path: Path, place: str, source: str) -> None:
    planted = tmp_path / "spartan_kernels" / place
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    (found,) = violations(tmp_path / "spartan_kernels")
    assert found.startswith(place.removesuffix(".py"))


def test_only_extension_py_imports_the_compiled_module() -> None:
    callers = {
        path.relative_to(KERNELS).as_posix()
        for path, package in files(KERNELS)
        if any(inside(name, "spartan_kernels._native") for name in imports(path, package))
    }
    assert callers == {"backends/extension.py"}


def private_imports(root: Path) -> list[str]:
    """What the files of a `spartan` import of the private parts of `spartan_kernels`, as "file: name"."""
    return [
        f"{path.relative_to(root).as_posix()}: {name}"
        for path, package in files(root)
        for name in sorted(imports(path, package))
        if inside(name, "spartan_kernels.backends") or (inside(name, "spartan_kernels") and _private(name))
    ]


def _private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def test_spartan_imports_only_public_parts_of_the_kernels() -> None:
    assert private_imports(SPARTAN) == []


@pytest.mark.parametrize(
    "source",
    [
        "from spartan_kernels.ops._shards import joint_group",
        "from spartan_kernels.ops import _problem",
        "def f():\n    from spartan_kernels.ops.masked_matmul import _serving",
        "from spartan_kernels.backends.native import rows",
        "import spartan_kernels._native",
    ],
)
def test_a_planted_import_of_a_private_part_is_found(tmp_path: Path, source: str) -> None:
    planted = tmp_path / "spartan" / "nn" / "modules.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    assert private_imports(tmp_path / "spartan") != []


def file_graph(root: Path) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports, by dotted name; not the package's own `__init__`."""
    modules = {}
    for path, package in files(root):
        modules[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    del modules[root.name]
    graph = {}
    for module, path in modules.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        names = imports(path, package)
        graph[module] = {_module_of(name, modules) for name in names if inside(name, root.name)} - {"", module}
    return graph


def _module_of(name: str, modules: dict[str, Path]) -> str:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def room_graph(root: Path) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    rooms: dict[str, set[str]] = {}
    for module, imported in file_graph(root).items():
        own = module.split(".")[1]
        rooms.setdefault(own, set()).update(name.split(".")[1] for name in imported)
    rooms.pop("__main__", None)
    return {room: imported - {room} for room, imported in rooms.items()}


def floor_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """Floor of each node, 1 for those that import no other; ValueError names a circle."""
    floors: dict[str, int] = {}

    def climb(node: str, above: tuple[str, ...]) -> int:
        if node in above:
            raise ValueError(f"circle: {' -> '.join([*above[above.index(node) :], node])}")
        if node not in floors:
            floors[node] = 1 + max((climb(below, (*above, node)) for below in graph[node]), default=0)
        return floors[node]

    for node in graph:
        climb(node, ())
    return floors


def test_spartan_has_few_rooms_and_no_circle() -> None:
    rooms = room_graph(SPARTAN)
    assert len(rooms) <= 16, sorted(rooms)
    assert max(floor_of(rooms).values()) <= 10, floor_of(rooms)
    floor_of(file_graph(SPARTAN))  # nor among files


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"a.py": "from spartan.b import x", "b.py": "from spartan.a import y"}, "a -> b -> a"),
        (
            {"a/c.py": "import spartan.b", "a/d.py": "", "b.py": "def f():\n    from spartan.a.d import x"},
            "a -> b -> a",
        ),
        (
            {
                "a.py": "if TYPE_CHECKING:\n    from spartan.b import x",
                "b.py": "import spartan.c",
                "c.py": "import spartan.a",
            },
            "a -> b -> c -> a",
        ),
    ],
)
def test_a_planted_circle_of_rooms_is_found(tmp_path: Path, sources: dict[str, str], circle: str) -> None:
    for place, source in {"__init__.py": "", **sources}.items():
        path = tmp_path / "spartan" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    with pytest.raises(ValueError, match=circle):
        floor_of(room_graph(tmp_path / "spartan"))


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import spartan.nn", "spartan_kernels", "spartan.nn"),
        ("def f():\n    from spartan import nn", "spartan_kernels", "spartan.nn"),
        ("from ..native import run", "spartan_kernels.backends.triton", "spartan_kernels.backends.native.run"),
        ("from . import native", "spartan_kernels.backends", "spartan_kernels.backends.native"),
        ("import_module('spartan_kernels.ops')", "spartan_kernels.backends", "spartan_kernels.ops"),
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
