"""Planted faults of every kind are found by the recorder, and sound kernels pass.

Runs in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/triton_races`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton and TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from tests.triton_races.recorder import RaceError, poisoned, recording


@triton.jit
def _shared_sum_kernel(x_ptr, sum_ptr, WAY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + at), 0)
    if WAY == "atomic":
        tl.atomic_add(sum_ptr, total)
    elif WAY == "mixed" and tl.program_id(0) == 0:
        tl.store(sum_ptr, total)
    elif WAY == "mixed":
        tl.atomic_add(sum_ptr, total)
    elif WAY == "own":
        tl.store(sum_ptr + tl.program_id(0), total)
    else:
        tl.store(sum_ptr, total)


@triton.jit
def _neighbour_kernel(x_ptr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x_ptr + at - BACK, at >= BACK, other=0.0)
    tl.store(x_ptr + at, before + 1.0)


@triton.jit
def _reread_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * 2.0)
    if BARRIER:
        tl.debug_barrier()
    turned = tl.load(y_ptr + BLOCK - 1 - at)
    tl.store(x_ptr + at, turned)


@triton.jit
def _turn_kernel(x_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK - 1 - at, x)


@triton.jit
def _scale_kernel(x_ptr, sum_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + at, x * 2.0)
    tl.store(sum_ptr, tl.sum(x, 0))


@triton.jit
def _count_kernel(count_ptr, BARRIER: tl.constexpr):
    count = tl.load(count_ptr)
    if BARRIER:
        tl.debug_barrier()
    tl.store(count_ptr, count + 1)


@triton.jit
def _scatter_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, PLACES: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at % PLACES, tl.load(x_ptr + at))


@triton.jit
def _two_stores_kernel(y_ptr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, at)
    tl.store(y_ptr + SHIFT + at, -at)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, FIRST: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    at = FIRST + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASK:
        tl.store(y_ptr + at, tl.load(x_ptr + at, at < n, other=0.0), at < n)
    else:
        tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _of_table(table_ptr, row, TYPE: tl.constexpr):
    return tl.load(table_ptr + row).to(tl.pointer_type(TYPE))


@triton.jit
def _fill_table_kernel(table_ptr, ROWS: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for row in range(ROWS):
        tl.store(_of_table(table_ptr, row, tl.float32) + at + EXTRA, at.to(tl.float32))


@triton.jit
def _gather_table_kernel(table_ptr, y_ptr, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    pointers = _of_table(table_ptr, at % 2, tl.float32)[:, None] + (tl.arange(0, 2) + EXTRA)[None, :]
    tl.store(y_ptr + at, tl.sum(tl.load(pointers), 1))


@triton.jit
def _choose_kernel(x_ptr, y_ptr, out_ptr, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    pointers = tl.where(at % 2 == 0, x_ptr + at, y_ptr + at)
    tl.store(out_ptr + at, tl.load(pointers + EXTRA))


@triton.jit
def _described_kernel(x_desc, y_desc, APART: tl.constexpr):
    row = tl.program_id(0) * 16 if APART else 0
    y_desc.store([row, 0], x_desc.load([tl.program_id(0) * 16, 0]))


@triton.jit
def _spin_kernel(flag_ptr, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        while tl.load(flag_ptr, volatile=True) == 0:
            pass
    else:
        tl.store(flag_ptr, 1)


@triton.jit
def _lock_kernel(lock_ptr, sum_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) != 0:
        pass
    tl.debug_barrier()
    total = tl.load(sum_ptr)
    tl.debug_barrier()
    tl.store(sum_ptr, total + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def _last_sums_kernel(part_ptr, count_ptr, sum_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(part_ptr + tl.program_id(0), tl.program_id(0))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        at = tl.arange(0, BLOCK)
        tl.store(sum_ptr, tl.sum(tl.load(part_ptr + at, at < tl.num_programs(0), other=0), 0))


def kinds_of(kernel: Any, programs: int, *arguments: Any, declared: bool = False, **options: Any) -> set[str]:
    """The kinds of findings of one launch."""
    reasons = {kernel.__name__: "planted"} if declared else {}
    with recording(reasons) as recorder:
        try:
            kernel[(programs,)](*arguments, **options)
        except RaceError as error:
            assert kernel.__name__ in str(error) and "test_planted.py:" in str(error), error
    return {finding.kind for finding in recorder.findings}


def zeros(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


@pytest.mark.parametrize(("way", "found"), [("own", 0), ("atomic", 0), ("plain", 1), ("mixed", 1)])
def test_two_programs_that_store_to_one_place(way: str, found: int) -> None:
    kinds = kinds_of(_shared_sum_kernel, 3, torch.ones(96), zeros(3), WAY=way, BLOCK=32)
    assert kinds == ({"programs"} if found else set())


@pytest.mark.parametrize("back", [0, 1])
def test_a_program_that_reads_what_its_neighbour_writes(back: int) -> None:
    kinds = kinds_of(_neighbour_kernel, 2, zeros(512), BLOCK=256, BACK=back)
    assert kinds == ({"programs", "order"} if back else set())


def test_a_column_of_each_program_meets_no_other() -> None:
    """Strided stores lie between those of other programs, and share no byte with them."""

    @triton.jit
    def _column_kernel(y_ptr, BLOCK: tl.constexpr):
        tl.store(y_ptr + tl.program_id(0) + 4 * tl.arange(0, BLOCK), tl.program_id(0))

    assert kinds_of(_column_kernel, 4, zeros(256), BLOCK=64) == set()


@pytest.mark.parametrize("barrier", [True, False])
def test_a_program_that_reads_what_it_stored(barrier: bool) -> None:
    kinds = kinds_of(_reread_kernel, 1, zeros(256), zeros(256), BLOCK=256, BARRIER=barrier)
    assert kinds == (set() if barrier else {"order"})


@pytest.mark.parametrize("barrier", [True, False])
def test_a_program_that_stores_where_another_lane_loads(barrier: bool) -> None:
    kinds = kinds_of(_turn_kernel, 1, zeros(256), BLOCK=256, BARRIER=barrier)
    assert kinds == (set() if barrier else {"order"})


@pytest.mark.parametrize("barrier", [True, False])
@pytest.mark.parametrize(("entries", "warps"), [(256, 4), (128, 4), (128, 2), (1, 1)])
def test_replicated_lanes_that_scale_in_place(entries: int, warps: int, barrier: bool) -> None:
    """Fewer entries than threads: a thread may load what the one that stores has scaled already."""
    kinds = kinds_of(_scale_kernel, 1, zeros(entries), zeros(1), BLOCK=entries, BARRIER=barrier, num_warps=warps)
    assert kinds == ({"replicas"} if entries < 64 * warps and not barrier else set())


@pytest.mark.parametrize("barrier", [True, False])
def test_one_number_counted_up_by_every_thread(barrier: bool) -> None:
    assert kinds_of(_count_kernel, 1, zeros(1), BARRIER=barrier) == (set() if barrier else {"replicas"})


@pytest.mark.parametrize("places", [128, 64])
def test_two_entries_of_one_store_in_one_place(places: int) -> None:
    kinds = kinds_of(_scatter_kernel, 1, zeros(128), zeros(128), BLOCK=128, PLACES=places)
    assert kinds == ({"order"} if places < 128 else set())


@pytest.mark.parametrize("shift", [0, 1, 128])
def test_two_stores_of_a_program_to_one_place(shift: int) -> None:
    """Through the same pointers the same thread stores both, in order."""
    kinds = kinds_of(_two_stores_kernel, 1, zeros(256, torch.int32), SHIFT=shift, BLOCK=128)
    assert kinds == ({"order"} if shift == 1 else set())


@pytest.mark.parametrize(("first", "mask", "found"), [(0, True, 0), (0, False, 1), (-1, False, 1), (-1, True, 1)])
def test_an_access_outside_of_its_tensor(first: int, mask: bool, found: int) -> None:
    """Inside of the same memory: both are views of one tensor, with room on either side."""
    memory = zeros(1024)
    x, y = memory[100:200], memory[300:400]
    kinds = kinds_of(_copy_kernel, 1, x, y, 100, FIRST=first, MASK=mask, BLOCK=128)
    assert kinds == ({"outside"} if found else set())
    assert memory.count_nonzero() == 0


def test_an_access_to_an_empty_tensor() -> None:
    assert kinds_of(_copy_kernel, 1, zeros(128), zeros(0), 128, FIRST=0, MASK=True, BLOCK=128) == {"outside"}


def test_the_gaps_of_a_view_that_is_not_contiguous_belong_to_it() -> None:
    x = zeros(512)[::4]
    assert kinds_of(_copy_kernel, 1, x, zeros(128), 128, FIRST=0, MASK=True, BLOCK=128) == set()


@pytest.mark.parametrize("extra", [0, 1])
def test_an_access_outside_of_a_tensor_in_a_table_of_pointers(extra: int) -> None:
    memory = zeros(1024)
    tensors = [memory[100:164], memory[200:264]]
    table = torch.tensor([t.data_ptr() for t in tensors])
    kinds = kinds_of(_fill_table_kernel, 1, table, ROWS=2, EXTRA=extra, BLOCK=64)
    assert kinds == ({"outside"} if extra else set())


@pytest.mark.parametrize("extra", [0, 1])
def test_pointers_of_several_tensors_in_one_access(extra: int) -> None:
    memory = zeros(64)
    tensors = [memory[10:12], memory[20:22]]
    table = torch.tensor([t.data_ptr() for t in tensors])
    kinds = kinds_of(_gather_table_kernel, 1, table, zeros(8), EXTRA=extra, BLOCK=8)
    assert kinds == ({"outside"} if extra else set())


@pytest.mark.parametrize("extra", [0, 1])
def test_pointers_chosen_from_two_tensors(extra: int) -> None:
    memory = zeros(64)
    kinds = kinds_of(_choose_kernel, 1, memory[:8], memory[16:24], zeros(8), EXTRA=extra, BLOCK=8)
    assert kinds == ({"outside"} if extra else set())


@pytest.mark.parametrize("apart", [True, False])
def test_stores_through_a_descriptor(apart: bool) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = (TensorDescriptor.from_tensor(torch.zeros(32, 16), [16, 16]) for _ in range(2))
    assert kinds_of(_described_kernel, 2, x, y, APART=apart) == (set() if apart else {"programs"})


def test_an_address_of_no_tensor() -> None:
    """The memory that a freed tensor leaves is not touched."""
    freed = zeros(1 << 20)
    table = torch.tensor([freed.data_ptr(), freed.data_ptr()])
    del freed
    assert kinds_of(_fill_table_kernel, 1, table, ROWS=2, EXTRA=0, BLOCK=64) == {"outside"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("left", [0, 3])
def test_entries_of_an_output_that_nobody_writes(left: int, dtype: torch.dtype) -> None:
    with poisoned():
        y = torch.empty(128, dtype=dtype)
    assert kinds_of(_copy_kernel, 1, zeros(128, dtype), y, 128 - left, FIRST=0, MASK=True, BLOCK=128) == set()
    assert int((y != 0).sum()) == left


def test_a_program_that_waits_for_a_later_one() -> None:
    assert "residency" in kinds_of(_spin_kernel, 2, zeros(1, torch.int32), BLOCK=1)


def test_a_lock_is_reported_even_where_nobody_waits() -> None:
    """One after the other, every program finds the lock free."""
    assert "residency" in kinds_of(_lock_kernel, 3, zeros(1, torch.int32), zeros(1, torch.int32))


def test_a_count_of_programs_that_are_done() -> None:
    arguments = (zeros(4, torch.int32), zeros(1, torch.int32), zeros(1, torch.int32))
    assert "residency" in kinds_of(_last_sums_kernel, 4, *arguments, BARRIER=True, BLOCK=4)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_declared_count_orders_what_a_barrier_put_before_it(barrier: bool) -> None:
    arguments = (zeros(4, torch.int32), zeros(1, torch.int32), zeros(1, torch.int32))
    kinds = kinds_of(_last_sums_kernel, 4, *arguments, declared=True, BARRIER=barrier, BLOCK=4)
    assert kinds == (set() if barrier else {"programs", "order"})
    assert arguments[2].item() == 6


def test_a_declared_lock_orders_what_it_guards() -> None:
    total = zeros(1, torch.int32)
    assert kinds_of(_lock_kernel, 3, zeros(1, torch.int32), total, declared=True) == set()
    assert total.item() == 3


def test_one_program_may_use_what_its_own_atomics_return() -> None:
    @triton.jit
    def _own_kernel(count_ptr, y_ptr):
        found = tl.atomic_add(count_ptr + tl.program_id(0), 1)
        tl.store(y_ptr + tl.program_id(0), found)

    assert kinds_of(_own_kernel, 2, zeros(2, torch.int32), zeros(2, torch.int32)) == set()


def test_a_maximum_of_floating_point_numbers_is_no_counter() -> None:
    @triton.jit
    def _maximum_kernel(y_ptr):
        tl.atomic_max(y_ptr, 1.0)

    assert kinds_of(_maximum_kernel, 2, zeros(1)) == set()


def test_the_interpreter_is_as_it_was_afterwards() -> None:
    from triton.runtime import interpreter

    before = dict(vars(interpreter.InterpreterBuilder))
    with recording():
        assert dict(vars(interpreter.InterpreterBuilder)) != before
    assert dict(vars(interpreter.InterpreterBuilder)) == before
