"""Every Triton kernel compiles for one GPU architecture without a GPU; the whole gate is bench.gpu_compile."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter replaces its compiler", allow_module_level=True)

from bench.gpu_compile import MODULES, TARGETS, Row, _judged, compile_triton

SM_90 = next(target for target in TARGETS if target.name == "sm_90")


def first_cases() -> list[tuple[str, int]]:
    """One configuration of every kernel."""
    chosen: dict[str, tuple[str, int]] = {}
    for module in MODULES:
        cases = importlib.import_module(f"spartan_kernels.backends.triton.{module}").COMPILE_CASES
        for index, case in enumerate(cases):
            chosen.setdefault(case.kernel.fn.__name__, (module, index))
    return list(chosen.values())


def test_every_kernel_has_a_case() -> None:
    backend = importlib.import_module("spartan_kernels.backends.triton")
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(backend.__path__, f"{backend.__name__}.")]
    kernels = {name for module in modules for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}
    chosen = [
        importlib.import_module(f"spartan_kernels.backends.triton.{m}").COMPILE_CASES[i] for m, i in first_cases()
    ]
    assert {case.kernel.fn.__name__ for case in chosen} == kernels


@pytest.mark.parametrize(("module", "index"), first_cases())
def test_compiles_for_sm_90_without_spills(module: str, index: int) -> None:
    row = compile_triton(module, index, SM_90)
    assert row.problem == ""
    assert 0 < row.registers <= 255


@pytest.mark.parametrize(
    ("row", "tensor_cores", "problem"),
    [
        (Row("k", "", "sm_90", spilled=8), False, "spills"),
        (Row("k", "", "sm_90", shared=SM_90.shared_limit + 1), False, "shared memory"),
        (Row("k", "", "sm_90"), True, "tensor-core"),
        (Row("k", "", "sm_90", matrix=4), True, "loads ahead"),
        (Row("k", "", "sm_90", matrix=4, copies=2, shared=SM_90.shared_limit), True, ""),
    ],
)
def test_the_gate_refuses_what_cannot_run_well(row: Row, tensor_cores: bool, problem: str) -> None:
    assert problem in _judged(row, SM_90, tensor_cores).problem
    assert bool(_judged(row, SM_90, tensor_cores).problem) == bool(problem)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    # by registers, by shared memory (1 KiB of each block is the system's), by warps, by blocks
    [(240, 98_324, 8, 1), (128, 81_940, 8, 2), (76, 70_400, 8, 3), (32, 0, 8, 8), (24, 0, 1, 32), (255, 0, 16, 0)],
)
def test_how_many_programs_a_processor_holds(registers: int, shared: int, warps: int, programs: int) -> None:
    assert SM_90.resident(registers, shared, warps) == programs


@pytest.mark.parametrize(("architecture", "adds"), [("sm_90", True), ("sm_100", False)])
def test_8_bits_are_added_in_float32_outside_of_tensor_cores_that_would_not(architecture: str, adds: bool) -> None:
    """One addition for each sum and step; Blackwell's tensor cores do it themselves."""
    from bench import compile_driver, launch_arguments
    from bench.gpu_compile import machine_code

    cases = importlib.import_module("spartan_kernels.backends.triton.masked_matmul").COMPILE_CASES
    label = "block 128 x 128, 8192 tokens, float8"
    case = next(case for case in cases if case.label == label and case.targets == (architecture,))
    machine = next(t for t in TARGETS if t.name == architecture)
    compile_driver.use(machine.backend, machine.arch, machine.warp_size)
    compiled = launch_arguments.launch(case, machine, launch_arguments.integers_of(case))
    code = machine_code(compiled.asm["cubin"])
    sums = case.constexprs["BLOCK_M"] * case.constexprs["BLOCK_N"] // (32 * case.num_warps)
    assert len(re.findall(r"\b(?:QGMMA|UTCQMMA)\b", code)) > 0
    assert len(re.findall(r"\bFADD\b", code)) >= sums if adds else "FADD" not in code


def test_a_kernel_that_does_not_compile_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = importlib.import_module("spartan_kernels.backends.triton.hard_topk").COMPILE_CASES
    monkeypatch.setitem(cases[0].constexprs, "BLOCK_N", 3)  # tiles are powers of two
    assert "does not compile" in compile_triton("hard_topk", 0, SM_90).problem


def test_a_walk_without_vector_loads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = importlib.import_module("spartan_kernels.backends.triton.global_solve").COMPILE_CASES
    index = next(i for i, case in enumerate(cases) if "gradient_write" in case.kernel.fn.__name__)
    assert compile_triton("global_solve", index, SM_90).problem == ""
    monkeypatch.setitem(cases[index].constexprs, "ALIGNED", False)
    assert "16-byte" in compile_triton("global_solve", index, SM_90).problem
