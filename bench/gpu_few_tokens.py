"""Products of few tokens with packed single weights beside the dense one, on an H100: counted, not run.

A layer at rising sparsity, whose rows are about as long: by the bytes from memory, by the lines that an L1 cache reads
(one in a clock of a processor), and by the instructions of the rows' steps and of what each row takes besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from bench import gpu_counts
from spartan_kernels.break_even import TOKEN_GROUP, single_weights_lines
from spartan_kernels.h100 import BANDWIDTH, CLOCK, LAUNCH, PROCESSORS, SCHEDULERS, WARP

SIDE = 4096  # inputs and outputs of the layer
_ZEROS = (50, 60, 70, 80, 90, 95)  # percent
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class FewTokensRow:
    """A product of few tokens with packed single weights, `SIDE` by `SIDE`, beside the dense one.

    Attributes:
        instructions: of a warp for 32 weights.
        lines: of the L1 cache for 32 weights.
        memory, gather, issue: microseconds by the bytes, by the lines and by the instructions, those of each row too.
        microseconds: the slowest of these, and a launch.
        dense: of the dense product by its bytes, and a launch.
        ratio: dense / microseconds.
    """

    dtype: str
    tokens: int
    zeros: str
    instructions: float
    lines: float
    memory: float
    gather: float
    issue: float
    microseconds: float
    dense: float
    ratio: float


def count_few_tokens(dtype: torch.dtype, tokens: int) -> list[FewTokensRow]:
    """What it takes at rising sparsity, with all rows about as long."""
    label = f"tokens {min(tokens, TOKEN_GROUP)}, {_NAMES[dtype]}"
    subject = gpu_counts.Subject("single_weights", "_single_weights_kernel", label, dtype.itemsize + 2)
    case, _, trip = gpu_counts._compiled(subject)
    whole = gpu_counts._compiled(replace(subject, trips=1))[2]
    step, groups, rows = case.constexprs["WIDTH"], -(-tokens // TOKEN_GROUP), []
    dense = 1e6 * SIDE * SIDE * dtype.itemsize / BANDWIDTH + LAUNCH
    for zeros in _ZEROS:
        kept = SIDE * SIDE * (100 - zeros) // 100
        lines = single_weights_lines(1 - zeros / 100, dtype.itemsize, tokens)
        issued = whole["issue"] + (math.ceil(kept / SIDE / step) - 1) * trip["issue"]
        memory = 1e6 * kept * subject.bytes / BANDWIDTH
        gather = 1e6 * kept / WARP * lines / (PROCESSORS * CLOCK)
        issue = 1e6 * SIDE * groups * issued * case.num_warps / (PROCESSORS * SCHEDULERS * CLOCK)
        total = max(memory, gather, issue) + LAUNCH
        each = groups * trip["issue"] / (step // (case.num_warps * WARP))
        times = (round(n, 1) for n in (each, lines, memory, gather, issue, total, dense))
        rows.append(FewTokensRow(_NAMES[dtype], tokens, f"{zeros}%", *times, round(dense / total, 2)))
    return rows


def few_tokens_rows() -> list[FewTokensRow]:
    """All rows of that table."""
    cases = [(dtype, tokens) for dtype in (torch.bfloat16, torch.float32) for tokens in (1, 2, 4, 16)]
    return [row for case in cases for row in count_few_tokens(*case)]
