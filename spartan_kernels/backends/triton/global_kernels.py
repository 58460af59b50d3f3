"""The kernels of a solve that hand over: the program of a launch that is done last takes the step to the next one.

A step reads what all programs have found. Each stores that before it draws a ticket, so whoever draws the last one sees
all of it, and no launch of one program stands between two passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import SIZES
from spartan_kernels.backends.triton.global_passes import HARD_DONE, MOMENTS, SOFT_DONE, TICKET, survey, write_masks
from spartan_kernels.backends.triton.global_steps import advance, finish, remember


@triton.jit
def _is_last(select_ptr):
    """Whether this program is the last of its launch to come here; it leaves the tickets as they were."""
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(select_ptr + TICKET, 1) == tl.num_programs(0) - 1
    if last:
        tl.atomic_xchg(select_ptr + TICKET, 0)
    return last


@triton.jit(do_not_specialize=SIZES)
def _survey_kernel(
    table_ptr, solve_ptr, select_ptr, partial_ptr, tally_ptr, keys_ptr, prices_ptr, n_tensors, n_chunks, capacity,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    """A survey, and with ADVANCE the step after it."""
    survey(
        table_ptr, solve_ptr, select_ptr, partial_ptr, tally_ptr, keys_ptr, prices_ptr, n_tensors, n_chunks, capacity,
        DTYPE, HAS_COSTS, ABSOLUTE, ALIGNED, SOFT, HARD, CHUNK, LANES, VECTOR,
    )  # fmt: skip
    if ADVANCE:
        # asked again: kept since the survey began, the answer would take a register
        is_open = (SOFT and tl.load(solve_ptr + SOFT_DONE) == 0.0) or (HARD and tl.load(select_ptr + HARD_DONE) == 0)
        if is_open and _is_last(select_ptr):
            advance(
                solve_ptr, select_ptr, partial_ptr, tally_ptr, tl.num_programs(0), capacity,
                SOFT, HARD, BINS, BLOCK, MOMENTS, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _advance_kernel(
    solve_ptr, select_ptr, partial_ptr, tally_ptr, n_programs, capacity,
    SOFT: tl.constexpr, HARD: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The step after a survey of several ranks; one program."""
    advance(
        solve_ptr, select_ptr, partial_ptr, tally_ptr, n_programs, capacity, SOFT, HARD, BINS, BLOCK, STRIDE, True
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _write_kernel(
    table_ptr, solve_ptr, select_ptr, tally_ptr, partial_ptr, state_ptr, threshold_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, AGAIN: tl.constexpr, FINISH: tl.constexpr, HAS_STATE: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The masks; unless AGAIN, also what is remembered, with FINISH after the search for what they missed."""
    write_masks(
        table_ptr, solve_ptr, select_ptr, tally_ptr, partial_ptr, n_tensors, n_chunks,
        DTYPE, HAS_COSTS, ABSOLUTE, ALIGNED, SOFT, HARD, AGAIN, CHUNK, LANES, VECTOR, BLOCK,
    )  # fmt: skip
    if AGAIN == 0:
        if _is_last(select_ptr):
            if FINISH:
                finish(
                    table_ptr, solve_ptr, partial_ptr, n_chunks, tl.num_programs(0),
                    DTYPE, HAS_COSTS, ABSOLUTE, ALIGNED, CHUNK, LANES, VECTOR, BLOCK,
                )  # fmt: skip
                tl.debug_barrier()
            remember(state_ptr, threshold_ptr, solve_ptr, select_ptr, HAS_STATE)
