"""Lists of tensors on the host's side: what their kernels walk (tables.py), made once and looked up from then on."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, compress
from typing import ClassVar

import torch
import triton

from spartan_kernels.backends.triton.configs import CHUNK, program_count
from spartan_kernels.backends.triton.launches import aligned
from spartan_kernels.backends.triton.tables import COSTS, OUTPUT, VALUES

_KEPT_TABLES = 256
_STAGED_WORDS = 1 << 17


class _Staging:
    """Pinned memory for the tables of graphs, made before any capture: pinning more while capturing is not allowed.

    A graph copies its table at each replay, and there is no telling when the graph is gone: a source is kept for good.
    But lists that are the same to the last address share one, so that capturing a step again takes no more of it. The
    table on the device belongs to the graph's own pool, like everything else that the operator allocates.
    """

    lock = threading.Lock()
    free: torch.Tensor | None = None
    sources: ClassVar[dict[bytes, torch.Tensor]] = {}

    @classmethod
    def refill(cls) -> None:
        """Called outside of captures."""
        if cls.free is None or cls.free.numel() < _STAGED_WORDS // 2:
            with cls.lock:
                cls.free = torch.empty(_STAGED_WORDS, dtype=torch.int64, device="cpu").pin_memory()

    @classmethod
    def take(cls, words: torch.Tensor) -> torch.Tensor:
        """A pinned copy that is never written again."""
        content = words.numpy().tobytes()
        with cls.lock:
            source = cls.sources.get(content)
            if source is None:
                if cls.free is None or cls.free.numel() < words.numel():
                    raise RuntimeError("call the operator on these tensors once before it is captured in a CUDA graph")
                taken, cls.free = cls.free[: words.numel()].view_as(words), cls.free[words.numel() :]
                source = cls.sources[content] = taken.copy_(words)
        return source


class _Tables:
    """The tables on the device of the lists that were last solved; threads may ask at once."""

    def __init__(self, size: int) -> None:
        self.size, self.lock = size, threading.Lock()
        self.kept: OrderedDict[tuple[object, ...], Table] = OrderedDict()

    def get(self, key: tuple[object, ...]) -> Table | None:
        with self.lock:
            table = self.kept.get(key)
            if table is not None:
                self.kept.move_to_end(key)
        return table

    def put(self, key: tuple[object, ...], table: Table) -> None:
        with self.lock:
            self.kept[key] = table
            if len(self.kept) > self.size:
                self.kept.popitem(last=False)


_tables = _Tables(_KEPT_TABLES)


@dataclass(frozen=True)
class Table:
    """A list on the device: its words, its tensors that are not empty, its chunks, and if all begin at 16 bytes."""

    words: torch.Tensor
    tensors: int
    chunks: int
    aligned: bool


@dataclass(frozen=True)
class ListShape:
    """All that a solve over a list depends on but where the tensors lie: made once, and looked up from then on.

    Attributes:
        lengths: entries of each tensor.
        array_costs: for each tensor whether its costs are an array or one number; empty where there are none.
    """

    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...]
    array_costs: tuple[bool, ...]

    @cached_property
    def live(self) -> list[int]:
        """The tensors that are not empty."""
        return [index for index, length in enumerate(self.lengths) if length]

    @cached_property
    def length(self) -> int:
        """Entries of all."""
        return sum(self.lengths)

    @cached_property
    def chunks(self) -> int:
        """Chunks of all; none spans two tensors."""
        return sum(triton.cdiv(length, CHUNK) for length in self.lengths)

    @cached_property
    def programs(self) -> int:
        """Programs of the grid."""
        return program_count(self.device, self.chunks)

    @cached_property
    def cost_bytes(self) -> int:
        """Of the costs that are arrays."""
        costs = zip(self.lengths, self.array_costs, strict=False)
        return sum(length * self.dtype.itemsize for length, is_array in costs if is_array)

    @cached_property
    def bytes(self) -> int:
        """What one pass over the list reads."""
        return self.length * self.dtype.itemsize + self.cost_bytes

    @cached_property
    def words(self) -> torch.Tensor:
        """The table on the host, without pointers."""
        rows, chunk, entry = [], 0, 0
        for index in self.live:
            stride, length = int(bool(self.array_costs) and self.array_costs[index]), self.lengths[index]
            rows.append((0, 0, stride, chunk, length, entry, 0, 0, 0))
            chunk += triton.cdiv(length, CHUNK)
            entry += length
        rows.append((0, 0, 0, chunk, 0, entry, 0, 0, 0))
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def filled(self, columns: dict[int, tuple[int, ...]]) -> torch.Tensor:
        """The table on the host with pointers, by column."""
        words = self.words.clone()
        if not self.live:
            return words
        pointers = torch.frombuffer(array("q", chain.from_iterable(columns.values())), dtype=torch.int64)
        words[:-1, list(columns)] = pointers.view(len(columns), -1).T
        return words


list_shape = lru_cache(maxsize=256)(ListShape)


class TensorList:
    """Values and costs of a list, with its table and its grid of programs."""

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor]) -> None:
        self.values, self.costs = contiguous(values), contiguous(costs)
        lengths = tuple(map(torch.Tensor.numel, values))
        self.shape = list_shape(values[0].device, values[0].dtype, lengths, tuple(c.dim() > 0 for c in costs))

    def table(self, *outputs: list[torch.Tensor]) -> Table:
        """The device table, with up to three tensors for each of the list's: inputs beside values, or outputs.

        The same list on the same stream is copied once, from pinned memory and without waiting.
        """
        shape = self.shape
        given = [self.values, *([self.costs] if self.costs else []), *outputs]
        if len(shape.live) < len(shape.lengths):
            given = [[tensors[index] for index in shape.live] for tensors in given]
        addresses = [tuple(map(torch.Tensor.data_ptr, tensors)) for tensors in given]
        on_gpu = shape.device.type == "cuda"
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(shape.device).cuda_stream if on_gpu else 0
        key = (shape, stream, *addresses)
        table = None if capturing else _tables.get(key)
        if table is None:
            table = self._made(addresses, capturing)
            if not capturing:  # a table made during capture is filled only when the graph runs
                _tables.put(key, table)
                if on_gpu:
                    _Staging.refill()
        return table

    def _made(self, addresses: list[tuple[int, ...]], capturing: bool) -> Table:
        shape = self.shape
        columns = [int(VALUES), *([int(COSTS)] if self.costs else [])]
        columns += range(int(OUTPUT), int(OUTPUT) + len(addresses) - len(columns))
        words = shape.filled(dict(zip(columns, addresses, strict=True)))
        # a cost that is one number is read by itself
        vectors = [
            tuple(compress(pointers, [shape.array_costs[i] for i in shape.live])) if column == int(COSTS) else pointers
            for column, pointers in zip(columns, addresses, strict=True)
        ]
        if shape.device.type == "cuda":
            source = _Staging.take(words) if capturing else words.pin_memory()
            words = source.to(shape.device, non_blocking=True)
        return Table(words, len(shape.live), shape.chunks, aligned(chain.from_iterable(vectors)))


def contiguous(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, or copies of those that have gaps."""
    if all(map(torch.Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor.contiguous() for tensor in tensors]
