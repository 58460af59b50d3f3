"""Instructions and bytes for each entry of the Triton kernels on an H100, and the time they allow: counted, not run.

Instructions are those of the hot loop in sm_90 machine code (`bench.sass`), over the entries that a thread handles in
one trip; bytes are those of the launch plans. A kernel takes at least as long as its bytes take the memory, and as long
as its busiest pipe: a scheduler issues one instruction of 32 threads in a clock, and pipes are narrower than that.
`python -m bench.gpu_counts` prints the tables, `--save` writes them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import gpu_plan, sass
from bench.columns import print_columns, write_rows
from bench.gpu_plan import PlanRow
from spartan_kernels.h100 import BANDWIDTH, CLOCK, LAUNCH, PROCESSORS, SCHEDULERS, WARP

RESULTS = Path(__file__).resolve().parent / "results"
TABLES = {
    RESULTS / "gpu-counts.csv": "Instructions and bytes for each entry, counted for an H100: nothing was run",
    RESULTS / "gpu-counts-products.csv": "What the products reach by their counts, for an H100: nothing was run",
    RESULTS / "gpu-operations.csv": "What a call takes at least, by these counts",
    RESULTS / "gpu-few-tokens.csv": "Few tokens and packed single weights, counted for an H100: nothing was run",
}
ENTRIES = 25_600_000
TENSOR_CORE_RATE = 2048  # multiply-adds of bfloat16 in a clock of a processor
# What rows do not come by that their first round solves, as it does normal values (`tests/test_triton_launch_plan.py`):
# logarithms, which begin with an exponent made a float, and products in float64.
LEFT_ROWS = r"DFMA|I2FP"
# Most instructions for each entry: today's counts with this version of Triton, and a margin.
COUNTED_WITH = "3.9.0"
LIMITS = {
    ("_survey_kernel", "fp32", "few near the cut"): 25.0,
    ("_survey_kernel", "fp32", "many near the cut"): 53.0,
    ("_write_kernel", "fp32", ""): 22.5,
    ("_gradient_write_kernel", "fp32", ""): 21.5,
    ("_soft_topk_forward_kernel", "rows of 4, fp32", ""): 104.0,
    ("_soft_topk_forward_kernel", "rows of 4096, fp32", ""): 67.0,
    ("_single_weights_kernel", "tokens 1, bf16", ""): 15.5,
    ("_single_weights_kernel", "tokens 4, bf16", ""): 34.0,
}
ATOMICS = r"ATOM|RED[.\b]|REDG"
BARRIERS = r"BAR"


@dataclass(frozen=True)
class Subject:
    """A kernel, which of its compile cases, and how its machine code is read.

    Attributes:
        bytes: what it moves for each entry.
        trips: how often the hot loop runs over the same entries, beside what runs once; 0: the loop is the whole walk.
        rare: what ordinary entries do not come by (`bench.sass.Graph`).
        note: what is ordinary, where a kernel is listed twice.
    """

    module: str
    kernel: str
    label: str
    bytes: float
    trips: int = 0
    rare: str = ATOMICS
    note: str = ""


@dataclass(frozen=True)
class CountRow:
    """What one kernel issues and moves for each entry.

    Attributes:
        entries: that a thread handles in one trip of the loop.
        instructions: issued for each.
        cycles: of a scheduler for each, on the busiest pipe.
        microseconds: for 25.6 million entries, by the slower of memory and processors.
    """

    kernel: str
    configuration: str
    note: str
    registers: int
    shared: int
    stages: int
    entries: int
    instructions: float
    cycles: float
    pipe: str
    bytes: float
    memory_microseconds: float
    microseconds: float
    bound: str


@dataclass(frozen=True)
class ProductRow:
    """What one product issues while the tensor cores are busy for one clock, and the rate that this and bytes allow.

    Attributes:
        instructions: of a scheduler in the time in which full tensor cores do one clock's work: above 1 they wait.
        issue: 10^12 operations a second by that.
        plan: by the bytes from the L2 cache (`bench.gpu_plan`).
        predicted: by the slower of the two, after the pass that multiplies weights by their gates.
        bound: by the bytes of x alone, or by the tensor cores.
        part: of the bound that is predicted.
    """

    shape: str
    block: str
    product: str
    tile: str
    registers: int
    shared: int
    stages: int
    instructions: float
    issue: float
    plan: float
    predicted: float
    bound: float
    part: float


def _walks() -> list[Subject]:
    """The passes over a list of tensors: bytes of float32 and bfloat16, with a cost for each entry twice as many."""
    found = []
    for label, size in (("fp32", 4), ("costs, fp32", 8), ("bf16", 2)):
        value, wide = (2 if size == 2 else 4), size
        walk = "global_solve"
        found += [
            Subject(walk, "_survey_kernel", label, wide, note="few near the cut"),
            Subject(walk, "_survey_kernel", label, wide, rare="", note="many near the cut"),
            Subject(walk, "_write_kernel", label, wide + value + 1, rare=BARRIERS),
            Subject(walk, "_gradient_sums_kernel", label, wide + value),
            Subject(walk, "_gradient_write_kernel", label, wide + value + value * (1 + (size == 8))),
        ]
    return found


def _rows() -> list[Subject]:
    """Rows in registers: a first round of the search, and all else once; hard rows: a trip for each bit of a key."""
    found = []
    lengths = [(f"rows of {n}, fp32", 4) for n in (4, 32, 256, 1024, 4096)]
    for label, value in (*lengths, ("rows of 4096, bf16", 2)):
        found.append(Subject("soft_topk_rows", "_soft_topk_forward_kernel", label, 2 * value, 1, rare=LEFT_ROWS))
        found.append(Subject("soft_topk_rows", "_soft_topk_backward_kernel", label, 3 * value, 1))
    found.append(Subject("hard_topk", "_hard_topk_forward_kernel", "rows of 4096, fp32", 5, 32))
    found.append(Subject("long_rows", "_long_soft_topk_forward_kernel", "fp32", 4, note="a trial"))
    return found


def _weights() -> list[Subject]:
    """The masked weight and its gradient, where each entry is a block and where blocks are 32 x 32."""
    per_entry = {
        "_masked_weight_forward_kernel": (8, 5),
        "_masked_weight_backward_kernel": (12, 5),
        "_block_scores_kernel": (4, 4),
    }  # bytes of float32 weights, and of what there is for each block
    return [
        Subject("masked_weight", kernel, label, entry + of_block / block, 1)
        for kernel, (entry, of_block) in per_entry.items()
        for label, block in (("block 1, 1-dim, fp32", 1), ("block 32, 2-dim, fp32", 1024))
    ]


def _single_weights() -> list[Subject]:
    """Few tokens and packed single weights: bytes of a kept weight with its column."""
    cases = [(tokens, name, size) for name, size in (("fp32", 4), ("bf16", 2)) for tokens in (1, 2, 4)]
    kernel = "_single_weights_kernel"
    return [Subject("single_weights", kernel, f"tokens {n}, {name}", size + 2) for n, name, size in cases]


def subjects() -> list[Subject]:
    """All that is counted by entry."""
    return [*_walks(), *_rows(), *_weights(), *_single_weights()]


def _case_of(subject: Subject) -> int:
    """Index of the compile case, on sm_90."""
    cases = importlib.import_module(f"spartan_kernels.backends.triton.{subject.module}").COMPILE_CASES
    for index, case in enumerate(cases):
        same = case.kernel.fn.__name__ == subject.kernel and case.label == subject.label
        if same and (not case.targets or "sm_90" in case.targets):
            return index
    raise ValueError(f"{subject.module} has no case {subject.label} of {subject.kernel} for sm_90")


def per_trip(constants: dict[str, Any]) -> int:
    """Entries of a program in one trip of its loop; multiply-adds of a product."""
    if "WIDTH" in constants:
        return int(constants["ROWS"] * constants["WIDTH"])
    if "BLOCK_T" in constants:
        return int(constants["BLOCK_R"] * constants["BLOCK_C"] * constants["BLOCK_T"])
    if "SPAN" in constants:
        return int(constants["BLOCK_M"] * constants["BLOCK_N"] * constants["BLOCK_K"])
    if "BLOCK_B" in constants:
        return int(constants["BLOCK_R"] * constants["BLOCK_B"] * constants["BLOCK_C"] * constants["BLOCK_K"])
    if "BLOCK_M" in constants:
        return int(constants["BLOCK_M"] * constants["BLOCK_N"])
    return int(constants.get("CHUNK") or constants["TILE"])


def disassembly(cubin: bytes) -> str:
    """The listing of machine code by `nvdisasm`, which comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def busy(text: str, subject: Subject) -> Counter[str]:
    """Cycles by pipe for the entries of one trip, `issue` among them."""
    graph = sass.Graph(text, subject.kernel, subject.rare)
    loop = graph.hot_loop()
    if loop is None:
        return sass.pipes(graph.longest())
    trip = sass.pipes(graph.longest(loop.body, loop.head))
    if not subject.trips:
        return trip
    whole = sass.pipes(graph.longest())  # with the loop once
    return whole + Counter({pipe: (subject.trips - 1) * count for pipe, count in trip.items()})


