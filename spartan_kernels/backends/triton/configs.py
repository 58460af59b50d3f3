"""Launch configurations: tile shapes and warps, and the cases that a compile check walks through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spartan_kernels import tiles

# Entries of one tile of the elementwise kernels; entries of rows that stay in registers, for each warp.
TILE = 2048
ENTRIES_PER_WARP = 512
# Longest row that stays in registers, without and with a cost for each entry.
MAX_RESIDENT_ROW = 8192
MAX_RESIDENT_ROW_WITH_COSTS = 4096
# Longest row that one program walks, reading it from the L2 cache; longer ones are shared, each by so many at most.
MAX_LONG_ROW = 1 << 17
MAX_PARTS = 128
LONG_ROW_TILE = 4096
LONG_ROW_WARPS = 8
# Chunk of the kernels that walk a list of tensors: two vector loads of 16 bytes in flight for each thread (twice as
# many spill under Triton 3.7). Two programs share a multiprocessor, if none takes more registers than this.
CHUNK = 2048
CHUNK_THREADS = 256
CHUNK_REGISTERS = 128
PROGRAMS_PER_PROCESSOR = 2
# Partial sums for each program, one for each of its threads.
LANES = CHUNK_THREADS
# Integer arguments of the kernels that walk a list. No load is wider for knowing them, so one of them that is 1 or a
# multiple of 16 is no reason to compile a kernel again (under Triton 3.6 a constant 1 does not even compile).
SIZES = ("n_tensors", "n_chunks", "n_programs", "capacity", "length")
# Memory for the entries near the hard threshold, kept from one pass to the next.
CANDIDATE_BYTES = 3 << 20
INTERPRETED_PROGRAMS = 3
SAMPLE = 8192
SAMPLE_WARPS = 8

_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv"}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration that is shipped: what a compile check builds for every target."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    label: str
    num_stages: int = 3
    tensor_cores: bool = False
    divisible: tuple[str, ...] = ()  # integer arguments taken to be multiples of 16, as Triton finds out at a launch
    vector_loads: bool = False
    max_registers: int | None = None
    fixed_threads: bool = False  # num_warps is for warps of 32 threads: half as many of 64
    targets: tuple[str, ...] = ()  # of the compile check; all of them where none is named
    bounded: tuple[str, ...] = ()  # integer arguments that no memory lets come near 2^31


def compile_case(
    kernel: Any,
    dtype: torch.dtype,
    options: dict[str, Any],
    label: str,
    types: dict[str, str],
    divisible: tuple[str, ...],
    targets: tuple[str, ...] = (),
    bounded: tuple[str, ...] = (),
    vector_loads: bool = False,
) -> CompileCase:
    """A kernel whose pointers are of its dtype but for those in `types`, without "_ptr"; options as a launch has them.

    One of products has a PRECISION.
    """
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {n: types.get(n[:-4], f"*{name_of(dtype)}") if n.endswith("_ptr") else "i32" for n in names}
    if options.get("TMA"):
        signature["x_ptr"] = f"tensordesc<{name_of(dtype)}[{options['BLOCK_M']}, {options['BLOCK_K']}]>"
    cores = "PRECISION" in options and (dtype != torch.float32 or options["PRECISION"] == "tf32")
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
    return CompileCase(
        kernel, signature, constants, warps, label, stages, cores, divisible, vector_loads,
        targets=targets, bounded=bounded,
    )  # fmt: skip


power_of_two = tiles.power_of_two


def vector_length(dtype: torch.dtype) -> int:
    """Entries of one 16-byte load."""
    return 16 // dtype.itemsize


def name_of(dtype: torch.dtype) -> str:
    """Triton's name of a value dtype."""
    return _TRITON_NAMES[dtype]


def fits_in_registers(values: torch.Tensor, costs: torch.Tensor | None) -> bool:
    """Whether the rows of values [rows, n] can stay in registers."""
    limit = MAX_RESIDENT_ROW if costs is None or costs.dim() == 0 else MAX_RESIDENT_ROW_WITH_COSTS
    return values.shape[1] <= limit


def fits_one_program(values: torch.Tensor) -> bool:
    """Whether a program can walk each of the rows of values [rows, n]; longer ones are shared by several."""
    return values.shape[1] <= MAX_LONG_ROW


def row_parts(values: torch.Tensor) -> tuple[int, int]:
    """(entries, parts): the parts in which programs share the rows of values [rows, n], of whole tiles but the last."""
    rows, n = values.shape
    tiles_of = -(-n // LONG_ROW_TILE)
    wanted = min(MAX_PARTS, tiles_of, max(1, program_limit(values.device) // rows))
    each = -(-tiles_of // wanted)
    return each * LONG_ROW_TILE, -(-tiles_of // each)


def forward_entries(n: int) -> int:
    """Entries for each warp of the soft forward pass over rows of n: more of them share what there is to do for a row.

    A thread does that for each row it has entries of: shorter rows must be few in a warp, or registers spill.
    """
    return 1024 if n > 1024 else 512 if n > 256 else 256


def row_tile(n: int, entries_per_warp: int = ENTRIES_PER_WARP) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for rows of n entries that stay in registers: short rows share a program."""
    block_n = power_of_two(n)
    block_m = max(1, min(128, TILE // 2 // block_n))
    # a thread for each of the short rows, at least
    warps = max(1, block_m // 32, min(16, block_m * block_n // entries_per_warp))
    return block_m, block_n, power_of_two(warps)


def block_tile(rows: int, columns: int, positions: int, grid_columns: int) -> tuple[int, int, int, int]:
    """(BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K): a tile of whole blocks, or of a part of one that is walked in steps."""
    block_k = power_of_two(positions)
    block_c = min(power_of_two(columns), max(1, TILE // block_k))
    block_r = min(power_of_two(rows), max(1, TILE // (block_k * block_c)))
    block_b = min(power_of_two(grid_columns), max(1, TILE // (block_k * block_c * block_r)))
    return block_r, block_b, block_c, block_k


def chunk_warps() -> int:
    """Warps of a program that walks a list: as many threads whatever the width of a warp, so that loads are as wide."""
    return CHUNK_THREADS // (32 if torch.version.hip is None else 64)


def register_limit() -> dict[str, int]:
    """The option that limits registers, which only Triton's compiler for NVIDIA has."""
    return {"maxnreg": CHUNK_REGISTERS} if torch.version.hip is None else {}


def candidate_capacity(programs: int, has_costs: bool) -> int:
    """Entries near the hard threshold that each program can keep: a key of 4 bytes, and a cost of 4."""
    return max(32, CANDIDATE_BYTES // (programs * (8 if has_costs else 4)) // 32 * 32)


def program_limit(device: torch.device) -> int:
    """Programs of a persistent grid on a device, where there is enough to do."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * PROGRAMS_PER_PROCESSOR


def program_count(device: torch.device, chunks: int) -> int:
    """Programs of a persistent grid: fixed for a device and a problem, so that sums are added in one order."""
    return max(1, min(chunks, program_limit(device)))


def program_block(device: torch.device) -> int:
    """Width of a read of what all programs found: that of the device, so that one kernel serves lists of any length."""
    return power_of_two(program_limit(device))
