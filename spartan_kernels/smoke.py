"""Check an installation in seconds: `python -m spartan_kernels.smoke`.

Every operator on every backend and device of this machine against the reference in float64; on a GPU also captured in
a CUDA graph, in a process of its own that ends with the first capture that fails. Needs nothing but this package; the
exit status tells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spartan_kernels import dispatch
from spartan_kernels.devices import Device, device_of
from spartan_kernels.probes import Call, Inputs, compare, inputs_on, make_inputs, probes

_GRAPH_BACKENDS = ("triton", "cuda")


@dataclass(frozen=True)
class Pair:
    """An operator and a backend that serves it on the device."""

    operator: str
    backend: str

    def __str__(self) -> str:
        return f"{self.operator}:{self.backend}"


@dataclass(frozen=True)
class Outcome:
    """What came of one probe; `wrong` is None where it was right."""

    operator: str
    device: str
    backend: str
    kind: str  # "eager" or "graph"
    wrong: str | None
    seconds: float

    def __str__(self) -> str:
        name = self.operator + (" (graph)" if self.kind == "graph" else "")
        return f"{name:36} {self.device:5} {self.backend:10} {'ok' if self.wrong is None else 'WRONG: ' + self.wrong}"


def pairs(device: str, wanted: Sequence[str] = ()) -> list[Pair]:
    """What serves `device`; of it only what `wanted` names, as `operator`, `:backend` or `operator:backend`."""
    return [
        pair
        for operator in dispatch.SUPPORT
        for backend in dispatch.BACKENDS
        if not dispatch.refusal(operator, backend, device, torch.float32)
        and _named(pair := Pair(operator, backend), wanted)
    ]


def _named(pair: Pair, wanted: Sequence[str]) -> bool:
    asked = [name.partition(":") for name in wanted]
    return not wanted or any(o in ("", pair.operator) and b in ("", pair.backend) for o, _, b in asked)


def captured(device: Device, call: Call, inputs: Inputs, name: str) -> Any:
    """The result of replaying the call from a graph."""
    graph = device.capture(lambda: call(inputs, name))
    graph.replay()
    device.synchronize()
    return graph.result


def run(device: str, chosen: Sequence[Pair], kind: str) -> Iterator[Outcome]:
    """Probe each pair in this process; with kind "graph" up to the first that fails."""
    inputs, there, calls = make_inputs(), device_of(device), {probe.operator: probe.call for probe in probes()}
    moved = inputs_on(inputs, device)
    for pair in chosen:
        call, start = calls[pair.operator], time.perf_counter()
        try:
            expected = call(inputs, "reference")
            if kind == "graph":
                result = captured(there, call, moved, pair.backend)
            else:
                result = call(moved, pair.backend)
            wrong = compare(result, expected)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        yield Outcome(pair.operator, device, pair.backend, kind, wrong, round(time.perf_counter() - start, 3))
        if wrong and kind == "graph":
            return


def run_graphs(device: str, chosen: Sequence[Pair]) -> Iterator[Outcome]:
    """Capture each pair; a failed capture leaves stream and random numbers unusable, so another process goes on."""
    left = list(chosen)
    while left:
        command = [sys.executable, "-m", "spartan_kernels.smoke", "--device", device, "--only", "graph", "--json"]
        found = []
        with subprocess.Popen([*command, *map(str, left)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    found.append(Outcome(**json.loads(line)))
                    yield found[-1]
        if len(found) < len(left) and not (found and found[-1].wrong):
            died = left[len(found)]
            found.append(
                Outcome(died.operator, device, died.backend, "graph", f"its process ended: {child.returncode}", 0.0)
            )
            yield found[-1]
        left = left[len(found) :]


def _outcomes(devices: Sequence[str], wanted: Sequence[str], only: str | None) -> Iterator[Outcome]:
    for device in devices:
        chosen = pairs(device, wanted)
        graphs = [pair for pair in chosen if pair.backend in _GRAPH_BACKENDS]
        if only == "graph":
            yield from run(device, graphs, "graph")
            continue
        yield from run(device, chosen, "eager")
        if only is None and device == "cuda":
            yield from run_graphs(device, graphs)


def main(arguments: list[str] | None = None) -> int:
    """Run all probes and print a line for each as it ends; 0 when every one is right."""
    parser = argparse.ArgumentParser(prog="python -m spartan_kernels.smoke", description=__doc__)
    parser.add_argument("probes", nargs="*", help="operator, :backend or operator:backend (default: all there are)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this device (default: all there are)")
    parser.add_argument("--only", choices=("eager", "graph"), help="without graphs; or graphs alone, in this process")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each probe")
    options = parser.parse_args(arguments)
    available = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    if options.device and options.device not in available:
        print(f"device {options.device} is not here; PyTorch {torch.__version__} sees {', '.join(available)}")
        return 1
    devices = [options.device] if options.device else available
    for name in options.probes:
        if not any(pairs(device, [name]) for device in devices):
            backends = ", ".join(f":{backend}" for backend in dispatch.BACKENDS)
            there = f"{', '.join(dispatch.SUPPORT)}; each may be followed by {backends}"
            parser.error(f"nothing serves {name!r} here; there are {there}")
    start, failed, count = time.perf_counter(), 0, 0
    for outcome in _outcomes(devices, options.probes, options.only):
        count += 1
        failed += outcome.wrong is not None
        print(json.dumps(asdict(outcome)) if options.json else outcome, flush=True)
    if not options.json:
        print(f"{count - failed} of {count} right in {time.perf_counter() - start:.1f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