def _compiled(subject: Subject) -> tuple[Any, Any, Counter[str]]:
    """Compile a kernel for sm_90, as a launch does: its case, the kernel, and cycles by pipe for one trip."""
    from bench import gpu_compile, launch_arguments

    target = next(t for t in gpu_compile.TARGETS if t.name == "sm_90")
    case, _ = gpu_compile.case_of(subject.module, _case_of(subject), target)
    compiled = launch_arguments.launch(case, target, launch_arguments.integers_of(case))
    return case, compiled, busy(disassembly(compiled.asm["cubin"]), subject)


def _registers(compiled: Any) -> int:
    from bench import gpu_compile

    return gpu_compile.cuda_resources(compiled.asm["cubin"], compiled.asm["ptx"])[0]


def count(subject: Subject) -> CountRow:
    """What a kernel needs for each entry."""
    case, compiled, pipes = _compiled(subject)
    each = per_trip(case.constexprs) // (case.num_warps * WARP)
    pipe, cycles = max(pipes.items(), key=lambda item: (item[1], item[0] == "issue"))
    memory = subject.bytes * ENTRIES / BANDWIDTH
    processors = cycles / each * ENTRIES / (PROCESSORS * SCHEDULERS * WARP * CLOCK)
    return CountRow(
        subject.kernel.strip("_"),
        subject.label,
        subject.note,
        _registers(compiled),
        compiled.metadata.shared,
        case.num_stages,
        each,
        round(pipes["issue"] / each, 1),
        round(cycles / each, 1),
        pipe,
        round(subject.bytes, 2),
        round(1e6 * memory, 1),
        round(1e6 * max(memory, processors), 1),
        "memory" if memory >= processors else "processors",
    )


