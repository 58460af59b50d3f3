"""Time on a device: after a flush of its cache, from idle with the host's part, and in a replayed graph without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench import machine
from bench.case import Work
from bench.timing import Sample
from spartan_kernels.devices import Device

_LEAST, _MOST = 5, 60
_GRAPH_REFUSED = "a result of the replayed graph is wrong: "


def gate(work: Work) -> None:
    """Raise AssertionError unless two calls in turn are right."""
    for _ in range(2):
        operands = _prepared(work)
        work.check(work.ours(*operands), *operands)


def _prepared(work: Work) -> tuple[Any, ...]:
    operands = work.operands[0]
    if work.prepare:
        work.prepare(*operands)
    return operands


class Clock:
    """Times calls on a device whose cache holds nothing of theirs."""

    def __init__(self, device: Device, seconds: float, least: int = _LEAST) -> None:
        self.device, self.seconds, self.least = device, seconds, least
        on_gpu = device.name == "cuda"
        self._flushed = torch.empty(
            4 * machine.cache_bytes("cuda") if on_gpu else 1 << 10, dtype=torch.int8, device=device.name
        )

    def sample(self, call: Callable[[], Any], prepare: Callable[[], Any], queued: bool) -> Sample:
        """Seconds of each call; `queued`: without the host's part."""
        prepare()
        call()
        times: list[float] = []
        until = time.perf_counter() + self.seconds
        while len(times) < self.least or (len(times) < _MOST and time.perf_counter() < until):
            prepare()
            self._flushed.zero_()
            if not queued:
                self.device.synchronize()
            times.append(self.device.elapsed(call, queued))
        return Sample(tuple(times))


def _told(sample: Sample) -> dict[str, float | int]:
    return {"us": float(f"{1e6 * sample.median:.4g}"), "spread": round(sample.spread, 3), "n": len(sample.values)}


def time_work(work: Work, device: Device, graph: bool, seconds: float, least: int = _LEAST) -> dict[str, Any]:
    """Check a case, then time it: `eager` from an idle device, `graph` replayed, and its peers launched ahead.

    A wrong answer is not timed: the record says so, also when only the replayed graph's is.
    """
    try:
        gate(work)
    except AssertionError as error:
        return {"wrong": str(error) or "the check failed"}
    clock = Clock(device, seconds, least)
    operands = work.operands[0]
    prepare: Callable[[], Any] = (lambda: work.prepare(*operands)) if work.prepare else (lambda: None)  # type: ignore[misc]
    found: dict[str, Any] = {
        "eager": _told(clock.sample(lambda: work.ours(*operands), prepare, queued=False)),
        "bytes": work.bytes,
        "flops": work.flops,
        "notes": work.notes,
    }
    found["missing"] = {name: peer for name, peer in work.peers.items() if isinstance(peer, str)}
    found["peers"] = {}
    for name, peer in work.peers.items():
        if isinstance(peer, str):
            continue
        try:
            found["peers"][name] = _told(clock.sample(lambda peer=peer: peer(*operands), prepare, queued=True))
        except Exception as error:
            found["missing"][name] = f"{type(error).__name__}: {error}"[:200]
    if work.breakdown:
        found["parts_us"] = {name: round(1e6 * value, 1) for name, value in work.breakdown().items()}
    return found | (_time_graph(work, clock, prepare) if graph else {})


def _time_graph(work: Work, clock: Clock, prepare: Callable[[], Any]) -> dict[str, Any]:
    """Last of all: after a capture that fails the process is of no use."""
    operands = work.operands[0]
    try:
        graph = clock.device.capture(lambda: work.ours(*operands))
        prepare()
        graph.replay()
        clock.device.synchronize()
        work.check(graph.result, *operands)
    except AssertionError as error:
        return {"graph_wrong": _GRAPH_REFUSED + str(error)}
    except Exception as error:
        return {"graph_wrong": f"{type(error).__name__}: {error}"[:500]}
    return {"graph": _told(clock.sample(graph.replay, prepare, queued=True))}
