"""The compile check goes the way of a launch: it finds kernels that only some integers make fail, and other Tritons."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter replaces its compiler", allow_module_level=True)

import triton
import triton.language as tl

from bench import compile_driver, gpu_compile, launch_arguments, tritons
from spartan_kernels import ops
from spartan_kernels.backends.triton.configs import CompileCase
from spartan_kernels.backends.triton.global_solve import GlobalSolve
from spartan_kernels.backends.triton.tensor_list import TensorList

SM_90 = next(target for target in gpu_compile.TARGETS if target.name == "sm_90")


@triton.jit
def _fails_where_n_is_one(x_ptr, n):
    tl.static_assert(n.dtype.is_int())  # a constant has no dtype
    tl.store(x_ptr, n)


@triton.jit(do_not_specialize=["n"])
def _takes_one_as_any_other(x_ptr, n):
    tl.static_assert(n.dtype.is_int())
    tl.store(x_ptr, n)


@triton.jit
def _fails_past_32_bits(x_ptr, n):
    total = 0
    for _ in range(3):
        total += n  # 32 bits that a sum with 64 leaves
    tl.store(x_ptr, total)


@triton.jit
def _takes_every_integer(x_ptr, n):
    tl.store(x_ptr, n)


def case_of(kernel: Any, **more: Any) -> CompileCase:
    return CompileCase(kernel, {"x_ptr": "*i64", "n": "i32"}, {}, 1, "planted", **more)


def refusals(case: CompileCase) -> tuple[int, list[str]]:
    compile_driver.use("cuda", 90, 32, "edges")
    case.kernel.device_caches.clear()
    return launch_arguments.refused(case, SM_90)


def test_a_kernel_that_an_integer_of_one_breaks_is_found() -> None:
    _, problems = refusals(case_of(_fails_where_n_is_one))
    assert problems and all(p.startswith(("integers of 1:", "n of 1:")) for p in problems)
    kernels, problems = refusals(case_of(_takes_one_as_any_other))
    assert problems == []
    assert kernels == 2  # 32 bits and 64


def test_a_kernel_that_an_integer_past_32_bits_breaks_is_found_unless_it_cannot_be() -> None:
    _, problems = refusals(case_of(_fails_past_32_bits))
    assert [p.split(":")[0] for p in problems] == [
        "integers of 2147483664", "integers of 2147483665", "n of 2147483665",
    ]  # fmt: skip
    assert refusals(case_of(_fails_past_32_bits, bounded=("n",)))[1] == []


def test_each_specialisation_is_compiled_once() -> None:
    # 1; neither; a multiple of 16; both past 32 bits
    assert refusals(case_of(_takes_every_integer)) == (5, [])


def test_a_kernel_that_would_not_launch_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("spartan_kernels.backends.triton.hard_topk")
    monkeypatch.setattr(module, "COMPILE_CASES", [case_of(_fails_where_n_is_one)])
    row = gpu_compile.compile_edges("hard_topk", 0, SM_90)
    assert row.kernel == "fails_where_n_is_one"
    assert row.problem.startswith("would not launch with integers of 1: ")
    assert row.triton == triton.__version__


def test_the_start_of_a_solve_is_compiled_once_for_lists_of_any_length() -> None:
    compile_driver.use("cuda", 90, 32, "lists")
    kernels = set()
    for sizes in ([16], [5000, 3], [40_001] * 17):
        problem = TensorList([torch.empty(n) for n in sizes], [])
        one = torch.ones((), dtype=torch.float64)
        solve = GlobalSolve(problem.shape, True, True, True)
        plan = solve.plan(
            problem.table(), one, one, ops.new_solver_state(), torch.ones(2).double(), solve.workspace()
        )  # fmt: skip
        start = next(launch for launch in plan if launch.name == "start_kernel")
        start()
        kernels.add(compile_driver.compiled(start.kernel))
    assert kernels == {1}


def test_another_triton_is_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def install(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        Path(command[command.index("--target") + 1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", install)
    place = tritons.folder_of("1.2.3", tmp_path)
    assert tritons.folder_of("1.2.3", tmp_path) == place
    assert len(commands) == 1 and commands[0][-1] == "triton==1.2.3"
    assert tritons.environment(place)["PYTHONPATH"].startswith(str(place))


def test_a_triton_that_cannot_be_installed_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: no\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(tritons, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"Triton 1\.2\.3 cannot be installed.*no matching distribution"):
        tritons.folder_of("1.2.3", tmp_path)
    monkeypatch.setattr(tritons, "folder_of", lambda version: tritons_fails(version))
    (row,) = gpu_compile.run_under("1.2.3", "", 1)
    assert "cannot be installed" in row.problem


def tritons_fails(version: str) -> Path:
    raise RuntimeError(f"Triton {version} cannot be installed beside this one: no")
