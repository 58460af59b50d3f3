"""What the compile check gives to a kernel: the arguments of a launch, and integers at the edges of specialisation.

Triton makes an integer of 1 a constant, remembers which are multiples of 16, and takes 64 bits from 2^31 on: each of
these is another kernel. The edges are 1, 15, 16, 17 and two numbers past 2^31; all integers of a kernel together, then
each alone 1 or past 2^31 among others that are neither. Those that Triton compiles to the same kernel cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from bench import compile_driver

EDGES = (1, 15, 16, 17, (1 << 31) + 16, (1 << 31) + 17)
_MULTIPLE, _ODD = 4096, 1_000_003  # sizes of layers as they are, and any others
_DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i64": torch.int64,
    "fp8e4nv": torch.float8_e4m3fn, "i32": torch.int32, "i16": torch.int16, "u8": torch.uint8,
}  # fmt: skip


def _argument(kind: str, integer: int) -> Any:
    """An argument of a kind of a signature: a pointer to memory that begins at 16 bytes, a descriptor, an integer."""
    from triton.runtime.jit import MockTensor

    if kind.startswith("*"):
        return MockTensor(_DTYPES[kind[1:]])
    match = re.fullmatch(r"tensordesc<(\w+)\[(\d+), (\d+)\]>", kind)
    if match:
        from triton.tools.tensor_descriptor import TensorDescriptor

        block = [int(match[2]), int(match[3])]
        return TensorDescriptor.from_tensor(torch.empty(block, dtype=_DTYPES[match[1]]), block)
    return integer


def integers_of(case: Any) -> dict[str, int]:
    """The integer arguments of a case with sizes as they are: also strides of 1, which are constants in the end."""
    kinds = {n: _MULTIPLE if n in case.divisible else _ODD for n, kind in case.signature.items() if kind == "i32"}
    annotated = {p.name for p in case.kernel.params if p.is_constexpr}
    return kinds | {n: v for n, v in case.constexprs.items() if n not in annotated}


def launch(case: Any, target: Any, integers: dict[str, int]) -> Any:
    """Compile a case as a launch with these integers does, for the target of `bench.compile_driver`."""
    from spartan_kernels.backends.triton.launches import FUSED

    arguments = {name: _argument(kind, 0) for name, kind in case.signature.items() if kind != "i32"}
    wide = target.warp_size == 64 and case.fixed_threads
    warps = max(1, case.num_warps // 2) if wide else case.num_warps
    options = {"num_warps": warps, "num_stages": case.num_stages, **FUSED}
    if case.max_registers and target.backend == "cuda":
        options["maxnreg"] = case.max_registers
    return case.kernel.run(grid=(1,), warmup=True, **(case.constexprs | arguments | integers | options))


def edges(integers: dict[str, int], bounded: tuple[str, ...]) -> Iterator[tuple[str, dict[str, int]]]:
    """(what it is, integers) of every edge; `bounded` ones never come near 2^31."""
    for edge in EDGES:
        yield f"integers of {edge}", {n: min(edge, 17) if n in bounded else edge for n in integers}
    for name in integers:
        for edge in (1, EDGES[-1]):
            if edge == 1 or name not in bounded:
                yield f"{name} of {edge}", {n: edge if n == name else 17 for n in integers}


def refused(case: Any, target: Any) -> tuple[int, list[str]]:
    """How many kernels the edges of a case are, and which of its launches would fail, with the compiler's reason."""
    before, problems = compile_driver.compiled(case.kernel), []
    for label, integers in edges(integers_of(case), case.bounded):
        try:
            launch(case, target, integers)
        except Exception as error:  # any failure of the compiler is a line of the table
            problems.append(f"{label}: {first_line(error)}")
    return compile_driver.compiled(case.kernel) - before, problems


def first_line(error: Exception) -> str:
    """The first line of what a compiler says, without its reproducer."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
