"""Triton's interpreter, watched: a launch ends with an error where a GPU might do otherwise than the interpreter did.

A pointer carries the tensor that it was made from through Triton's pointer arithmetic, so an access outside that tensor
is seen even where other memory lies there. An address out of a table of pointers stands for the tensor that begins
there now.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
from torch.utils import deterministic
from triton.runtime import interpreter

from bench.gpu.interpreter import mend
from tests.triton_races.accesses import Access, Finding, Kind, Line, runs_of
from tests.triton_races.launch import NOWHERE, Launch

THREADS_PER_WARP = 64  # on AMD, and 32 on NVIDIA: what is sound for more threads is for fewer
_OF_TRITON = os.path.dirname(triton.__file__) + os.sep
_REGION = "region"  # the attribute of a handle that holds the region of its pointers, or one for each entry
# what moves pointers without changing what they point into
_POINTER_OPS = (
    "create_addptr", "create_bitcast", "create_broadcast", "create_expand_dims", "create_reshape", "create_trans",
    "create_splat", "create_unsplat", "create_select", "create_join", "create_cat",
)  # fmt: skip


class RaceError(AssertionError):
    """What a launch did that a GPU may do otherwise."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("\n".join(f"[{f.kind}] {f.text}" for f in findings))
        self.findings = findings


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and past-the-end address of the entries of a tensor."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


class _Alive:
    """The tensors that begin at an address, found among the objects that Python knows."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], weakref.ref[torch.Tensor]] = {}

    def extent(self, address: int, size: int) -> tuple[int, int] | None:
        """Of the longest tensor of entries of `size` bytes that begins there."""
        tensor = self._get(address, size)
        if tensor is None or tensor.data_ptr() != address:
            self._look_around()
            tensor = self._get(address, size)
        return None if tensor is None else extent(tensor)

    def _get(self, address: int, size: int) -> torch.Tensor | None:
        found = self._known.get((address, size))
        return None if found is None else found()

    def _look_around(self) -> None:
        self._known.clear()
        for thing in gc.get_objects():
            if not issubclass(type(thing), torch.Tensor):
                continue
            try:
                address, size = thing.data_ptr(), thing.element_size()
            except RuntimeError:  # no memory of its own, as fake tensors have none
                continue
            longest = self._get(address, size)
            if longest is None or extent(longest)[1] < extent(thing)[1]:
                self._known[address, size] = weakref.ref(thing)


class _Result(interpreter.TensorHandle):
    """What an atomic returns, which tells when somebody looks."""

    def __init__(self, handle: Any, look: Callable[[], None]) -> None:
        self._data, self.dtype, self.attr, self._look = handle.data, handle.dtype, handle.attr, look

    @property
    def data(self) -> Any:
        self._look()
        return self._data


def _line() -> Line:
    """The innermost line outside of Triton and of this file."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OF_TRITON, __file__)):
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _looked_at_by_triton() -> bool:
    """Whether Triton combines the results of two atomics, as for the maximum of floating-point numbers."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((_OF_TRITON, __file__)):
        if frame.f_code.co_name in ("atomic_max", "atomic_min"):
            return True
        frame = frame.f_back
    return False


class Recorder:
    """Watches the launches of a process.

    Args:
        declared: names of kernels whose programs wait for one another, each with the reason why they may.
    """

    def __init__(self, declared: Mapping[str, str]) -> None:
        self.declared = declared
        self.findings: list[Finding] = []
        self.launches: dict[str, int] = {}
        self.launch: Launch | None = None
        self._alive = _Alive()
        self._names: dict[tuple[int, int], str] = {}

    def execute(self, run: Callable[..., Any], executor: Any, *arguments: Any, **options: Any) -> Any:
        """Run a kernel's grid, and raise what was found."""
        name = executor.fn.__name__
        self.launches[name] = self.launches.get(name, 0) + 1
        self._names = _names_of(dict(zip(executor.arg_names, arguments, strict=False)) | options)
        threads = int(options.get("num_warps", 4)) * THREADS_PER_WARP
        launch = self.launch = Launch(name, threads, self.declared.get(name, ""))
        try:
            result = run(executor, *arguments, **options)
        except Exception:
            self._raise(list(launch.findings.values()))
            raise
        finally:
            self.launch = None
        self._raise(launch.end())
        return result

    def _raise(self, findings: list[Finding]) -> None:
        self.findings += findings
        if findings:
            raise RaceError(findings) from None

    def argument(self, tensor: Any) -> int:
        """The region of a tensor that is passed to the kernel."""
        assert self.launch is not None
        bounds = extent(getattr(tensor, "base", tensor))
        return self.launch.region(self._names.get(bounds, "a tensor"), *bounds)

    def regions_of(self, addresses: Any, size: int) -> Any:
        """The regions of addresses that were numbers: of the tensors that begin there."""
        assert self.launch is not None
        regions = np.full(addresses.shape, NOWHERE)
        for address in np.unique(addresses):
            bounds = self._alive.extent(int(address), size) if address else None
            if bounds is not None:
                regions[addresses == address] = self.launch.region(f"the tensor at {int(address):#x}", *bounds)
        return regions

    def access(self, kind: Kind, pointers: Any, mask: Any, synchronises: bool = False) -> Access | None:
        """Note what is about to be touched; raises where that is outside of the pointers' tensor."""
        if self.launch is None:
            return None
        live = np.asarray(mask.data if isinstance(mask, interpreter.TensorHandle) else mask, bool)
        every = bool(live.all())
        regions = pointers.attr.get(_REGION, NOWHERE)
        if np.ndim(regions) > 0:
            regions = regions.reshape(-1) if every else regions[live]
        addresses = (pointers.data.reshape(-1) if every else pointers.data[live]).astype(np.int64)
        size = _size(pointers)
        access = Access(kind, _line(), pointers.data, size, *runs_of(addresses, size))
        self.launch.add(access, addresses, regions, synchronises)
        return access

    def result(self, handle: Any, access: Access | None, synchronises: bool) -> Any:
        """What an atomic returned, watched."""
        launch = self.launch
        if launch is None or access is None:
            return handle
        looked: list[bool] = []

        def look() -> None:
            if not looked and not _looked_at_by_triton():
                looked.append(True)
                launch.use(access, synchronises)

        return _Result(handle, look)


