"""Building the extension: without a compiler the package still works, and says why it is slower."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _copy(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("csrc", "spartan_kernels", "python"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    return tree


def _build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def test_without_a_compiler_the_reference_serves_and_says_why(tmp_path: Path) -> None:
    tree = _copy(tmp_path)
    done = _build(tree, CXX=str(tmp_path / "no-compiler"), SPARTAN_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("installing without compiled kernels") == 1
    reason = json.loads((tree / "spartan_kernels" / "_build.json").read_text())["reason"]
    program = (
        # an editable install beside would lend its own extension
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import torch, warnings, spartan; warnings.simplefilter('ignore');"
        "print(spartan.info()['native']['reason']); print(float(spartan.soft_topk(torch.ones(4), 2.0).sum()))"
    )
    path = os.pathsep.join([str(tree), str(tree / "python")])
    environment = {**os.environ, "PYTHONPATH": path}
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    said, total = shown.stdout.splitlines()
    assert reason and reason in said
    assert float(total) == pytest.approx(2.0)


def test_a_compiler_can_be_insisted_on(tmp_path: Path) -> None:
    done = _build(_copy(tmp_path), CXX=str(tmp_path / "no-compiler"), SPARTAN_NATIVE="on")
    assert done.returncode != 0
    assert "SPARTAN_NATIVE=on, but the extension could not be built" in done.stderr


def test_an_unknown_switch_is_refused(tmp_path: Path) -> None:
    done = _build(_copy(tmp_path), SPARTAN_NATIVE="perhaps")
    assert done.returncode != 0
    assert "SPARTAN_NATIVE must be auto, on or off; got 'perhaps'" in done.stderr
