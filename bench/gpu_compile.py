"""Compile every GPU kernel that is shipped, for every target, without a GPU; fail on what could not run well.

`python -m bench.gpu_compile` builds each Triton kernel in each configuration of `COMPILE_CASES`, as a launch builds it,
and each CUDA source where `nvcc` is found, and prints registers, spilled bytes, shared memory, how many programs a
processor holds, tensor-core instructions and copies ahead of the arithmetic; then what a first training step compiles,
the bytes that the plans of the products move, and instructions for each entry (`bench.gpu_counts`). For sm_90 one
configuration of each kernel is launched with integers of 1, 15, 16, 17 and past 2^31 as well, and everything is
repeated under other versions of Triton, which are installed beside this one once. The exit status is 1 when a kernel
does not compile, spills, needs more shared memory than the target has, or lacks tensor-core instructions (on sm_90
those of a warp group, for many tokens) or 16-byte loads it should have.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import gpu_counts, gpu_plan, tritons
from bench.columns import print_columns, write_rows

ROOT = Path(__file__).resolve().parent.parent
SAVED = ROOT / "bench" / "results" / "gpu-compile.csv"
SAVED_PLANS = SAVED.with_name("gpu-plan.csv")
MODULES = (
    "masked_weight",
    "soft_topk_rows",
    "long_rows",
    "split_rows",
    "hard_topk",
    "long_hard",
    "global_solve",
    "ranked_solve",
    "masked_matmul",
    "masked_conv",
    "single_weights",
)


@dataclass(frozen=True)
class Target:
    """A GPU architecture; `shared_limit` and `shared` bytes of memory for one block of threads, and for all of them."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    shared: int

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """How many blocks of `warps` warps a processor holds at a time, by its registers, shared memory and warps."""
        registers = max(8, -(-registers // 8) * 8)
        if self.backend == "hip":  # four units of 512 registers a lane, for 8 waves at most
            held, reserved = 4 * min(8, 512 // registers), 0
        else:  # four units of 16384 registers, for 16 warps at most; each block takes 1 KiB more than it asks for
            held, reserved = 4 * min(16, 16384 // (32 * registers)), 1 << 10
        return min(32, held // warps, self.shared // max(1, shared + reserved))


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 << 10, 164 << 10),
    Target("sm_90", "cuda", 90, 32, 227 << 10, 228 << 10),
    Target("sm_100", "cuda", 100, 32, 227 << 10, 228 << 10),
    Target("gfx942", "hip", "gfx942", 64, 64 << 10, 64 << 10),
)
# in machine code: products on the tensor cores, and loads that run ahead of the arithmetic into shared memory
_MATRIX_INSTRUCTIONS = {
    "cuda": re.compile(r"\b((?:UTC)?[HQ]G?MMA)\b"),
    "hip": re.compile(r"^\s*v_(mfma)", re.MULTILINE),
}
_COPY_INSTRUCTIONS = {
    "cuda": re.compile(r"\b(?:LDGSTS|UTMALDG)\b"),
    "hip": re.compile(r"^\s*buffer_load\w+ .* lds", re.MULTILINE),
}
_WARP_GROUP = 64  # tokens from which on a product of Hopper's takes the instructions of a whole warp group


@dataclass(frozen=True)
class Row:
    """What one kernel needs on one target; `problem` says why it must not be shipped so."""

    kernel: str
    label: str
    target: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    matrix: int = 0
    copies: int = 0
    instruction: str = ""  # of the tensor cores
    resident: int = 0  # programs that a processor holds; 0 where the launch decides
    problem: str = ""
    triton: str = ""  # the version that compiled it; none for CUDA C++


_VECTOR_LOADS = re.compile(r"ld\.global[\w.:]*\.v(?:4\.b32|2\.b64)|(?:global|buffer)_load_dwordx4")


def _judged(row: Row, target: Target, tensor_cores: bool) -> Row:
    if row.problem:
        return row
    if row.spilled:
        return replace(row, problem=f"spills {row.spilled} bytes")
    if row.shared > target.shared_limit:
        return replace(row, problem=f"shared memory {row.shared} of {target.shared_limit} bytes")
    if tensor_cores and not row.matrix:
        return replace(row, problem="no tensor-core instruction")
    if tensor_cores and target.backend == "cuda" and not row.copies:
        return replace(row, problem="no loads ahead of the arithmetic")
    return row


def cuda_resources(cubin: bytes, ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes. A stack without spills is what a called division or logarithm takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = _nvidia("cuobjdump", "-res-usage", str(path))
        registers, stack = int(_found(r"REG:(\d+)", text)), int(_found(r"STACK:(\d+)", text))
        if not stack:
            return registers, 0
        path = path.with_suffix(".ptx")
        path.write_text(ptx)
        arch = _found(r"\.target (\w+)", ptx)
        text = _nvidia("ptxas-blackwell", "-v", f"-arch={arch}", "-o", str(path.with_suffix(".out")), str(path))
    spilled = int(_found(r"(\d+) bytes spill stores", text)) + int(_found(r"(\d+) bytes spill loads", text))
    return registers, spilled


def machine_code(cubin: bytes) -> str:
    """The listing of the instructions of NVIDIA's GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return _nvidia("cuobjdump", "-sass", str(path))


def _nvidia(tool: str, *arguments: str) -> str:
    """What one of the tools that come with Triton reports."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch; scalar registers that move to vector lanes cost no memory.

    Where a function is called, its scratch is what it saves for its caller; what is spilled is counted by register.
    """
    scratch = int(_found(r"\.private_segment_fixed_size:\s+(\d+)", assembly))
    if "s_swappc" in assembly:
        scratch = 4 * int(_found(r"\.vgpr_spill_count:\s+(\d+)", assembly))
    return int(_found(r"\.vgpr_count:\s+(\d+)", assembly)), scratch


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's report has no {pattern}: {text[:200]}")
    return match.group(1)


def case_of(module: str, index: int, target: Target, purpose: str = "") -> tuple[Any, Row]:
    """Case `index` of a module of the Triton backend, its row so far, and Triton made to compile for the target."""
    import triton

    from bench import compile_driver

    warnings.filterwarnings("ignore")
    compile_driver.use(target.backend, target.arch, target.warp_size, purpose)
    case = importlib.import_module(f"spartan_kernels.backends.triton.{module}").COMPILE_CASES[index]
    return case, Row(case.kernel.fn.__name__.strip("_"), case.label, target.name, triton=triton.__version__)


def compile_edges(module: str, index: int, target: Target) -> Row:
    """Compile a case with integers at the edges of what Triton specialises: a kernel for each combination it makes.

    Machine code is not optimised here: whether it spills is the business of `compile_triton`.
    """
    import triton

    from bench import launch_arguments

    case, row = case_of(module, index, target, "edges")
    triton.knobs.nvidia.disable_ptxas_opt = True
    try:
        kernels, problems = launch_arguments.refused(case, target)
    finally:
        triton.knobs.nvidia.disable_ptxas_opt = False
    row = replace(row, label=f"{row.label}, {kernels} kernels at the edges of its integers")
    return replace(row, problem=f"would not launch with {problems[0]}") if problems else row


def compile_triton(module: str, index: int, target: Target) -> Row:
    """Compile case `index` of a module of the Triton backend, as a launch does."""
    from bench import launch_arguments

    case, row = case_of(module, index, target)
    warps = max(1, case.num_warps * 32 // target.warp_size) if case.fixed_threads else case.num_warps
    try:
        compiled = launch_arguments.launch(case, target, launch_arguments.integers_of(case))
    except Exception as error:  # any failure of the compiler is a line of the table
        return replace(row, problem=f"does not compile: {launch_arguments.first_line(error)}")
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spilled = cuda_resources(compiled.asm["cubin"], text)
        # a listing takes as long as compiling does; where nothing is multiplied, nothing in it is asked for
        code = machine_code(compiled.asm["cubin"]) if case.tensor_cores else ""
    else:
        code = text = compiled.asm["amdgcn"]
        registers, spilled = _amd_resources(text)
    matrix, shared = _MATRIX_INSTRUCTIONS[target.backend].findall(code), compiled.metadata.shared
    row = replace(
        row,
        registers=registers,
        spilled=spilled,
        shared=shared,
        matrix=len(matrix),
        copies=len(_COPY_INSTRUCTIONS[target.backend].findall(code)),
        instruction=max(matrix, key=matrix.count, default=""),
        resident=target.resident(registers, shared, warps),
    )
    row = _judged(row, target, case.tensor_cores)
    if target.name == "sm_90" and case.tensor_cores and not row.problem:
        row = replace(row, problem=_hopper_problem(case, row))
    if case.vector_loads and not row.problem and not _VECTOR_LOADS.search(text):
        return replace(row, problem="no 16-byte load")
    return row


def _hopper_problem(case: Any, row: Row) -> str:
    """Why a product of many tokens would be slow on an H100: not by warp groups, or with no two steps under way."""
    m, n, k = (case.constexprs.get(f"BLOCK_{side}", 0) for side in "MNK")
    if m < _WARP_GROUP:
        return ""
    precision = case.constexprs["PRECISION"]
    wanted = "QGMMA" if precision == "promoted" else "HGMMA"  # 8 bits, or more
    if row.instruction != wanted:
        return f"{row.instruction}, not {wanted}"
    step = (m + n) * k * {"tf32": 4, "promoted": 1}.get(precision, 2)
    return (
        "" if row.shared >= 2 * step else f"shared memory of {row.shared} for steps of {step} bytes: no two under way"
    )


_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


# kernels of csrc/cuda that must use the tensor cores, and those that must load ahead of the arithmetic
_CUDA_TENSOR_CORES = re.compile(r"(product|sampled)_kernel<(__half|__nv_bfloat16|Tf32)")
_CUDA_COPIES = re.compile(r"(product|sampled)_kernel<.*true>")


def _sass_counts(cubin: Path) -> dict[str, tuple[int, int, str]]:
    """For each kernel of a file: tensor-core instructions, copies of 16 bytes past the registers, which they are."""
    counts = {}
    for part in _nvidia("cuobjdump", "-sass", str(cubin)).split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        matrix = _MATRIX_INSTRUCTIONS["cuda"].findall(code)
        copies = len(re.findall(r"LDGSTS[.\w]*\.128", code))
        counts[name.strip()] = (len(matrix), copies, max(matrix, key=matrix.count, default=""))
    return counts


def compile_cuda(source: Path, target: Target) -> list[Row]:
    """Compile one file of csrc/cuda for one architecture: a row for each of its kernels.

    Shared memory is what kernels declare; what the products ask for at their launch is less than 99 KiB everywhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin", f"-arch={target.name}", "-Xptxas=-v",
            "-o", f"{folder}/out.cubin", str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        sass = {} if done.returncode else _sass_counts(Path(folder, "out.cubin"))
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:120])
        return [Row(source.name, "CUDA", target.name, problem=f"does not compile: {first[:120]}")]
    rows = []
    for match in _PTXAS.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        row = Row(
            _readable(match["name"]),
            f"CUDA, {source.name}",
            target.name,
            int(match["registers"]),
            int(match["stores"]) + int(match["loads"]),
            int(shared.group(1)) if shared else 0,
            *sass[match["name"]],
        )
        row = _judged(row, target, tensor_cores=False)
        if not row.problem and _CUDA_TENSOR_CORES.search(row.kernel) and not row.matrix:
            row = replace(row, problem="no tensor-core instruction")
        if not row.problem and _CUDA_COPIES.search(row.kernel) and not row.copies:
            row = replace(row, problem="no loads ahead of the arithmetic")
        rows.append(row)
    return rows


def _readable(mangled: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    text = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "").replace("spartan::cuda::", "").removeprefix("void ")
    return text.partition("(")[0]


def _jobs(pattern: str) -> list[tuple[str, int, Any]]:
    """Module, index and case of everything whose kernel or module matches."""
    return [
        (module, index, case)
        for module in MODULES
        for index, case in enumerate(importlib.import_module(f"spartan_kernels.backends.triton.{module}").COMPILE_CASES)
        if re.search(pattern, f"{module} {case.kernel.fn.__name__}")
    ]


def run(pattern: str, targets: tuple[Target, ...], workers: int, cuda: bool = True) -> list[Row]:
    """Compile everything whose kernel, module or file matches `pattern`; rows in a fixed order.

    Edges are compiled for one target, the first of NVIDIA's, and for one configuration of each kernel: what fails there
    fails in Triton's own passes, which are the same for all.
    """
    edges_on = next((t for t in targets if t.name == "sm_90"), targets[0])
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs, seen = [], set()
        for module, index, case in _jobs(pattern):
            here = [t for t in targets if not case.targets or t.name in case.targets]
            jobs += [pool.submit(compile_triton, module, index, target) for target in here]
            if case.kernel.fn.__name__ not in seen and edges_on in here:
                seen.add(case.kernel.fn.__name__)
                jobs.append(pool.submit(compile_edges, module, index, edges_on))
        rows = [job.result() for job in jobs]
        if cuda and shutil.which("nvcc"):
            sources = [s for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if re.search(pattern, s.name)]
            built = [
                pool.submit(compile_cuda, source, target)
                for source in sources
                for target in targets
                if target.backend == "cuda"
            ]
            rows += [row for job in built for row in job.result()]
    return rows


def run_under(version: str, pattern: str, workers: int) -> list[Row]:
    """The rows of the Triton kernels on sm_90 under another version of Triton, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        try:
            place = tritons.folder_of(version)
        except RuntimeError as error:
            return [Row("all", "", "", triton=version, problem=str(error))]
        command = [sys.executable, "-m", "bench.gpu_compile", pattern, "--target", "sm_90", "--workers", str(workers)]
        done = subprocess.run(
            [*command, "--rows", str(path)], env=tritons.environment(place), cwd=ROOT, capture_output=True, text=True
        )
        if not path.exists():
            reason = (done.stderr.strip() or "it ended").splitlines()[-1][:120]
            return [Row("all", "", "sm_90", triton=version, problem=f"the check itself failed: {reason}")]
        with path.open(newline="") as file:
            types = {field.name: int if field.type == "int" else str for field in dataclasses.fields(Row)}
            return [Row(**{k: types[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]


def report(rows: list[Row]) -> None:
    """Print the table."""
    header = (
        "kernel",
        "configuration",
        "target",
        "regs",
        "spill",
        "shared",
        "resident",
        "matrix",
        "copies",
        "triton",
        "",
    )
    lines = [
        (
            *(r.kernel, r.label, r.target, str(r.registers), str(r.spilled), str(r.shared), str(r.resident or "")),
            *(f"{r.matrix} {r.instruction}".strip(), str(r.copies), r.triton, r.problem),
        )
        for r in rows
    ]
    print_columns(header, lines)
    bad = sum(bool(r.problem) for r in rows)
    print(f"\n{len(rows)} kernels compiled, {bad} not fit to ship. Compiled only: nothing here has run on a GPU.")
    if not shutil.which("nvcc"):
        print("nvcc was not found: the CUDA sources were left out.")


def main(arguments: list[str] | None = None) -> int:
    """Command line: 1 when a kernel is not fit to ship or none matched, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression on kernel, module or file names")
    parser.add_argument("--target", choices=[t.name for t in TARGETS], action="append")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--tritons",
        nargs="*",
        help=f"other versions of Triton (those of {', '.join(tritons.VERSIONS)}); none: skip them",
    )
    parser.add_argument("--rows", type=Path, help="write the rows of this Triton's kernels as CSV, and do no more")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}, which the documentation shows")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    targets = tuple(t for t in TARGETS if not options.target or t.name in options.target)
    rows = run(options.pattern, targets, options.workers, cuda=options.rows is None)
    ordered = sorted(rows, key=dataclasses.astuple)
    if options.rows:
        write_rows(Row, ordered, options.rows)
        return 0
    wanted = tritons.others(version("triton")) if options.tritons is None else options.tritons
    for other in wanted:
        rows += run_under(other, options.pattern, options.workers)
    report(rows)
    if wanted or options.tritons is None:
        subprocess.run([sys.executable, "-m", "bench.first_step"], cwd=ROOT, check=True)
    plans = list(gpu_plan.plan_rows())
    gpu_plan.report(plans)
    if options.save:
        write_rows(Row, ordered, SAVED)
        write_rows(gpu_plan.PlanRow, plans, SAVED_PLANS)
    if not options.pattern:
        gpu_counts.main(["--workers", str(options.workers), *(["--save"] if options.save else [])])
    return int(not rows or any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