def _size(pointers: Any) -> int:
    """Bytes of an entry."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _names_of(arguments: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Names of the arguments that are tensors, by their extent; several may be one tensor."""
    names: dict[tuple[int, int], str] = {}
    for name, value in arguments.items():
        tensor = getattr(value, "base", value)
        if isinstance(tensor, torch.Tensor):
            bounds = extent(tensor)
            names[bounds] = f"{names[bounds]} or {name}" if bounds in names else name
    return names


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integers: what a kernel leaves unwritten is seen in its result."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def recording(declared: Mapping[str, str] | None = None) -> Iterator[Recorder]:
    """Watch every launch in the interpreter."""
    mend()
    recorder = Recorder(declared or {})
    changed: list[tuple[Any, str, Any]] = []

    def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
        if not hasattr(owner, name):  # newer or older than this Triton
            return
        original = getattr(owner, name)
        changed.append((owner, name, original))
        setattr(owner, name, lambda *arguments, **options: around(original, *arguments, **options))

    builder = interpreter.InterpreterBuilder
    wrap(interpreter.GridExecutor, "__call__", recorder.execute)
    _watch_programs(recorder, builder, wrap)
    _watch_pointers(recorder, builder, wrap)
    _watch_accesses(recorder, builder, wrap)
    try:
        yield recorder
    finally:
        for owner, name, original in reversed(changed):
            setattr(owner, name, original)


