"""Kernels of a solve over the ranks of a process group: what a rank sends, and what it does once all have sent.

Each is one program. Every rank computes the same from the same messages, to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import SIZES
from spartan_kernels.backends.triton.global_passes import (
    ABOVE,
    BEST_REST,
    BEST_T,
    BINS,
    HISTOGRAM,
    MOMENTS,
    REST,
    ROOM,
)
from spartan_kernels.backends.triton.global_steps import FACTS, MESSAGE, moments_found, sampled
from spartan_kernels.backends.triton.primitives import T


@triton.jit(do_not_specialize=SIZES)
def _facts_kernel(
    table_ptr, partial_ptr, facts_ptr, sample_ptr, n_tensors, length, n_programs,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cost of this rank's entries, SHARE of them as (u, a) with a = 0 for none, and how many each stands for."""
    total = tl.program_id(0).to(tl.float64) + length
    if HAS_COSTS:
        at = tl.arange(0, BLOCK)
        total = tl.sum(tl.load(partial_ptr + at, at < n_programs, other=0.0), 0)
    u, a, live = sampled(table_ptr, n_tensors, length, DTYPE, HAS_COSTS, ABSOLUTE, SHARE)
    tl.store(facts_ptr, total)
    tl.store(facts_ptr + 1, tl.maximum((tl.program_id(0) + length).to(tl.float64) / SHARE, 1.0))
    entry_ptr = sample_ptr + 2 * FACTS + tl.arange(0, SHARE)
    tl.store(entry_ptr, u)
    tl.store(entry_ptr + SHARE, tl.where(live, a, 0.0))


@triton.jit(do_not_specialize=SIZES)
def _message_kernel(
    partial_ptr, tally_ptr, select_ptr, moments_ptr, costs_ptr, n_programs,
    SOFT: tl.constexpr, HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a survey found on this rank."""
    if SOFT:
        mass, slope, curvature, lowest, highest, live = moments_found(partial_ptr, n_programs, MOMENTS, BLOCK)
        tl.store(moments_ptr, mass)
        tl.store(moments_ptr + 1, slope)
        tl.store(moments_ptr + 2, curvature)
        tl.store(moments_ptr + 3, lowest)
        tl.store(moments_ptr + 4, highest)
        tl.store(moments_ptr + 5, live)
    if HARD:
        at, bins = tl.arange(0, BLOCK), tl.arange(0, BINS)
        tl.store(costs_ptr + MOMENTS, tl.load(select_ptr + ABOVE))
        tl.store(costs_ptr + MOMENTS + 1, tl.max(tl.load(tally_ptr + at, at < n_programs, other=0), 0))
        tl.store(costs_ptr + MESSAGE + bins, tl.load(select_ptr + HISTOGRAM + bins))


@triton.jit(do_not_specialize=SIZES)
def _ties_message_kernel(tally_ptr, costs_ptr, n_programs, BLOCK: tl.constexpr):
    """The cost at the cut on this rank; no number where nothing of it may be kept."""
    at = tl.arange(0, BLOCK)
    tl.store(costs_ptr, tl.sum(tl.load(tally_ptr + n_programs + at, at < n_programs, other=0), 0))


@triton.jit(do_not_specialize=SIZES)
def _settle_kernel(
    solve_ptr, select_ptr, costs_ptr, rank, SOFT: tl.constexpr, HARD: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """The best trial is the threshold; of what is left for the cut, ranks before this one take first."""
    if SOFT:
        t, rest = tl.load(solve_ptr + BEST_T), tl.load(solve_ptr + BEST_REST)
        tl.debug_barrier()
        tl.store(solve_ptr + T, t)
        tl.store(solve_ptr + REST, rest)
    if HARD:
        room, at = tl.load(select_ptr + ROOM), tl.arange(0, RANKS)
        before = tl.sum(tl.load(costs_ptr + at, at < rank, other=0), 0)
        tl.debug_barrier()
        if room > 0:
            tl.store(select_ptr + ROOM, tl.maximum(room - before, 0))
