"""What checks and benchmarks ask of a device: its clock, a stream aside, a graph of a call. The CPU stands in for each.

So the same code runs on a GPU and, with Triton's interpreter or the emulator as backends, where there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import torch

from spartan_kernels import dispatch
from spartan_kernels.torch_private import TorchDispatchMode, busy, tree_leaves

_WARM_UPS = 2
_HEAD_START = 2_000_000  # cycles, about a millisecond: by then the host has enqueued what is to be timed


@dataclass(frozen=True)
class Graph:
    """A captured call: every `replay` writes `result` anew from what its inputs hold by then."""

    result: Any
    replay: Callable[[], None]


class Device(Protocol):
    """A place to run on; `name` is that of its tensors' device."""

    name: str

    def synchronize(self) -> None:
        """Wait for everything that was launched."""

    def elapsed(self, call: Callable[[], Any], queued: bool = False) -> float:
        """Seconds by the device's clock until `call` is done; `queued`: without the host's part, launched ahead."""

    def aside(self, call: Callable[[], Any]) -> Any:
        """The result of `call` on a stream of its own, which waits for the current one and is waited for."""

    def capture(self, call: Callable[[], Any]) -> Graph:
        """Warm up and capture `call`. After one that fails the process is of no further use to its device."""

    def profiled(self) -> AbstractContextManager[None]:
        """A block that a profiler looks at, if it was told not to look from the start."""

    def free_bytes(self) -> int:
        """Memory that is free."""


class Cuda:
    """The current CUDA device."""

    name = "cuda"

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        torch.cuda.synchronize()

    def elapsed(self, call: Callable[[], Any], queued: bool = False) -> float:
        """Seconds between two events around `call`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            busy(_HEAD_START)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def aside(self, call: Callable[[], Any]) -> Any:
        """The result of `call` on a new stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = call()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def capture(self, call: Callable[[], Any]) -> Graph:
        """A CUDA graph of `call`, after two calls on a side stream."""
        for _ in range(_WARM_UPS):
            self.aside(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return Graph(result, graph.replay)

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """Between the calls that ncu --profile-from-start off waits for."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        yield
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    def free_bytes(self) -> int:
        """Free memory of the device."""
        return torch.cuda.mem_get_info()[0]


class StandIn:
    """The CPU in place of a GPU: everything runs at once, a graph is the call made again.

    While it captures it refuses operators whose output's shape depends on values, in the call and in every backend
    below it: on a GPU each waits for the device, which a capture does not allow. What reads a single number is let
    pass, for the backends rightly do so on the CPU.
    """

    name = "cpu"

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def elapsed(self, call: Callable[[], Any], queued: bool = False) -> float:
        """Seconds by the host's clock."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def aside(self, call: Callable[[], Any]) -> Any:
        """The result of `call`."""
        return call()

    def capture(self, call: Callable[[], Any]) -> Graph:
        """A call to warm up, one that must not wait, and `replay` as one more into the same tensors."""
        call()
        with _refusing_to_wait():
            result = call()

        def replay() -> None:
            for target, source in zip(tree_leaves(result), tree_leaves(call()), strict=True):
                if isinstance(target, torch.Tensor):
                    target.copy_(source)

        return Graph(result, replay)

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """No profiler looks."""
        yield

    def free_bytes(self) -> int:
        """So little that nobody tries sizes that only a GPU can hold."""
        return 1 << 30


def device_of(name: str) -> Device:
    """The device `name`: cuda, or the CPU standing in for one."""
    return Cuda() if torch.device(name).type == "cuda" else StandIn()


_WAITING = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("nonzero", "masked_select", "bincount", "unique_consecutive", "unique_dim", "_unique", "_unique2")
)


class _RefusingToWait(TorchDispatchMode):
    """Raises on operators for which a GPU makes the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            raise RuntimeError(f"{func} waits for the device, which is not allowed while a graph is captured")
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    packet = func.overloadpacket
    if packet is torch.ops.aten.index or packet is torch.ops.aten.index_put_:
        filled = packet is torch.ops.aten.index_put_ and args[2].numel() == 1  # by a mask that nobody counts
        return not filled and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return packet in _WAITING


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Refuse them in this block and in the backends that it calls, which a dispatch mode alone does not enter."""
    plain = dispatch.implementation

    def implementation(operator: str, name: str) -> Callable[..., Any]:
        function = plain(operator, name)

        @wraps(function)
        def guarded(*arguments: Any) -> Any:
            with _RefusingToWait():
                return function(*arguments)

        return guarded

    dispatch.implementation = implementation  # type: ignore[assignment]
    try:
        with _RefusingToWait():
            yield
    finally:
        dispatch.implementation = plain