def count_product(row: PlanRow) -> ProductRow:
    """What a product of a plan needs for each clock of the tensor cores, and the rate that is left."""
    kernel, label = row.case
    case, compiled, pipes = _compiled(Subject("masked_matmul", kernel, label, 0))
    rate = TENSOR_CORE_RATE * 2 // row.width
    clocks = per_trip(case.constexprs) / rate
    issued = pipes["issue"] * case.num_warps / SCHEDULERS / clocks
    fastest = 2 * rate * PROCESSORS * CLOCK / 1e12
    issue = row.full * fastest / max(1.0, issued)
    milliseconds = row.gigaflops / min(issue, row.plan) + 1e-3 * row.scaling_microseconds
    predicted = row.gigaflops / milliseconds
    return ProductRow(
        row.shape,
        row.block,
        row.direction,
        row.tile,
        _registers(compiled),
        compiled.metadata.shared,
        case.num_stages,
        round(issued, 2),
        round(issue, 1),
        row.plan,
        round(predicted, 1),
        row.bound,
        round(predicted / row.bound, 2),
    )


def counted(workers: int) -> tuple[list[CountRow], list[ProductRow]]:
    """All subjects, in their order; kernels that are compiled already come from Triton's cache."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows, multiplied = pool.map(count, subjects()), pool.map(count_product, list(gpu_plan.plan_rows()))
        return list(rows), list(multiplied)


@dataclass(frozen=True)
class OperationRow:
    """What a call launches and takes at least: the times of its passes, and `LAUNCH` for each launch.

    Attributes:
        launches: in all, and those that find something to do.
        limit: the time that its bytes alone take the memory.
    """

    operation: str
    launches: int
    working: int
    bytes: float
    limit_microseconds: float
    microseconds: float


def operations(rows: list[CountRow]) -> list[OperationRow]:
    """Solves of one tensor of 25.6 million values for a soft and a hard mask, and rows of 4096."""
    found = {(row.kernel, row.configuration, row.note): row for row in rows}

    def passed(operation: str, launches: int, working: int, *passes: tuple[str, str, str]) -> OperationRow:
        kernels = [found[which] for which in passes]
        memory = sum(row.memory_microseconds for row in kernels)
        total = sum(row.microseconds for row in kernels) + launches * LAUNCH
        moved = round(sum(row.bytes for row in kernels), 2)
        return OperationRow(operation, launches, working, moved, round(memory, 1), round(total, 1))

    made = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        always, cold, launches = _launches(dtype)
        few, many = ("survey_kernel", name, "few near the cut"), ("survey_kernel", name, "many near the cut")
        write = ("write_kernel", name, "")
        made.append(passed(f"solve from a state, {name}", launches, always, few, write))
        made.append(passed(f"first solve, {name}", launches, always + cold, many, few, write))
        rows_of = f"rows of 4096, {name}"
        made.append(passed(f"{rows_of}", 1, 1, ("soft_topk_forward_kernel", rows_of, "")))
        made.append(passed(f"{rows_of}, gradient", 1, 1, ("soft_topk_backward_kernel", rows_of, "")))
    return made


def _launches(dtype: torch.dtype) -> tuple[int, int, int]:
    """Launches of a solve that always work, those of a first one besides, and all."""
    from spartan_kernels.backends.triton.global_solve import GlobalSolve
    from spartan_kernels.backends.triton.tensor_list import TensorList

    values, one = [torch.empty(5000, dtype=dtype)], torch.ones((), dtype=torch.float64)
    problem = TensorList(values, [])
    solve = GlobalSolve(problem.shape, True, True, True)
    plan = solve.plan(problem.table(values, values), one, one, one, one, solve.workspace())
    when = [launch.when for launch in plan]
    return when.count("always"), when.count("cold"), len(plan)


def report(rows: Sequence[Any], title: str) -> None:
    """Print a table of rows of one kind."""
    header = [field.name.replace("_", " ") for field in fields(rows[0])]
    lines = [[str(value) for value in astuple(row)] for row in rows]
    print(f"\n{title}")
    print_columns(header, lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--save", action="store_true", help="write the tables, which the documentation shows")
    options = parser.parse_args(arguments)
    from bench.gpu_few_tokens import few_tokens_rows

    rows, multiplied = counted(options.workers)
    tables: list[Sequence[Any]] = [rows, multiplied, operations(rows), few_tokens_rows()]
    for (path, title), table in zip(TABLES.items(), tables, strict=True):
        report(table, title)
        if options.save:
            write_rows(type(table[0]), table, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
