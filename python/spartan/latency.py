"""A cost model in seconds: what each kept block adds to the time of its layer's product, measured on this machine."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spartan.conv import masked_conv2d
from spartan.costs import CostModel, PricedWeight, one_forward
from spartan.matmul import masked_linear
from spartan.tuning import Timer, median_seconds
from spartan_kernels import block_grid
from spartan_kernels.arguments import block_shape

__all__ = ["LatencyEntry", "LatencyTable"]

_FORMAT, _VERSION = "spartan-latency", 1
_DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
_TYPES = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LatencyEntry:
    """Seconds that one kept block adds to the forward product of a weight of this shape with an input of that shape."""

    shape: tuple[int, ...]
    block_size: tuple[int, int]
    input: tuple[int, ...]
    seconds: float


class LatencyTable(CostModel):
    """Each block costs the seconds it adds to its layer's forward product, looked up by (weight shape, block size).

    What a layer takes with no block at all is the same for every mask and no part of the cost. Over several processes
    measure once and load that file on every rank: masks are the same only where costs are.

    Args:
        entries: what was measured, one for each weight shape and block size.

    Raises:
        ValueError: two entries of the same weight shape and block size, seconds that are not positive.

    Example::

        LatencyTable.measure(model, torch.randn(64, 784), block_size=32).save("latency.json")
        Sparsifier(model, method, total_steps=1000, costs=LatencyTable.load("latency.json"))
    """

    unit = "seconds"

    def __init__(self, entries: Sequence[LatencyEntry]) -> None:
        self.entries = tuple(entries)
        self._seconds: dict[tuple[tuple[int, ...], tuple[int, int]], LatencyEntry] = {}
        for entry in self.entries:
            other = self._seconds.setdefault((entry.shape, entry.block_size), entry)
            if other != entry:
                raise ValueError(
                    f"entries must hold one for each weight shape and block size; {entry.shape} in blocks of"
                    f" {entry.block_size} has two, for inputs of shape {other.input} and {entry.input}"
                )
            if not 0 < entry.seconds < float("inf"):
                raise ValueError(f"entries must hold positive seconds; got {entry}")

    @staticmethod
    def measure(
        model: nn.Module, *args: Any, block_size: int | tuple[int, int], timer: Timer | None = None, **kwargs: Any
    ) -> LatencyTable:
        """Time the products of every Linear and Conv2d of a model, with the inputs that they see in one forward pass.

        Random blocks are kept at densities from 0.1 to 0.5; the seconds of a block are the slope of time over blocks,
        the median of all pairs' (one slow measurement does not move it far), or, should noise make that negative, the
        time of the densest over its blocks.

        Args:
            model: not masked yet, on the device to measure.
            *args: what it is called with, of the batch size that matters.
            **kwargs: the same by name.
            block_size: an int or (rows, columns), larger than 1: single weights are multiplied densely at any sparsity.
            timer: seconds of a call on a device; None measures the median of several.

        Raises:
            ValueError: block size 1, no layer that can be measured, or layers of the same weight shape whose inputs
                differ in shape.
        """
        size = block_shape(block_size)
        if size == (1, 1):
            raise ValueError("block_size must be larger than 1: single weights are multiplied densely; got 1")
        seen = _inputs(model, args, kwargs)
        clock = timer or median_seconds
        entries: dict[tuple[tuple[int, ...], tuple[int, ...]], LatencyEntry] = {}
        for module, x in seen:
            weight: Any = module.weight
            key = tuple(weight.shape), tuple(x.shape)
            if key not in entries:
                seconds = _seconds_per_block(module, x, size, clock)
                entries[key] = LatencyEntry(key[0], size, key[1], seconds)
        if not entries:
            raise ValueError(
                "model must have a Linear, or on the CPU a Conv2d, that runs with this example; found none"
            )
        return LatencyTable(list(entries.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, to a temporary name first."""
        file = Path(path)
        document = {"format": _FORMAT, "version": _VERSION, "entries": [asdict(entry) for entry in self.entries]}
        temporary = file.with_name(file.name + ".part")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(temporary, file)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ValueError: a file that cannot be read or is none of these.
        """
        try:
            document = json.loads(Path(path).read_text())
            if document["format"] != _FORMAT or document["version"] != _VERSION:
                raise ValueError(f"its format is {document['format']!r}, version {document['version']!r}")
            return LatencyTable(
                [
                    LatencyEntry(
                        tuple(e["shape"]), block_shape(tuple(e["block_size"])), tuple(e["input"]), e["seconds"]
                    )
                    for e in document["entries"]
                ]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no latency table: {type(error).__name__}: {error}") from error

    def block_costs(self, model: nn.Module, weights: Sequence[PricedWeight]) -> list[float | torch.Tensor]:
        """Seconds of each block.

        Raises:
            ValueError: a weight whose shape and block size were not measured.
        """
        costs: list[float | torch.Tensor] = []
        for weight in weights:
            entry = self._seconds.get((tuple(weight.weight.shape), weight.block_size))
            if entry is None:
                raise ValueError(
                    f"costs: the latency table has no entry for weight {weight.name!r} of shape"
                    f" {tuple(weight.weight.shape)} in blocks of {weight.block_size}; it has"
                    f" {sorted((e.shape, e.block_size) for e in self.entries)}"
                )
            costs.append(entry.seconds)
        return costs


def _entry(shape: list[int], block_size: list[int], input: list[int], seconds: float) -> LatencyEntry:
    return LatencyEntry(tuple(shape), block_shape((block_size[0], block_size[1])), tuple(input), float(seconds))


def _inputs(model: nn.Module, args: Any, kwargs: Any) -> list[tuple[nn.Module, torch.Tensor]]:
    """Each layer that can be measured with the input of its first call, in one forward pass."""
    found: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.setdefault(module, inputs[0].detach())

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if type(m) in _TYPES and _measurable(m)]
    try:
        with one_forward(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.items())


def _measurable(module: nn.Module) -> bool:
    """Whether the module's product skips blocks."""
    if not isinstance(module, nn.Conv2d):
        return True
    plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain and module.weight.device.type == "cpu"


def _seconds_per_block(module: nn.Module, x: torch.Tensor, size: tuple[int, int], timer: Timer) -> float:
    weight: Any = module.weight
    grid = block_grid(weight.shape, size)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(grid, generator=generator).flatten().argsort().argsort().view(grid)
    blocks, seconds = [], []
    with torch.no_grad():
        for density in _DENSITIES:
            count = max(1, round(density * order.numel()))
            gate = (order < count).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            blocks.append(float(count))
            seconds.append(timer(_product(module, x, gate, size), weight.device))
    pairs = combinations(zip(blocks, seconds, strict=True), 2)
    slopes = [(t1 - t0) / (b1 - b0) for (b0, t0), (b1, t1) in pairs if b1 > b0]
    slope = statistics.median(slopes) if slopes else 0.0
    return slope if slope > 0 else seconds[-1] / blocks[-1]


def _product(module: Any, x: torch.Tensor, gate: torch.Tensor, size: tuple[int, int]) -> Callable[[], object]:
    if isinstance(module, nn.Conv2d):
        rest: Any = (module.stride, module.padding, module.dilation)
        return partial(masked_conv2d, x, module.weight, gate, size, None, *rest)
    return partial(masked_linear, x, module.weight, gate, size)
