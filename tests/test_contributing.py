"""CONTRIBUTING.md is true: operators are in every place of the list "Add an op", and rooms stand in their order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import spartan.functional
from bench.cases import CASES
from spartan_kernels import dispatch
from spartan_kernels.ops import OPERATORS
from tests.test_import_arrow import SPARTAN, room_graph

ROOT = Path(__file__).resolve().parent.parent
# Public operators; `hard_topk_global` is documented with the parts that training is made of.
OPS = sorted(set(spartan.functional.__all__) & set(spartan.__all__))
STEM_OF = {op: dispatch.SUPPORT[f"{op}_forward"]["reference"].stem for op in OPS}
# Stems without kernels of their own in csrc call those of another.
KERNELS_OF = {"block_sparse": "masked_matmul", "block_sparse_conv": "masked_matmul", "masked_conv": "masked_matmul"}


def section() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text[text.index("## Add an op") : text.index("## Add a method")]


def places() -> list[str]:
    """The paths that the list names, as "spartan_kernels/ops/<stem>.py"; not names of files without a folder."""
    listed = section()[section().index("\n1. ") : section().index("`tests/test_contributing.py`")]
    named = dict.fromkeys(re.findall(r"`([\w<>./-]+\.(?:py|md|cpp|cu|h|txt))`", listed))
    return [place for place in named if "/" in place or (ROOT / place).exists()]


def backend_of(place: str) -> str | None:
    """The backend that a place belongs to; None for those that every operator is in."""
    folders = {"csrc/cpu": "native", "csrc/cuda": "cuda", "csrc/": "native", "CMakeLists": "native"}
    folders |= {f"spartan_kernels/backends/{backend}/": backend for backend in dispatch.BACKENDS}
    return next((backend for folder, backend in folders.items() if place.startswith(folder)), None)


def kernels_of(op: str) -> str:
    return KERNELS_OF.get(STEM_OF[op], STEM_OF[op])


def structure_of(op: str) -> str:
    return OPERATORS[f"{op}_forward"].structure.__name__


# What a file says of an operator, for the places that are one file for all of them.
ENTRY: dict[str, Callable[[str], str]] = {
    "spartan_kernels/operands.py": lambda op: f"class {structure_of(op)}(NamedTuple)",
    "spartan_kernels/ops/_checked.py": lambda op: f'"{op}_forward":',
    "spartan_kernels/ops/__init__.py": lambda op: f'"{op}",',
    "spartan_kernels/__init__.py": lambda op: f'"{op}",',
    "spartan_kernels/dispatch.py": lambda op: f'"{op}_forward"',
    "csrc/ops.h": kernels_of,
    "CMakeLists.txt": lambda op: f"csrc/cpu/{kernels_of(op)}.cpp",
    "python/spartan/functional/__init__.py": lambda op: f'"{op}",',
    "python/spartan/__init__.py": lambda op: f'"{op}",',
    "spartan_kernels/probes.py": lambda op: f'"{op}_forward":',
    "docs/operators/index.md": lambda op: f"[`{op}`]({op.replace('_', '-')}.md)",
    "docs/api/operators.md": lambda op: f".. autofunction:: spartan.{op}\n",
    "CHANGELOG.md": lambda op: f"`{op}`",
}
SHARED = ("spartan_kernels/backends/shared.py",)  # no entry: only what two backends need alike
TESTS = ("tests/test_<op>.py", "tests/test_<stem>.py")  # one of these


def missing(op: str, place: str, root: Path = ROOT) -> str | None:
    """Why `op` is not in a place of the list, or None."""
    stem, backend = STEM_OF[op], backend_of(place)
    if place in SHARED or (backend and backend not in dispatch.SUPPORT[f"{op}_forward"]):
        return None
    if place.startswith("python/spartan/functional/<") and OPERATORS[f"{op}_forward"].record is None:
        return None  # no gradient
    if place == "bench/cases.py":
        measured = {case.op for case in CASES.values()}
        return None if measured & {op, stem, kernels_of(op)} else f"no case of {op}"
    if place == "csrc/bindings/<subject>.cpp":
        bound = "".join(path.read_text(encoding="utf-8") for path in (root / "csrc" / "bindings").glob("*.cpp"))
        return None if f"cpu::{kernels_of(op)}" in bound else f"no binding of {op}"
    if place in ENTRY:
        path, entry = root / place, ENTRY[place](op)
        return None if path.exists() and entry in path.read_text(encoding="utf-8") else f"no {entry} in {place}"
    names = TESTS if place in TESTS else (place,)
    stems = kernels_of(op) if place.startswith("csrc/") else stem
    paths = [name.replace("<stem>", stems).replace("<op>", _page(op) if "docs/" in name else op) for name in names]
    return None if any((root / path).exists() for path in paths) else f"no {' or '.join(paths)}"


def _page(op: str) -> str:
    return op.replace("_", "-")


def test_every_place_of_the_list_is_checked() -> None:
    known = {*ENTRY, *SHARED, "bench/cases.py", "csrc/bindings/<subject>.cpp"}
    assert known <= set(places())
    assert all("<stem>" in place or "<op>" in place for place in set(places()) - known), places()


@pytest.mark.parametrize("op", OPS)
def test_every_operator_is_in_every_place_of_the_list(op: str) -> None:
    found = [missing(op, place) for place in places()]
    assert [why for why in found if why] == []


@pytest.mark.parametrize("place", [place for place in places() if place not in (*SHARED, "bench/cases.py")])
def test_an_operator_that_a_place_lacks_is_found(place: str, tmp_path: Path) -> None:
    assert missing("soft_topk", place, tmp_path) is not None


def test_stems_that_share_kernels_are_named_in_the_list() -> None:
    *first, last = (f"`{stem}`" for stem in KERNELS_OF)
    stems = f"{', '.join(first)} and {last}"
    assert f"{stems} have no kernels of their own in `csrc`: they call those of `masked_matmul`" in section()
    assert set(KERNELS_OF.values()) == {"masked_matmul"}
    assert not [path for stem in KERNELS_OF for path in (ROOT / "csrc").glob(f"*/{stem}.c*")]


def test_rooms_of_spartan_are_listed_and_import_only_rooms_before_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = text[text.index("imports only rooms before it:\n") : text.index("\nbench/")].partition("\n")[2]
    rooms = re.sub(r"\([^)]*\)", "", listed).split()
    graph = room_graph(SPARTAN)
    assert sorted(rooms) == sorted(graph)
    for index, room in enumerate(rooms):
        assert graph[room] <= set(rooms[:index]), room
