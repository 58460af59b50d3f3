"""Instructions for each entry of the hot Triton kernels stay within their limits, counted from machine code."""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib.metadata import version

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter replaces its compiler", allow_module_level=True)

from bench import gpu_counts, sass
from bench.gpu_few_tokens import SIDE, count_few_tokens
from spartan_kernels.break_even import single_weights_on_gpu

LISTING = """
//--------------------- .text._other          --------------------------
        /*0000*/                   MUFU.EX2 R1, R1 ;
        /*0010*/                   EXIT ;
//--------------------- .text._walk           --------------------------
.text._walk:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   IADD3 R6, R6, R7, RZ ;
        /*0060*/                   RED.E.ADD.64 desc[UR4][R8.64], R6 ;
        /*0070*/                   IADD3 R6, R6, R7, RZ ;
.L_x_1:
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   CALL.REL.NOINC `($__slow) ;
        /*00b0*/                   FMUL R4, R4, R4 ;
        /*00c0*/                   FMUL R4, R4, R4 ;
        /*00d0*/                   FMUL R4, R4, R4 ;
        /*00e0*/                   FMUL R4, R4, R4 ;
.L_x_2:
        /*00f0*/                   DADD R10, R10, R12 ;
        /*0100*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0110*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0120*/                   EXIT ;
//--------------------- .nv.info              --------------------------
"""


def hot(rare: str) -> list[str]:
    graph = sass.Graph(LISTING, "_walk", rare)
    loop = graph.hot_loop()
    assert loop is not None
    return [one.name for one in graph.longest(loop.body, loop.head)]


def test_the_hot_loop_of_a_listing() -> None:
    """Its longest way, without the slow division; and without atomics where those are rare."""
    ordinary = ["LDG.E.128", "FADD", "BRA", "MUFU.EX2", "BRA", "DADD", "BRA"]
    assert hot(gpu_counts.ATOMICS) == ordinary
    assert hot("") == [*ordinary[:3], "IADD3", "RED.E.ADD.64", "IADD3", *ordinary[3:]]
    whole = sass.Graph(LISTING, "_walk", gpu_counts.ATOMICS).longest()
    assert [one.name for one in whole] == ["LDC", "BRA", *ordinary, "STG.E", "EXIT"]
    beside = sass.Graph(LISTING, "_walk", "FADD").longest()  # a loop that begins with what is rare
    assert [one.name for one in beside] == ["LDC", "BRA", "STG.E", "EXIT"]


def test_cycles_of_each_pipe() -> None:
    graph = sass.Graph(LISTING, "_walk")
    loop = graph.hot_loop()
    assert loop is not None
    found = sass.pipes(graph.longest(loop.body, loop.head))
    assert found == {"issue": 10, "memory": 8, "float32": 1, "integer": 4, "special": 8, "float64": 2}


def subject(kernel: str, label: str, note: str) -> gpu_counts.Subject:
    return next(s for s in gpu_counts.subjects() if (s.kernel, s.label, s.note) == (kernel, label, note))


@pytest.mark.skipif(version("triton") != gpu_counts.COUNTED_WITH, reason="limits are for another version of Triton")
@pytest.mark.parametrize("which", gpu_counts.LIMITS)
def test_instructions_stay_within_their_limit(which: tuple[str, str, str]) -> None:
    row, limit = gpu_counts.count(subject(*which)), gpu_counts.LIMITS[which]
    assert 0.8 * limit <= row.instructions <= limit, f"{row.instructions} instructions for each entry, limit {limit}"
    assert row.cycles >= row.instructions


@pytest.mark.skipif(version("triton") != gpu_counts.COUNTED_WITH, reason="counts are for another version of Triton")
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 1), (torch.float32, 16)])
def test_few_tokens_are_predicted_as_they_are_counted(dtype: torch.dtype, tokens: int) -> None:
    """The choice of packed single weights leaves out instructions, which bound no case of these."""
    for row in count_few_tokens(dtype, tokens):
        assert max(row.memory, row.gather) >= row.issue
        density = 1 - int(row.zeros.rstrip("%")) / 100
        assert 1 / single_weights_on_gpu(density, dtype.itemsize, tokens, SIDE * SIDE) == pytest.approx(row.ratio, 0.01)


def test_a_kernel_with_more_instructions_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of single entries, not of 16 bytes, put the pass over its limit."""
    cases = importlib.import_module("spartan_kernels.backends.triton.global_solve").COMPILE_CASES
    which = ("_gradient_write_kernel", "fp32", "")
    case = next(c for c in cases if (c.kernel.fn.__name__, c.label) == which[:2])
    monkeypatch.setitem(case.constexprs, "ALIGNED", False)
    assert gpu_counts.count(subject(*which)).instructions > gpu_counts.LIMITS[which]
