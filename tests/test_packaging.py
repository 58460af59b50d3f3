"""Builds: one that fails says why and leaves nothing old behind; the source distribution has all that one needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _copy(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("csrc", "spartan_kernels", "python"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    return tree


def _build(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace", *arguments]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, timeout=3600, check=False
    )


def _reason(tree: Path) -> str:
    return str(json.loads((tree / "spartan_kernels" / "_build.json").read_text())["reason"])


def _program(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _old_extension(tree: Path) -> Path:
    path = tree / "spartan_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"of an earlier build")
    return path


def test_without_a_compiler_the_reference_serves_and_says_why(tmp_path: Path) -> None:
    tree = _copy(tmp_path)
    done = _build(tree, CXX=str(tmp_path / "no-compiler"), SPARTAN_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("installing without compiled kernels") == 1
    reason = _reason(tree)
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


def test_a_failed_build_leaves_no_extension_of_an_earlier_one(tmp_path: Path) -> None:
    tree = _copy(tmp_path)
    old = _old_extension(tree)
    assert _build(tree, CXX=str(tmp_path / "no-compiler")).returncode == 0
    assert not old.exists()


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("exec /nowhere/cc1plus", "/nowhere/cc1plus"),
        ('echo "ops.h:3:1: error: no such type" >&2; exit 1', "ops.h:3:1: error: no such type"),
        ('echo "c++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1', "Killed signal terminated"),
    ],
    ids=["a part of it missing", "an error", "out of memory"],
)
def test_a_compiler_that_fails_half_way_is_quoted(tmp_path: Path, fails: str, said: str) -> None:
    real = shutil.which("c++") or shutil.which("g++")
    assert real is not None
    compiler = _program(tmp_path / "bin" / "c++", f'case "$*" in *csrc*|*cmake_pch*) {fails};; esac\nexec {real} "$@"')
    tree = _copy(tmp_path)
    assert _build(tree, CXX=str(compiler), SPARTAN_CUDA="off").returncode == 0
    assert said in _reason(tree)


def test_cmake_without_its_input_is_quoted(tmp_path: Path) -> None:
    tree = _copy(tmp_path)
    (tree / "CMakeLists.txt").unlink()
    assert _build(tree, SPARTAN_CUDA="off").returncode == 0
    assert "does not appear to contain CMakeLists.txt" in _reason(tree)


def test_setuptools_that_cannot_read_the_metadata_is_named(tmp_path: Path) -> None:
    old = tmp_path / "old" / "setuptools"
    (old / "command").mkdir(parents=True)
    (old / "__init__.py").write_text("__version__ = '65.5.0'\nExtension = setup = object\n")
    (old / "command" / "__init__.py").touch()
    (old / "command" / "build_ext.py").write_text("build_ext = object\n")
    done = _build(_copy(tmp_path), PYTHONPATH=str(old.parent))
    assert done.returncode != 0
    assert "building needs setuptools 77 or newer; found 65.5.0" in done.stderr


@pytest.mark.parametrize(
    ("devices", "environment", "passed"),
    [
        ("9.0\n8.6\n9.0", {}, ["-DSPARTAN_CUDA=auto", "-DSPARTAN_CUDA_ARCHS=86;90"]),
        ("12.0\n9.0", {"SPARTAN_CUDA": "on"}, ["-DSPARTAN_CUDA=on", "-DSPARTAN_CUDA_ARCHS=90;120"]),
        ("9.0", {"SPARTAN_CUDA_ARCHS": "80"}, ["-DSPARTAN_CUDA=auto", "-DSPARTAN_CUDA_ARCHS=80"]),
        ("", {}, ["-DSPARTAN_CUDA=off", "-USPARTAN_CUDA_ARCHS"]),
        ("", {"SPARTAN_CUDA": "on"}, ["-DSPARTAN_CUDA=on", "-USPARTAN_CUDA_ARCHS"]),
    ],
)
def test_cuda_kernels_are_compiled_for_the_devices_here(
    tmp_path: Path, devices: str, environment: dict[str, str], passed: list[str]
) -> None:
    programs = tmp_path / "bin"
    _program(programs / "nvidia-smi", f"printf '{devices}\n'" if devices else "exit 9")
    _program(programs / "cmake", f'printf "%s\\n" "$@" >> {tmp_path}/arguments; exit 1')
    assert _build(_copy(tmp_path), PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", **environment).returncode == 0
    calls = (tmp_path / "arguments").read_text().splitlines()
    assert [argument for argument in passed if argument not in calls] == []


def test_a_source_distribution_makes_a_native_wheel_also_over_a_build_whose_tools_are_gone(tmp_path: Path) -> None:
    """As pip does: the tools of a build are in a folder of their own, gone by the next install in one checkout."""
    checkout = _copy(tmp_path)
    packed = [sys.executable, "setup.py", "-q", "sdist", "--formats", "gztar"]
    subprocess.run(packed, cwd=checkout, env={**os.environ, "SPARTAN_NATIVE": "off"}, check=True, timeout=120)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    build = tree / "build" / "temp"
    build.mkdir(parents=True)
    gone = [f"CMAKE_{name}:INTERNAL=/gone/{name}" for name in ("COMMAND", "MAKE_PROGRAM")]
    (build / "CMakeCache.txt").write_text("\n".join([*gone, f"CMAKE_HOME_DIRECTORY:INTERNAL={tree}"]))
    _old_extension(tree / "build" / "lib")
    flags = "-DSPARTAN_OPTIMISE=-O0 -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    quick = {"CMAKE_ARGS": flags, "SPARTAN_CUDA": "off", "SPARTAN_NATIVE": "on"}
    steps = ["build", "--build-temp", "build/temp", "--build-lib", "build/lib", "bdist_wheel", "--dist-dir", "wheels"]
    wheel = [sys.executable, "setup.py", "-q", *steps]
    done = subprocess.run(wheel, cwd=tree, env={**os.environ, **quick}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = (tree / "wheels").glob("*.whl")
    assert found.stat().st_size < 5e6
    site = tmp_path / "site"
    with zipfile.ZipFile(found) as contents:
        contents.extractall(site)
    smoke = [sys.executable, "-m", "spartan_kernels.smoke", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    shown = subprocess.run(smoke, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout
    assert "native" in shown.stdout
