"""The headline: each case checked, then timed from an idle device, in a replayed graph, and beside its peers.

A case that breaks the device ends this process; the plan of `main` begins another, which goes on after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from typing import Any

import torch

from bench.gpu import backends, records

backends.ready()  # the cases import spartan_kernels

from bench.gpu.entries import Entry, entries  # noqa: E402
from bench.gpu.measure import gate, time_work  # noqa: E402
from spartan_kernels.devices import Device, device_of  # noqa: E402

STEP = "headline"
_TIMED = (0.35, 5)  # seconds, and the fewest calls, for each implementation and way of calling it
_REHEARSED = (0.0, 1)
_UNUSABLE = 75  # exit status: the device cannot be used from this process any more


def _named(names: list[str]) -> list[Entry]:
    return [entry for entry in entries() if entry.name in names] if names else entries()


def compile_kernels(names: list[str]) -> int:
    """Call each case twice, as the timing will: what it compiles is found in the cache then. Prints records."""
    failed = False
    for entry in _named(names):
        start, wrong = time.perf_counter(), None
        try:
            work = entry.work()
            for _ in range(2):
                gate(work)
        except Exception as error:
            wrong, failed = f"{type(error).__name__}: {error}"[:300], True
        print(json.dumps({"case": entry.name, "first": round(time.perf_counter() - start, 2), "wrong": wrong}))
    return int(failed)


def profile(names: list[str]) -> int:
    """Call each case where a profiler looks, after calls where it does not."""
    device = device_of(records.device_name())
    for entry in _named(names):
        work = entry.work()
        operands = work.operands[0]
        for _ in range(2):
            if work.prepare:
                work.prepare(*operands)
            work.ours(*operands)
        with device.profiled():
            work.ours(*operands)
    return 0


def time_cases(done: set[str]) -> int:
    """Time what is not `done`, a record for each as it ends, until there is no time left."""
    served = backends.ready()
    device = device_of(records.device_name())
    often = _REHEARSED if records.rehearsing() else _TIMED
    for entry in entries():
        if entry.name in done or entry.backend not in served:
            continue
        if records.seconds_left() < 8:
            records.add(STEP, kind="left out", case=entry.name)
            continue
        records.add(STEP, kind="begins", case=entry.name)
        found = _time_one(entry, device, often)
        records.add(STEP, **found)
        print(json.dumps(found), flush=True)
        if "graph_wrong" in found or not _usable(device):
            return _UNUSABLE
    return 0


def _time_one(entry: Entry, device: Device, often: tuple[float, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "case", "case": entry.name, "backend": entry.backend}
    start = time.perf_counter()
    try:
        work = entry.work()
        found["counts"] = entry.counts(work)
        found |= time_work(work, device, entry.graph, *often)
    except Exception as error:
        traceback.print_exc()
        found["wrong"] = f"{type(error).__name__}: {error}"[:500]
    return found | {"took": round(time.perf_counter() - start, 1)}


def _usable(device: Device) -> bool:
    """Whether the device still answers this process: a kernel that read where it must not ends that."""
    try:
        device.synchronize()
    except RuntimeError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Time all cases, in as many processes as it takes; or one of the other uses of the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--compile", action="store_true", help="call the cases, so that their kernels are compiled")
    parser.add_argument("--profile", action="store_true", help="call the cases for a profiler")
    parser.add_argument("--here", action="store_true", help="time what has no record yet, in this process")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.compile or options.profile:
        return compile_kernels(options.cases) if options.compile else profile(options.cases)
    if options.here:
        return time_cases({r["case"] for r in records.read() if r["step"] == STEP and "case" in r})
    return _time_in_processes()


def _time_in_processes() -> int:
    """Begin processes until one has gone through what is left."""
    while True:
        before = len(_begun())
        status = subprocess.run([sys.executable, "-m", "bench.gpu.headline", "--here"], check=False).returncode
        found = [record for record in records.read() if record["step"] == STEP]
        for name in _begun() - {record["case"] for record in found if record["kind"] == "case"}:
            records.add(STEP, kind="case", case=name, wrong=f"its process ended with {status}")
        if status == 0 or len(_begun()) == before:
            wrong = any(r.get("wrong") or r.get("graph_wrong") for r in records.read() if r["step"] == STEP)
            return int(wrong or status != 0)


def _begun() -> set[str]:
    return {r["case"] for r in records.read() if r["step"] == STEP and r["kind"] == "begins"}


if __name__ == "__main__":
    sys.exit(main())
