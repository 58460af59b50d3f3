"""What a program touches, as runs of bytes, and which pairs of accesses nothing orders.

What a Triton program guarantees, and so what is taken as safe here:

- Each entry of a tensor lies in one thread, or in several where the tensor has fewer entries than the program has
  threads: then every one of these threads loads it, and one of them stores it. Nobody says when the others load.
- Loads and stores through the same tensor of pointers have their entries in the same threads, in program order. Through
  any other, even to the same bytes, they may be in any threads, and only a barrier orders them.
- Programs of one launch run in any order and at the same time; atomics alone may meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["load", "store", "atomic"]
Words = NDArray[np.int64]


class Line(NamedTuple):
    """A line of a kernel, or of a function that it calls."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({self.file.rsplit('/', 1)[-1]}:{self.number})"


class Finding(NamedTuple):
    """Something that a GPU may do otherwise than the interpreter did."""

    kind: Literal["programs", "order", "replicas", "outside", "residency"]
    text: str


def runs_of(addresses: Words, size: int) -> tuple[Words, Words, bool]:
    """First and past-the-end byte of the runs that entries of `size` bytes make up, and whether any entry is twice."""
    if addresses.size < 2:
        return addresses, addresses + size, False
    steps = np.diff(addresses)
    if steps.min() <= 0:
        every = addresses.size
        addresses = np.unique(addresses)
        twice = addresses.size < every
        steps = np.diff(addresses)
    else:
        twice = False
    cuts = np.flatnonzero(steps > size)
    starts = np.concatenate([addresses[:1], addresses[cuts + 1]])
    return starts, np.concatenate([addresses[cuts], addresses[-1:]]) + size, twice


def union(starts: Words, ends: Words) -> tuple[Words, Words]:
    """Runs in order, those that touch made one."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    cuts = np.flatnonzero(starts[1:] > ends[:-1])
    return np.concatenate([starts[:1], starts[cuts + 1]]), np.concatenate([ends[cuts], ends[-1:]])


def meetings(starts: Words, ends: Words, others: Words, other_ends: Words) -> tuple[Words, Words]:
    """Indices (i, j) of the pairs of runs that share a byte; both in any order."""
    order = np.argsort(others, kind="stable")
    low = np.searchsorted(np.maximum.accumulate(other_ends[order]), starts, "right")
    counts = np.maximum(np.searchsorted(others[order], ends, "left") - low, 0)
    i = np.repeat(np.arange(starts.size), counts)
    within = np.arange(i.size) - np.repeat(np.cumsum(counts) - counts, counts)
    j = order[low[i] + within]
    real = (others[j] < ends[i]) & (other_ends[j] > starts[i])
    return i[real], j[real]


@dataclass(frozen=True, eq=False)
class Access:
    """One load, store or atomic of one program."""

    kind: Kind
    line: Line
    pointers: NDArray[np.uint64]  # of all entries, also of those that a mask leaves out
    size: int  # bytes of an entry
    starts: Words
    ends: Words
    twice: bool  # an entry has the address of another

    def replicated(self, threads: int) -> bool:
        """Whether several threads hold an entry."""
        return self.pointers.size < threads or self.twice

    def same_lanes(self, other: Access) -> bool:
        """Whether both go through the same tensor of pointers."""
        return self.size == other.size and (
            self.pointers is other.pointers or bool(np.array_equal(self.pointers, other.pointers))
        )


@dataclass
class Epoch:
    """The accesses of one program between two barriers, in order."""

    accesses: list[Access] = field(default_factory=list)

    def hazards(self, threads: int) -> Iterator[tuple[Literal["order", "replicas"], str, Access, Access, int]]:
        """Pairs that no barrier orders: (kind, what happens, earlier, later, first byte)."""
        writers = [n for n, a in enumerate(self.accesses) if a.kind != "load" and a.starts.size]
        for n in writers:
            if self.accesses[n].kind == "store" and self.accesses[n].twice:
                yield (
                    "order",
                    "stores two entries to one place",
                    *2 * (self.accesses[n],),
                    int(self.accesses[n].starts[0]),
                )
        if not writers or len(self.accesses) < 2:
            return
        starts, ends, whose = _runs(self.accesses, range(len(self.accesses)))
        other, other_ends, writer = _runs(self.accesses, writers)
        i, j = meetings(starts, ends, other, other_ends)
        seen = set()
        for n, m, byte in zip(whose[i], writer[j], np.maximum(starts[i], other[j]), strict=True):
            first, second = self.accesses[min(n, m)], self.accesses[max(n, m)]
            if n == m or (first.line, second.line, first.kind, second.kind) in seen:
                continue
            found = _unordered(first, second, threads)
            if found:
                seen.add((first.line, second.line, first.kind, second.kind))
                yield *found, first, second, int(byte)


def _runs(accesses: list[Access], which: range | list[int]) -> tuple[Words, Words, Words]:
    """The runs of some accesses, and of which access each is."""
    starts = np.concatenate([accesses[n].starts for n in which])
    ends = np.concatenate([accesses[n].ends for n in which])
    return starts, ends, np.repeat(np.array(which), [accesses[n].starts.size for n in which])


def _unordered(first: Access, second: Access, threads: int) -> tuple[Literal["order", "replicas"], str] | None:
    """What may go wrong where a later access of a program shares bytes with an earlier one."""
    if second.kind == "load":
        return ("order", "loads what it stored itself, with no barrier between")
    if first.kind == "load":
        if not first.same_lanes(second):
            return ("order", "stores to what it loaded through other pointers, with no barrier between")
        if first.replicated(threads) or second.replicated(threads):
            several = f"{first.pointers.size} entries for {threads} threads"
            return ("replicas", f"stores to what replicated lanes loaded ({several}), with no barrier between")
        return None
    if first.kind == second.kind == "atomic" or (first.kind == second.kind and first.same_lanes(second)):
        return None
    return ("order", "stores twice to one place, with no barrier between")
