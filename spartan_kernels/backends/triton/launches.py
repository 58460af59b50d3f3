"""What an operator launches, in order: the launcher runs this list, and its bytes can be added up without a GPU.

Triton's own launch takes tens of microseconds of Python: it binds arguments, finds out what to specialise on and looks
the kernel up. A `Recording` does that once for a problem (its sizes, dtypes, flags and device) and from then on calls
the compiled kernels with new addresses in the places of the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import driver

# A launch that finds nothing to do returns before it reads: "cold" ones work without a state of an earlier solve,
# "rare" ones where a start, a range of keys or a written mask has missed, or where ties are many.
When = Literal["always", "cold", "rare"]
_ALIGNMENT = 16  # bytes: what Triton specialises pointers on
# multiply-adds stay one instruction: Triton 3.10 no longer fuses them unless asked
FUSED = {"enable_fp_fusion": True}
_CONSTANTS = (int, float, str, type(None), tl.dtype)


@dataclass(frozen=True)
class Launch:
    """One kernel on a grid, what it reads and writes of the tensors of the problem in bytes, and when it does."""

    kernel: Any
    grid: int | tuple[int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    reads: int = 0
    writes: int = 0
    when: When = "always"

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__).strip("_")

    @property
    def programs(self) -> tuple[int, ...]:
        """The grid as Triton takes it."""
        return self.grid if isinstance(self.grid, tuple) else (self.grid,)

    def __call__(self) -> Any:
        """Launch it; the compiled kernel, or None in Triton's interpreter."""
        return self.kernel[self.programs](*self.arguments, **self.options, **FUSED)


class _Step(NamedTuple):
    kernel: Any
    run: Any  # Triton's launcher of the compiled kernel
    programs: tuple[int, int, int]
    pick: itemgetter[Any]  # its arguments, from the addresses and the constants of the recording


class Recording:
    """The launches of a problem: the first time as Triton launches, then with nothing but their addresses new.

    One problem is one set of sizes, dtypes, flags and one device: all that its launches depend on but where its tensors
    lie. Of that only counts which begin at 16 bytes: Triton compiles kernels of their own for those.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[list[_Step], list[Any]]] = {}

    def knows(self, addresses: Sequence[int]) -> bool:
        """Whether `replay` can be called with tensors at these addresses."""
        return _misaligned(addresses) in self._kept

    def record(self, launches: Sequence[Launch], pointers: Sequence[torch.Tensor]) -> None:
        """Launch all, in order, on the device of the pointers; keep it where those are all that may change."""
        with torch.cuda.device_of(pointers[0]):
            compiled = [launch() for launch in launches]
        places = {id(pointer): place for place, pointer in enumerate(pointers)}
        if len(places) < len(pointers) or torch.version.hip is not None:
            # a tensor in two places does not say which is which; AMD's kernels depend on how long storages are
            return
        if not all(hasattr(kernel, "packed_metadata") for kernel in compiled):
            return  # in the interpreter nothing is compiled
        constants: list[Any] = []
        steps = []
        for launch, kernel in zip(launches, compiled, strict=True):
            picked = _places(launch, places, constants)
            if picked is None:
                return
            grid = (*launch.programs, 1, 1)
            steps.append(_Step(kernel, kernel.run, (grid[0], grid[1], grid[2]), itemgetter(*picked)))
        self._kept[_misaligned([pointer.data_ptr() for pointer in pointers])] = steps, constants

    def replay(self, addresses: list[int], device: torch.device) -> None:
        """Launch all again with the tensors at these addresses, in the order of the pointers recorded."""
        active = driver.active
        current = active.get_current_device()
        if device.index is not None and device.index != current:
            with torch.cuda.device(device):
                return self.replay(addresses, device)
        stream = active.get_current_stream(current)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        watched = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        steps, constants = self._kept[_misaligned(addresses)]
        values = addresses + constants
        for kernel, launcher, programs, pick in steps:
            if watched:  # a profiler wants to be told of each launch
                kernel[programs](*pick(values), stream=stream)
            else:
                function, packed = kernel.function, kernel.packed_metadata
                launcher(*programs, stream, function, packed, None, enter, leave, *pick(values))


def _places(launch: Launch, places: dict[int, int], constants: list[Any]) -> list[int] | None:
    """Where each argument of a kernel is found among pointers and constants, to which its own are added."""
    names = launch.kernel.arg_names[len(launch.arguments) :]
    if any(name not in launch.options for name in names):
        return None
    picked = []
    for value in (*launch.arguments, *(launch.options[name] for name in names)):
        place = places.get(id(value)) if isinstance(value, torch.Tensor) else None
        if place is None:
            if not isinstance(value, _CONSTANTS):  # a tensor that is no pointer, or a descriptor of one
                return None
            place = len(places) + len(constants)
            constants.append(value)
        picked.append(place)
    return picked


def aligned(addresses: Iterable[int]) -> bool:
    """Whether all are multiples of 16 bytes."""
    union = 0
    for address in addresses:
        union |= address
    return union % _ALIGNMENT == 0


def _misaligned(addresses: Sequence[int]) -> int:
    """Which are not, a bit for each."""
    if aligned(addresses):
        return 0
    return sum(1 << place for place, address in enumerate(addresses) if address % _ALIGNMENT)


def run(recording: Recording, pointers: Sequence[torch.Tensor], plan: Callable[[], Sequence[Launch]]) -> None:
    """Replay a recording with these pointers, or record what `plan` makes of them."""
    addresses = [pointer.data_ptr() for pointer in pointers]
    if recording.knows(addresses):
        recording.replay(addresses, pointers[0].device)
    else:
        recording.record(plan(), pointers)


def start(launch: Launch) -> None:
    """Launch it; one like it before (the same sizes, dtypes and options) is replayed."""
    places: dict[int, int] = {}
    pointers: list[torch.Tensor] = []
    kind: list[Any] = []
    for argument in launch.arguments:
        if isinstance(argument, torch.Tensor):
            place = places.setdefault(id(argument), len(pointers))
            if place == len(pointers):
                pointers.append(argument)
            kind.append((place, argument.dtype))
        else:
            kind.append(argument)
    device = pointers[0].device
    recording = _recording_of(launch.kernel, launch.grid, device, tuple(kind), tuple(launch.options.items()))
    run(recording, pointers, lambda: [launch])


@lru_cache(maxsize=1024)
def _recording_of(*key: Any) -> Recording:
    return Recording()


def bytes_moved(launches: Iterable[Launch], *when: When) -> int:
    """Bytes that the launches of these kinds read and write."""
    return sum(launch.reads + launch.writes for launch in launches if launch.when in when)
