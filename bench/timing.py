"""Timing: one clock per device, samples with their spread, interleaved contestants, memory."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import Peer, Work

_SHORTEST_SAMPLE = 2e-3  # seconds; quicker calls are repeated within a sample, against the clock's grain


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle measurement."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Interquartile range over median; of fewer than four measurements the whole range."""
        if len(self.values) < 4:
            return (max(self.values) - min(self.values)) / self.median
        low, _, high = statistics.quantiles(self.values, n=4)
        return (high - low) / self.median

    def scaled(self, factor: float) -> Sample:
        """Every measurement times `factor`."""
        return Sample(tuple(v * factor for v in self.values))


def elapsed(call: Callable[[], Any], device: str) -> float:
    """Seconds that `call` takes on the device."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(call: Callable[[], Any], device: str, *, samples: int, warm_up: int = 2) -> Sample:
    """Time a call that needs no rotation."""
    for _ in range(warm_up):
        call()
    return Sample(tuple(elapsed(call, device) for _ in range(samples)))


class _Contestant:
    """One implementation walking through the rotated operands, within its own time budget."""

    def __init__(self, run: Peer, work: Work, device: str, seconds: float, least: int) -> None:
        self.run, self.work, self.device, self.seconds, self.least = run, work, device, seconds, least
        self.turns = itertools.cycle(work.operands)
        self.repeats = 1
        self.times: dict[int, float] = {}

    @property
    def spent(self) -> bool:
        total = sum(self.times.values()) * self.repeats
        return len(self.times) >= self.least and total >= self.seconds

    def _batch(self) -> float:
        batch = [next(self.turns) for _ in range(self.repeats)]
        if self.work.prepare:
            self.work.prepare(*batch[0])

        def calls() -> None:
            for operands in batch:
                self.run(*operands)

        return elapsed(calls, self.device) / self.repeats

    def warm_up(self) -> None:
        first = self._batch()
        if first > self.seconds / 3:
            self.times[0] = first  # so long a call has warmed up on the way
            return
        quickest = min(self._batch() for _ in range(3))
        if self.work.prepare is None:
            self.repeats = max(1, min(1000, round(_SHORTEST_SAMPLE / quickest)))

    def sample(self, index: int) -> None:
        if index not in self.times and not self.spent:
            self.times[index] = self._batch()


def interleave(
    work: Work, peers: dict[str, Peer], device: str, *, rounds: int, seconds: float
) -> tuple[Sample, dict[str, tuple[Sample, Sample]]]:
    """Time ours and its peers in alternation, so that a disturbance meets both.

    It ends after `rounds` samples of ours, or `seconds` of them; a peer that has spent its own `seconds` sits
    out the remaining rounds.

    Returns:
        Our times, and for each peer its times and the ratios peer / ours, pair by pair.
    """
    ours = _Contestant(work.ours, work, device, seconds, least=3)
    others = {name: _Contestant(run, work, device, seconds, least=2) for name, run in peers.items()}
    for contestant in (ours, *others.values()):
        contestant.warm_up()
    for index in range(rounds):
        if ours.spent:
            break
        for contestant in (ours, *others.values()):
            contestant.sample(index)
    results = {}
    for name, other in others.items():
        pairs = tuple(t / ours.times[i] for i, t in other.times.items())
        results[name] = Sample(tuple(other.times.values())), Sample(pairs)
    return Sample(tuple(ours.times.values())), results


def peak_memory(call: Callable[[], Any], device: str) -> tuple[int, int]:
    """Bytes allocated through PyTorch at the worst moment of `call`, and those its result then holds."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return peak, kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    totals = _running_totals(profile)
    del result
    return max(totals), totals[-1]


def _running_totals(profile: Any) -> list[int]:
    """Bytes allocated since the start after every allocation and release."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return list(itertools.accumulate((e.nbytes() for e in events), initial=0))


def rotated(build: Callable[[int], tuple[Any, ...]], bytes_each: int, cache: int) -> Sequence[tuple[Any, ...]]:
    """Build sets of operands until their parts of `bytes_each` make twice the cache."""
    return [build(i) for i in range(min(64, math.ceil(2 * cache / bytes_each)))]


def seconds_of(parts: Mapping[str, Callable[[], Any]], synchronize: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each part, run once in order, with the device waited for between them."""
    seconds = {}
    for name, part in parts.items():
        synchronize()
        start = time.perf_counter()
        part()
        synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds
