"""Lists of tensors as a device table that a persistent grid walks in chunks: no concatenation, no copy."""

from __future__ import annotations

from collections import OrderedDict

import torch
import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import CHUNK, program_count

# Columns of the table, 64-bit words: pointers, number of entries, and where the tensor begins in chunks and in entries.
WIDTH = tl.constexpr(9)
VALUES = tl.constexpr(0)
COSTS = tl.constexpr(1)
COST_STRIDE = tl.constexpr(2)
FIRST_CHUNK = tl.constexpr(3)
LENGTH = tl.constexpr(4)
FIRST_ENTRY = tl.constexpr(5)
OUTPUT = tl.constexpr(6)


@triton.jit
def locate(table_ptr, n_tensors, wanted, COLUMN: tl.constexpr):
    """Row of the table that holds the chunk or entry `wanted` (a number or a tensor): the last that begins by then."""
    found = wanted * 0
    width = n_tensors
    while width > 1:
        half = width // 2
        begins = tl.load(table_ptr + (found + half) * WIDTH + COLUMN)
        found = tl.where(begins <= wanted, found + half, found)
        width = width - half
    return found


@triton.jit
def chunk_at(table_ptr, n_tensors, chunk, CHUNK: tl.constexpr):
    """Row of the table (a pointer), offsets into its tensor and which of them exist."""
    row_ptr = table_ptr + locate(table_ptr, n_tensors, chunk, FIRST_CHUNK) * WIDTH
    offsets = (chunk - tl.load(row_ptr + FIRST_CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    return row_ptr, offsets, offsets < tl.load(row_ptr + LENGTH)


@triton.jit
def output_at(row_ptr, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to the tensor's output number INDEX."""
    return tl.load(row_ptr + (OUTPUT + INDEX)).to(tl.pointer_type(DTYPE))


@triton.jit
def load_ratio(
    row_ptr, offsets, live, DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr
):  # fmt: skip
    """u = v / a and a in float32; 0 and 1 where there is no entry. `row_ptr` is one row or one for each entry."""
    u = tl.load(tl.load(row_ptr + VALUES).to(tl.pointer_type(DTYPE)) + offsets, live, other=0.0).to(tl.float32)
    if ABSOLUTE:
        u = tl.abs(u)
    if HAS_COSTS:
        costs_ptr = tl.load(row_ptr + COSTS).to(tl.pointer_type(DTYPE))
        a = tl.load(costs_ptr + offsets * tl.load(row_ptr + COST_STRIDE), live, other=1.0).to(tl.float32)
        u = u / a
    else:
        a = tl.where(live, 1.0, 1.0)
    return u, a


_tables: OrderedDict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
_captured: list[tuple[torch.Tensor, torch.Tensor]] = []
_KEPT_TABLES = 256


def _on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """The table, copied from pinned memory without waiting; the same list on the same stream is copied once."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64)
    key = (device, torch.cuda.current_stream(device).cuda_stream, rows)
    capturing = torch.cuda.is_current_stream_capturing()
    pair = _tables.get(key)
    if pair is None:
        source = torch.tensor(rows, dtype=torch.int64).pin_memory()
        pair = source, source.to(device, non_blocking=True)
        if not capturing:  # a table made during capture is filled only when the graph runs
            _tables[key] = pair
            if len(_tables) > _KEPT_TABLES:
                _tables.popitem(last=False)
    if capturing:  # the graph reads it at every replay
        _captured.append(pair)
    return pair[1]


class TensorList:
    """Values and costs of a list, with its table and its grid of programs."""

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor]) -> None:
        self.values = [v.detach().contiguous() for v in values]
        self.costs = [c.detach().contiguous() for c in costs]
        self.device = values[0].device
        self.length = sum(v.numel() for v in values)
        self.chunks = sum(triton.cdiv(v.numel(), CHUNK) for v in values)
        self.programs = program_count(self.device, self.chunks)

    def table(self, *outputs: list[torch.Tensor]) -> torch.Tensor:
        """The device table, with up to three tensors for each of the list's: inputs beside values, or outputs."""
        rows, chunk, entry = [], 0, 0
        for index, v in enumerate(self.values):
            cost = self.costs[index] if self.costs else None
            pointers = [output[index].data_ptr() for output in outputs] + [0] * (3 - len(outputs))
            where = (0, 0) if cost is None else (cost.data_ptr(), int(cost.dim() > 0))
            rows.append((v.data_ptr(), *where, chunk, v.numel(), entry, *pointers))
            chunk += triton.cdiv(v.numel(), CHUNK)
            entry += v.numel()
        return _on_device(tuple(rows), self.device)
