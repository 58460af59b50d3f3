"""Gate and time: a case is checked first, and a wrong answer is never timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import machine
from bench.case import Case, Peer, Settings, Work
from bench.timing import Sample, interleave, peak_memory


@dataclass(frozen=True)
class PeerResult:
    """A peer's time, and how often as long as ours it takes, pair by pair."""

    time: Sample
    ratio: Sample


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    case: str
    op: str
    wrong: str | None = None
    time: Sample | None = None
    bytes: int = 0
    flops: int = 0
    peak_bytes: int = 0
    kept_bytes: int = 0
    peers: dict[str, PeerResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All results of one process, with the ceilings measured in it."""

    machine: dict[str, Any]
    quick: bool
    dtype: str
    copy: Sample  # seconds per byte
    matmul: Sample  # seconds per floating-point operation
    noise: list[str]
    results: list[Result]
    fma: Sample | None = None  # seconds per floating-point operation of multiply-adds in registers

    @property
    def peak(self) -> Sample:
        """Seconds per floating-point operation at the best rate measured: that of a large product without `fma`."""
        return self.fma or self.matmul


def run_case(case: Case, settings: Settings, against: Sequence[str] | None = None) -> Result:
    """Check a case, then time it against its peers.

    Args:
        case: what to run.
        settings: device, dtype, size, backend.
        against: peers to time; None for all.
    """
    torch.manual_seed(0)
    work = case.build(settings)
    try:
        _gate(work)
    except AssertionError as error:
        return Result(case.name, case.op, wrong=str(error) or "the check failed")
    wanted = {n: p for n, p in work.peers.items() if against is None or n in against}
    peers: dict[str, Peer] = {n: p for n, p in wanted.items() if not isinstance(p, str)}
    rounds, seconds = (7, 1.0) if settings.quick else (31, 12.0)
    seconds = min(seconds, work.seconds or seconds)
    ours, timed = interleave(work, peers, settings.device, rounds=rounds, seconds=seconds)
    peak, kept = peak_memory(lambda: work.ours(*_prepared(work)), settings.device)
    return Result(
        case.name,
        case.op,
        time=ours,
        bytes=work.bytes,
        flops=work.flops,
        peak_bytes=peak,
        kept_bytes=kept,
        peers={name: PeerResult(*pair) for name, pair in timed.items()},
        missing={n: p for n, p in wanted.items() if isinstance(p, str)},
        parts=_parts(work, rounds),
        notes=dict(work.notes),
    )


def _prepared(work: Work) -> tuple[Any, ...]:
    operands = work.operands[0]
    if work.prepare:
        work.prepare(*operands)
    return operands


def _gate(work: Work) -> None:
    # twice: a second call must not depend on what the first left behind
    for _ in range(2):
        operands = _prepared(work)
        work.check(work.ours(*operands), *operands)


def _parts(work: Work, rounds: int) -> dict[str, float]:
    if work.breakdown is None:
        return {}
    runs = [work.breakdown() for _ in range(min(rounds, 9))]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def run_all(
    cases: Sequence[Case],
    settings: Settings,
    against: Sequence[str] | None = None,
    progress: Callable[[str, Result | None, float], None] = lambda name, result, seconds: None,
) -> Report:
    """Run cases in one process, between two measurements of the copy ceiling.

    `progress(name, None, 0)` is called before each case, and with its result and the seconds it took after.
    """
    noise = machine.busy()
    copy = machine.copy_ceiling(settings.device, settings.quick)
    matmul = machine.matmul_ceiling(settings.device, settings.dtype, settings.quick)
    fma = machine.fma_ceiling(settings.device, settings.quick)
    results = []
    for case in cases:
        progress(case.name, None, 0.0)
        start = time.perf_counter()
        results.append(run_case(case, settings, against))
        progress(case.name, results[-1], time.perf_counter() - start)
    after = machine.copy_ceiling(settings.device, settings.quick)
    return Report(
        machine.describe(settings.device),
        settings.quick,
        str(settings.dtype).removeprefix("torch."),
        copy,
        matmul,
        noise + machine.unsteady(copy, after),
        results,
        fma,
    )


def trace(case: Case, settings: Settings, path: str) -> None:
    """Write a Chrome trace of one warmed-up call."""
    work = case.build(settings)
    for _ in range(2):
        work.ours(*_prepared(work))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.device(settings.device).type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    operands = _prepared(work)
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profile:
        work.ours(*operands)
    profile.export_chrome_trace(path)
