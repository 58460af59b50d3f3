"""One launch as its programs ran: epoch by epoch, then program against program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.triton_races.accesses import Access, Epoch, Finding, Kind, Line, Words, meetings, union

_MOST_FINDINGS = 20  # of a launch, each between two lines of its own
_SPINS = 1000  # times in a row that a program may ask for one word
NOWHERE = -1  # the region of a pointer that points into no tensor


@dataclass(frozen=True)
class Region:
    """Bytes that a pointer may be moved over: those of the tensor it was made from."""

    name: str
    first: int
    end: int

    def place(self, byte: int) -> str:
        """A byte of the region in words."""
        return f"byte {byte - self.first} of {self.name} ({self.end - self.first} bytes)"


@dataclass(frozen=True, eq=False)
class _Part:
    """What a program touched from one line, between two of its synchronising atomics."""

    program: int
    kind: Kind
    line: Line
    moment: tuple[int, int]  # barriers and synchronising atomics before it
    starts: Words
    ends: Words


@dataclass(frozen=True)
class _Atomic:
    """An atomic, with the barriers and synchronising atomics before it or before its result was used."""

    program: int
    moment: tuple[int, int]
    access: Access
    synchronises: bool


class Launch:
    """The accesses of one launch.

    Args:
        name: of the kernel.
        threads: of a program.
        declared: why programs of this kernel may wait for one another, or "".
    """

    def __init__(self, name: str, threads: int, declared: str = "") -> None:
        self.name, self.threads, self.declared = name, threads, declared
        self.regions: list[Region] = []
        self.findings: dict[tuple[str, Line, Line], Finding] = {}
        self._parts: list[_Part] = []
        self._synchronising: list[_Atomic] = []
        self._used: list[_Atomic] = []  # what other programs did decides what this one does
        self._begin(-1)

    def region(self, name: str, first: int, end: int) -> int:
        """The number of a region, new or known."""
        for number, known in enumerate(self.regions):
            if (known.first, known.end) == (first, end):
                return number
        self.regions.append(Region(name, first, end))
        return len(self.regions) - 1

    def begin_program(self, program: int) -> None:
        """The accesses that follow are this program's."""
        self._end_program()
        self._begin(program)

    def _begin(self, program: int) -> None:
        self.program = program
        self._epoch, self._barriers, self._atomics = Epoch(), 0, 0
        self._of_program: dict[tuple[Kind, Line, tuple[int, int]], list[Access]] = {}
        self._asked: tuple[Line, int] | None = None
        self._times = 0

    def barrier(self) -> None:
        """The program's threads have waited for one another."""
        for kind, what, first, second, byte in self._epoch.hazards(self.threads):
            where = f"{second.line}" if first is second else f"{second.line}, after {first.line}"
            self.report(kind, f"program {self.program} {what}: {where}, {self.place(byte)}", first.line, second.line)
        self._epoch = Epoch()
        self._barriers += 1

    def add(self, access: Access, addresses: Words, regions: Any, synchronises: bool = False) -> None:
        """The program's next access, and the regions of its pointers: one number, or one for each address.

        A synchronising access orders what came before it, if a barrier did too.
        """
        self._check(access, addresses, regions)
        self._epoch.accesses.append(access)
        moment = (self._barriers, self._atomics) if self.declared else (0, 0)
        self._of_program.setdefault((access.kind, access.line, moment), []).append(access)
        if synchronises:
            self._synchronising.append(_Atomic(self.program, (self._barriers, self._atomics), access, True))
            self._atomics += 1
        self._count_asking(access)

    def _check(self, access: Access, addresses: Words, regions: Any) -> None:
        """Report and refuse an access that leaves the region of its pointers."""
        if addresses.size == 0:
            return
        if np.ndim(regions) == 0 and regions != NOWHERE:
            only = self.regions[regions]
            if only.first <= access.starts[0] and access.ends[-1] <= only.end:
                return
        bounds = np.array([(r.first, r.end) for r in self.regions] + [(0, 0)])[
            np.broadcast_to(regions, addresses.shape)
        ]
        outside = np.flatnonzero((addresses < bounds[:, 0]) | (addresses + access.size > bounds[:, 1]))
        if outside.size == 0:
            return
        number = int(np.broadcast_to(regions, addresses.shape)[outside[0]])
        byte = int(addresses[outside[0]])
        where = f"byte {byte:#x} of no tensor" if number == NOWHERE else self.regions[number].place(byte)
        more = f", and {outside.size - 1} entries more" if outside.size > 1 else ""
        text = f"program {self.program} {access.kind}s {access.size} bytes at {where}{more}: {access.line}"
        self.report("outside", text, access.line, access.line)
        raise IndexError(text)

    def _count_asking(self, access: Access) -> None:
        word = access.kind != "store" and access.pointers.size == access.starts.size == 1
        asked = (access.line, int(access.starts[0])) if word else None
        self._times = self._times + 1 if asked is not None and asked == self._asked else 0
        self._asked = asked
        if self._times >= _SPINS:
            text = f"program {self.program} asks {_SPINS} times for {self.place(int(access.starts[0]))}: {access.line}"
            self.report("residency", text, access.line, access.line)
            raise TimeoutError(text)

    def use(self, access: Access, synchronises: bool) -> None:
        """The result of this atomic is used."""
        self._used.append(_Atomic(self.program, (self._barriers, self._atomics), access, synchronises))

    def report(self, kind: str, text: str, first: Line, second: Line) -> None:
        """A finding, once for each pair of lines."""
        if len(self.findings) < _MOST_FINDINGS:
            finding = Finding(kind, f"{self.name}: {text}")  # type: ignore[arg-type]
            self.findings.setdefault((kind, first, second), finding)

    def place(self, byte: int) -> str:
        """A byte as one of a region."""
        for region in self.regions:
            if region.first <= byte < region.end:
                return region.place(byte)
        return f"byte {byte:#x}, which is of no known tensor"

    def _end_program(self) -> None:
        self.barrier()
        for (kind, line, moment), accesses in self._of_program.items():
            starts, ends = union(
                np.concatenate([a.starts for a in accesses]), np.concatenate([a.ends for a in accesses])
            )
            self._parts.append(_Part(self.program, kind, line, moment, starts, ends))

    def end(self) -> list[Finding]:
        """All findings, once the last program has run."""
        self._end_program()
        self._begin(-1)
        for first, second, byte in self._clashes():
            text = (
                f"program {first.program} {first.kind}s and program {second.program} {second.kind}s"
                f" {self.place(byte)}: {first.line} and {second.line}"
            )
            self.report("programs", text, first.line, second.line)
        if not self.declared:
            self._report_waiting()
        return list(self.findings.values())

    def _clashes(self) -> Iterator[tuple[_Part, _Part, int]]:
        """Pairs of parts of two programs that share a byte, one of them writing, not both atomics."""
        parts = [p for p in self._parts if p.starts.size]
        for writing in ("store", "atomic"):
            writers = [n for n, p in enumerate(parts) if p.kind == writing]
            others = [n for n, p in enumerate(parts) if p.kind != "atomic" or writing == "store"]
            if not writers or not others:
                continue
            starts, ends, whose = _joined(parts, others)
            theirs, their_ends, writer = _joined(parts, writers)
            i, j = _between_programs(parts, (starts, ends, whose), (theirs, their_ends, writer))
            seen = set()
            for a, b, byte in zip(whose[i], writer[j], np.maximum(starts[i], theirs[j]), strict=True):
                first, second = sorted((parts[a], parts[b]), key=lambda part: part.program)
                if (a, b) not in seen and not (self.declared and self._ordered(first, second)):
                    yield first, second, int(byte)
                seen.add((a, b))

    def _ordered(self, first: _Part, second: _Part) -> bool:
        """Whether an atomic of one program after `first`, and a barrier, is read by the other before `second`."""
        releases = [s for s in self._synchronising if s.program == first.program and s.moment[0] > first.moment[0]]
        acquires = [u for u in self._used if u.program == second.program and u.moment[1] <= second.moment[1]]
        return any(
            meetings(r.access.starts, r.access.ends, a.access.starts, a.access.ends)[0].size
            for r in releases
            for a in acquires
            if a.synchronises
        )

    def _report_waiting(self) -> None:
        """Atomics whose result is used, where other programs write the same word."""
        writers = [n for n, p in enumerate(self._parts) if p.kind != "load"]
        if not writers:
            return
        starts, ends, writer = _joined(self._parts, writers)
        for used in self._used:
            _, j = meetings(used.access.starts, used.access.ends, starts, ends)
            others = {self._parts[n].program for n in writer[j]} - {used.program}
            if others:
                text = (
                    f"program {used.program} uses the result of an atomic that programs {sorted(others)[:4]} write too,"
                    f" {self.place(int(used.access.starts[0]))}: {used.access.line}; declare why it may wait for them"
                )
                self.report("residency", text, used.access.line, used.access.line)


def _joined(parts: list[_Part], which: list[int]) -> tuple[Words, Words, Words]:
    """The runs of some parts, and of which part each is."""
    starts = np.concatenate([parts[n].starts for n in which])
    ends = np.concatenate([parts[n].ends for n in which])
    return starts, ends, np.repeat(np.array(which), [parts[n].starts.size for n in which])


def _between_programs(
    parts: list[_Part], runs: tuple[Words, Words, Words], writes: tuple[Words, Words, Words]
) -> tuple[Words, Words]:
    """The meetings of runs with writes of another program."""
    program = np.array([part.program for part in parts])
    i, j = meetings(*runs[:2], *writes[:2])
    other = program[runs[2][i]] != program[writes[2][j]]
    return i[other], j[other]
