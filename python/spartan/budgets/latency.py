"""A cost model in seconds: what each kept block adds to the time of its weight's products, measured on this machine."""

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
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spartan.budgets.costs import CostModel, PricedWeight, one_forward
from spartan.distributed import own_class
from spartan.functional import masked_conv2d, masked_linear
from spartan.nn.selection import Candidate, Use, find_weights
from spartan.saving.files import require_regular
from spartan.tuning import Timer, median_seconds
from spartan_kernels import block_grid
from spartan_kernels.arguments import block_shape

__all__ = ["LatencyEntry", "LatencyTable"]

_FORMAT, _VERSION = "spartan-latency", 2  # version 1 had no names
_DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
_MEASURED = "Linear, MultiheadAttention, transformers' Conv1D and, on the CPU, Conv2d (one group, padded by zeros)"


@dataclass(frozen=True)
class LatencyEntry:
    """Seconds that one kept block of a weight adds to a forward pass in which its products have inputs of those shapes.

    `shape` and `block_size` are those of the weight as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    block_size: tuple[int, int]
    inputs: tuple[tuple[int, ...], ...]
    seconds: float


class LatencyTable(CostModel):
    """Each block costs the seconds that it adds to the forward products of its weight, looked up by the weight's name.

    What a layer takes with no block at all is the same for every mask and no part of the cost. Over several processes
    measure once and load that file on every rank: masks are the same only where costs are.

    Args:
        entries: what was measured, one for each weight and block size.

    Raises:
        ValueError: two entries of the same weight and block size, seconds that are not positive.

    Example::

        LatencyTable.measure(model, torch.randn(64, 784), block_size=32).save("latency.json")
        Sparsifier(model, method, total_steps=1000, costs=LatencyTable.load("latency.json"))
    """

    unit = "seconds"

    def __init__(self, entries: Sequence[LatencyEntry]) -> None:
        self.entries = tuple(entries)
        self._entries: dict[tuple[str, tuple[int, int]], LatencyEntry] = {}
        for entry in self.entries:
            other = self._entries.setdefault((entry.name, entry.block_size), entry)
            if other is not entry:
                raise ValueError(f"entries must hold one for each weight and block size; got {other} and {entry}")
            sizes = (*entry.shape, *entry.block_size, *(side for one in entry.inputs for side in one))
            if not all(type(side) is int and side >= 0 for side in sizes) or not entry.shape:
                raise ValueError(f"entries must hold shapes of whole numbers from 0 on; got {entry}")
            if not isinstance(entry.name, str):
                raise ValueError(f"entries must hold the names of weights; got {entry}")
            if not 0 < entry.seconds < float("inf"):
                raise ValueError(f"entries must hold positive seconds; got {entry}")

    @staticmethod
    def measure(
        model: nn.Module, *args: Any, block_size: int | tuple[int, int], timer: Timer | None = None, **kwargs: Any
    ) -> LatencyTable:
        """Time the products by blocks of a model's weights, with the inputs that they have in one forward pass.

        Measured are the weights of Linear, of MultiheadAttention (for each the tokens of query, key or value that it is
        multiplied by), of transformers' `Conv1D` and, on the CPU, of Conv2d. Of attention and `Conv1D` it is the
        product of a Linear of that shape that skips blocks, as they themselves multiply the whole masked weight. A
        weight that is used several times costs the sum; one of which a use cannot be measured has no entry.

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
            ValueError: block size 1, a model that is masked already, no weight that can be measured.
        """
        size = block_shape(block_size)
        if size == (1, 1):
            raise ValueError("block_size must be larger than 1: single weights are multiplied densely; got 1")
        clock = timer or median_seconds
        known: dict[Any, float] = {}
        entries = []
        for candidate, products in _products_of(model, args, kwargs):
            seconds = 0.0
            for product in products:
                if product.key not in known:
                    known[product.key] = _seconds_per_block(product, size, clock)
                seconds += product.share * known[product.key]
            inputs = tuple(tuple(product.x.shape) for product in products)
            shape, stored = tuple(candidate.weight.shape), candidate.block_size(size)
            entries.append(LatencyEntry(candidate.name, shape, stored, inputs, seconds))
        if not entries:
            raise ValueError(f"model must have a weight of {_MEASURED} that runs with this example; found none")
        return LatencyTable(entries)

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
            require_regular(Path(path))
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document["format"] != _FORMAT or document["version"] != _VERSION:
                raise ValueError(
                    f"its format is {document['format']!r}, version {document['version']!r}; measure again"
                )
            return LatencyTable([_entry(**entry) for entry in document["entries"]])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is no latency table: {type(error).__name__}: {error}") from error

    def block_costs(self, model: nn.Module, weights: Sequence[PricedWeight]) -> list[float | torch.Tensor]:
        """Seconds of each block.

        Raises:
            ValueError: weights that were not measured with this shape and block size, all of them by name.
        """
        found = [self._entries.get((weight.name, weight.block_size)) for weight in weights]
        missing = [
            f"{weight.name!r} of shape {tuple(weight.weight.shape)} in blocks of {weight.block_size}, in a"
            f" {own_class(weight.module).__name__}"
            for weight, entry in zip(weights, found, strict=True)
            if entry is None or entry.shape != tuple(weight.weight.shape)
        ]
        if missing:
            raise ValueError(
                f"costs: the latency table has no entry for {'; '.join(missing)}. It has {len(self.entries)} entries,"
                f" for blocks of {sorted({entry.block_size for entry in self.entries})}. Measured are {_MEASURED},"
                " where they run with the example. Leave the others out with exclude=, or give costs such as"
                " FLOPs(example_input), which has a price for all that multiplies"
            )
        return [entry.seconds for entry in found if entry is not None]


def _entry(name: str, shape: list[int], block_size: list[int], inputs: list[list[int]], seconds: float) -> LatencyEntry:
    rows, columns = block_size
    shapes = tuple(tuple(one) for one in inputs)
    return LatencyEntry(name, tuple(shape), block_shape((rows, columns)), shapes, float(seconds))


@dataclass(frozen=True)
class _Product:
    """x w^T of a weight [out, in], or a convolution; `share`: which part of a weight's blocks are those of w."""

    x: torch.Tensor
    weight: torch.Tensor
    convolution: tuple[Any, ...] | None = None
    share: float = 1.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What its time depends on."""
        x, w = self.x, self.weight
        return tuple(x.shape), tuple(w.shape), self.convolution, x.dtype, w.dtype, w.device

    def masked(self, gate: torch.Tensor, size: tuple[int, int]) -> Callable[[], object]:
        """The product that skips the blocks whose gate is zero."""
        if self.convolution is not None:
            return partial(masked_conv2d, self.x, self.weight, gate, size, None, *self.convolution)
        return partial(masked_linear, self.x, self.weight, gate, size)


def _products_of(model: nn.Module, args: Any, kwargs: Any) -> list[tuple[Candidate, list[_Product]]]:
    """The weights that can be measured, with the products that one forward pass makes of them."""
    found: list[tuple[Candidate, list[_Product]]] = []
    handles = []
    for candidate in find_weights(model):
        callers = [_caller(candidate, use) for use in candidate.uses]
        if candidate.unfit is not None or None in callers:
            continue
        found.append((candidate, []))
        for use, caller in zip(candidate.uses, callers, strict=True):
            assert caller is not None
            hook = partial(_note, candidate, use, found[-1][1])
            handles.append(caller.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with one_forward(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [(candidate, products) for candidate, products in found if products]


def _caller(candidate: Candidate, use: Use) -> nn.Module | None:
    """The module whose calls show what the weight is multiplied by; None where it cannot be measured."""
    module, kind = use.module, type(use.module)
    if kind is nn.MultiheadAttention:
        return module
    if kind is NonDynamicallyQuantizableLinear:  # its weight is read, it is never called
        return use.owner if type(use.owner) is nn.MultiheadAttention else None
    if kind is nn.Linear or (isinstance(module, nn.Conv2d) and kind is nn.Conv2d and _skips_blocks(module)):
        return module
    return module if candidate.transposed and candidate.weight.dim() == 2 else None  # the `Conv1D` of transformers


def _skips_blocks(module: nn.Conv2d) -> bool:
    plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain and module.weight.device.type == "cpu"


def _note(
    candidate: Candidate, use: Use, into: list[_Product], caller: nn.Module, args: tuple[Any, ...], kwargs: Any
) -> None:
    """Add what a call of `caller` multiplies the weight by."""
    weight = candidate.weight.detach()
    if isinstance(caller, nn.MultiheadAttention):
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        into += _attention_products(use.parameter, weight, given["query"], given["key"], given["value"])
        return
    x = (*args, *kwargs.values())[0].detach()
    if isinstance(caller, nn.Conv2d):
        into.append(_Product(x, weight, (caller.stride, caller.padding, caller.dilation)))
    else:
        into.append(_Product(x, weight.t().contiguous() if candidate.transposed else weight))


def _attention_products(
    parameter: str, weight: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list[_Product]:
    """Of a projection of MultiheadAttention; that of the output has as many tokens as the query."""
    if parameter == "in_proj_weight" and not (query is key and key is value):
        thirds = zip((query, key, value), weight.chunk(3), strict=True)
        return [_Product(x.detach(), third, share=1 / 3) for x, third in thirds]
    x = {"k_proj_weight": key, "v_proj_weight": value}.get(parameter, query)
    return [_Product(x.detach(), weight)]


def _seconds_per_block(product: _Product, size: tuple[int, int], timer: Timer) -> float:
    weight = product.weight
    grid = block_grid(weight.shape, size)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(grid, generator=generator, device=generator.device).flatten().argsort().argsort().view(grid)
    blocks, seconds = [], []
    with torch.no_grad():
        for density in _DENSITIES:
            count = max(1, round(density * order.numel()))
            gate = (order < count).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            blocks.append(float(count))
            seconds.append(timer(product.masked(gate, size), weight.device))
    pairs = combinations(zip(blocks, seconds, strict=True), 2)
    slopes = [(t1 - t0) / (b1 - b0) for (b0, t0), (b1, t1) in pairs if b1 > b0]
    slope = statistics.median(slopes) if slopes else 0.0
    return slope if slope > 0 else seconds[-1] / blocks[-1]