def _watch_programs(recorder: Recorder, builder: Any, wrap: Callable[..., None]) -> None:
    def set_grid_idx(original: Any, self: Any, x: int, y: int, z: int) -> None:
        original(self, x, y, z)
        if recorder.launch is not None:
            recorder.launch.begin_program((z * self.grid_dim[1] + y) * self.grid_dim[0] + x)

    def create_barrier(original: Any, self: Any, *arguments: Any) -> Any:
        if recorder.launch is not None:
            recorder.launch.barrier()
        return original(self, *arguments)

    wrap(builder, "set_grid_idx", set_grid_idx)
    wrap(builder, "create_barrier", create_barrier)


def _watch_pointers(recorder: Recorder, builder: Any, wrap: Callable[..., None]) -> None:
    handle_type = interpreter.TensorHandle

    def implicit(original: Any, argument: Any) -> Any:
        result = original(argument)
        if hasattr(argument, "data_ptr") and recorder.launch is not None:
            result.handle.attr[_REGION] = recorder.argument(argument)
        return result

    def pointer_op(original: Any, *arguments: Any) -> Any:
        result = original(*arguments)
        known = [a.attr[_REGION] for a in arguments if isinstance(a, handle_type) and _REGION in a.attr]
        if known and all(np.ndim(region) == 0 and region == known[0] for region in known):
            result.attr[_REGION] = known[0]
        elif known:  # the same operation on the numbers of the regions
            moved = [_region_handle(a) if isinstance(a, handle_type) and _REGION in a.attr else a for a in arguments]
            numbers = moved[1].data if original.__name__ == "create_addptr" else original(*moved).data
            result.attr[_REGION] = numbers
        return result

    def int_to_ptr(original: Any, self: Any, number: Any, kind: Any) -> Any:
        result = original(self, number, kind)
        if recorder.launch is not None:
            result.attr[_REGION] = recorder.regions_of(result.data, _size(result))
        return result

    def described(original: Any, self: Any, *arguments: Any) -> Any:
        pointers, masks = original(self, *arguments)
        pointers.attr[_REGION] = self.base.attr.get(_REGION, NOWHERE)
        return pointers, masks

    wrap(interpreter, "_implicit_cvt", implicit)
    for name in _POINTER_OPS:
        wrap(builder, name, pointer_op)
    wrap(builder, "create_int_to_ptr", int_to_ptr)
    for name in ("TensorDescHandle", "BlockPointerHandle"):
        if hasattr(interpreter, name):
            wrap(getattr(interpreter, name), "materialize_pointers", described)


def _region_handle(pointers: Any) -> Any:
    regions = np.broadcast_to(pointers.attr[_REGION], pointers.data.shape).astype(np.int64)
    return interpreter.TensorHandle(regions, interpreter.tl.int64)


def _watch_accesses(recorder: Recorder, builder: Any, wrap: Callable[..., None]) -> None:
    relaxed = interpreter._ir.MEM_SEMANTIC.RELAXED

    def load(original: Any, self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        recorder.access("load", pointers, mask)
        return original(self, pointers, mask, *rest, **options)

    def store(original: Any, self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        recorder.access("store", pointers, mask)
        return original(self, pointers, value, mask, *rest, **options)

    def cas(original: Any, self: Any, pointers: Any, compare: Any, value: Any, sem: Any, scope: Any) -> Any:
        access = recorder.access("atomic", pointers, True, sem != relaxed)
        return recorder.result(original(self, pointers, compare, value, sem, scope), access, sem != relaxed)

    def rmw(original: Any, self: Any, op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        access = recorder.access("atomic", pointers, mask, sem != relaxed)
        return recorder.result(original(self, op, pointers, value, mask, sem, scope), access, sem != relaxed)

    wrap(builder, "create_masked_load", load)
    wrap(builder, "create_masked_store", store)
    wrap(builder, "create_atomic_cas", cas)
    wrap(builder, "create_atomic_rmw", rmw)
