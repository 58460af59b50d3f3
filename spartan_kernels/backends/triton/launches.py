"""What an operator launches, in order: the launcher runs this list, and its bytes can be added up without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

# A launch that finds nothing to do returns before it reads: "cold" ones work without a state of an earlier solve,
# "rare" ones where a start, a range of keys or a written mask has missed, or where ties are many.
When = Literal["always", "cold", "rare"]


@dataclass(frozen=True)
class Launch:
    """One kernel on a grid, what it reads and writes of the tensors of the problem in bytes, and when it does."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    reads: int = 0
    writes: int = 0
    when: When = "always"

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__).strip("_")

    def __call__(self) -> None:
        """Launch it."""
        self.kernel[(self.grid,)](*self.arguments, **self.options)


def run(launches: Iterable[Launch], on: torch.Tensor) -> None:
    """Launch all, in order, on the device of a tensor."""
    with torch.cuda.device_of(on):
        for launch in launches:
            launch()


def bytes_moved(launches: Iterable[Launch], *when: When) -> int:
    """Bytes that the launches of these kinds read and write."""
    return sum(launch.reads + launch.writes for launch in launches if launch.when in when)
