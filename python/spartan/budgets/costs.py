"""Linear cost models: what keeping a block of a weight costs, in weights, FLOPs, seconds or any other unit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spartan.distributed import fsdp_modules, local, reshard
from spartan.nn.stacks import Stack
from spartan_kernels import block_costs, block_grid
from spartan_kernels.torch_private import TorchDispatchMode, is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BlockCosts",
    "CostModel",
    "FLOPs",
    "LayerCost",
    "Parameters",
    "PricePerBlock",
    "PricedWeight",
    "one_forward",
    "price",
]

PricePerBlock = Callable[[str, nn.Module, tuple[int, ...]], float | torch.Tensor]


@dataclass(frozen=True)
class PricedWeight:
    """A weight whose blocks are to be priced: its name in the model, the module that has it as `parameter`, blocks."""

    name: str
    module: nn.Module
    weight: torch.Tensor
    block_size: tuple[int, int]
    parameter: str = "weight"
    stack: Stack | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the blocks; of a stack of matrices [..., grid rows, grid columns]."""
        if self.stack is None:
            return block_grid(self.weight.shape, self.block_size)
        rows, columns = block_grid(self.stack.matrix, self.block_size)
        return (*self.weight.shape[:-2], rows, columns)

    def spread(self, total: float) -> float | torch.Tensor:
        """Cost of each block where that of the whole weight is shared out evenly over its entries."""
        shape = self.weight.shape if self.stack is None else self.stack.turned_shape
        each = block_costs(shape, self.block_size, "cpu") * (total / self.weight.numel())
        return each if self.stack is None or isinstance(each, float) else self.stack.back(each)


class LayerCost(NamedTuple):
    """Cost of a masked weight, in the unit of the cost model: of all its blocks, and of those kept now."""

    dense: float
    kept: float


class CostModel(ABC):
    """A cost that is a sum over the blocks that are kept: sum_b a_b h_b, a_b > 0.

    Attributes:
        unit: of the costs, for reports.
    """

    unit: str = ""

    @abstractmethod
    def block_costs(self, model: nn.Module, weights: Sequence[PricedWeight]) -> list[float | torch.Tensor]:
        """Cost of each block of each weight: a number for all blocks of a weight, or one for each (`grid`)."""


@dataclass(frozen=True)
class Parameters(CostModel):
    """Each weight costs 1: sparsity is the fraction of zeros."""

    unit = "weights"

    def block_costs(self, model: nn.Module, weights: Sequence[PricedWeight]) -> list[float | torch.Tensor]:
        """Number of weights in each block."""
        return [weight.spread(weight.weight.numel()) for weight in weights]


class FLOPs(CostModel):
    """Floating-point operations of one forward pass, measured by running it once on an example.

    A weight costs the operations in which it takes part, as `torch.utils.flop_counter` counts them (two for a
    multiplication and addition), evenly over its entries: 2 * rows of the input for a linear layer, 2 * images * output
    positions for a convolution. The model runs in evaluation mode without gradients, and its modes are restored; the
    generator of random numbers on the CPU is too. A sharded model runs on all ranks, each with an example.

    Args:
        args, kwargs: what the model is called with; any batch size, as only proportions matter.

    Example::

        Sparsifier(model, Spartan(sparsity=0.8), total_steps=1000, costs=FLOPs(torch.randn(1, 3, 32, 32)))
    """

    unit = "FLOPs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._args, self._kwargs = args, kwargs

    def block_costs(self, model: nn.Module, weights: Sequence[PricedWeight]) -> list[float | torch.Tensor]:
        """Operations of each block.

        Raises:
            ValueError: a weight that no counted operation reads, by name.
        """
        with one_forward(model), _FlopsOfWeights(weights) as counts, counts.following(model):
            model(*self._args, **self._kwargs)
        reshard(model)
        for weight, flops in zip(weights, counts.totals, strict=True):
            if not flops:
                raise ValueError(
                    f"costs: no operation that FLOPs counts reads weight {weight.name!r} when the model is called with"
                    " this example; leave it out with exclude=, or give other costs"
                )
        return [weight.spread(flops) for weight, flops in zip(weights, counts.totals, strict=True)]


class _FlopsOfWeights(TorchDispatchMode):
    """Counts the operations that read the memory of each of some weights, or a converted copy of it."""

    def __init__(self, weights: Sequence[PricedWeight]) -> None:
        super().__init__()
        from torch.utils.flop_counter import FlopCounterMode  # imports Triton

        self.totals = [0] * len(weights)
        self._weights = weights
        self._formulas = FlopCounterMode(display=False).flop_registry
        self._copies: list[tuple[torch.Tensor, int]] = []  # kept, so that no other tensor takes their memory
        self._locate()

    def _locate(self, *_: Any) -> None:
        found: list[Any] = [getattr(weight.module, weight.parameter) for weight in self._weights]
        self._owner = {_memory(tensor): index for index, tensor in enumerate(found)}
        self._owner.update({_memory(copy): index for copy, index in self._copies})
        self._owner.pop(0, None)  # FSDP has freed it

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Look where the weights are before and after each module, as FSDP moves them."""
        handles: list[RemovableHandle] = []
        if fsdp_modules(model):
            for module in model.modules():
                handles += [module.register_forward_pre_hook(self._locate), module.register_forward_hook(self._locate)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        read = {self._owner[key] for x in tensors if (key := _memory(x)) in self._owner}
        operator = func.overloadpacket
        if read and operator in self._formulas:
            flops = self._formulas[operator](*args, **kwargs, out_val=out)
            for index in read:
                self.totals[index] += int(flops)
        elif read and operator in _COPIES and _memory(out) not in self._owner:
            self._copies.append((out, self._owner[_memory(tensors[0])]))
            self._owner[_memory(out)] = self._copies[-1][1]
        return out


_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.clone)


def _memory(tensor: torch.Tensor) -> int:
    """Where the values begin; 0 for a tensor that has none of its own, as one that a collective has still to fill."""
    own = local(tensor)
    return 0 if is_traceable_wrapper_subclass(own) else own.untyped_storage().data_ptr()


@contextmanager
def one_forward(model: nn.Module) -> Iterator[None]:
    """A forward pass that leaves no trace: no gradients, evaluation mode, no fused layers, which nobody counts."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for module, mode in training.items():
            stack.callback(setattr, module, "training", mode)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@dataclass(frozen=True)
class _Called(CostModel):
    function: PricePerBlock

    def block_costs(self, model: nn.Module, weights: Sequence[PricedWeight]) -> list[float | torch.Tensor]:
        return [self.function(weight.name, weight.module, weight.grid) for weight in weights]


class BlockCosts(NamedTuple):
    """Costs of the blocks of a weight, as a solver takes them: a number for all, or one for each in the weight's dtype.

    `total` is that of all its blocks, `largest` that of the dearest.
    """

    blocks: float | torch.Tensor
    total: float
    largest: float


def price(
    costs: CostModel | PricePerBlock, model: nn.Module, weights: Sequence[PricedWeight]
) -> tuple[list[BlockCosts], float]:
    """Ask a cost model, or a function (name, module, shape of the blocks) -> cost per block, and check its answer.

    The costs are scaled so that all weights together cost as many units as they have entries: the budget, and with it
    the sharpness beta that acts on magnitude / cost, then mean what they mean where each weight costs 1. They are
    rounded to the weights' dtype; budgets and reports are of the rounded ones.

    Returns:
        For each weight its costs; and what one of their units is worth in the cost model's.

    Raises:
        TypeError: costs that are neither. ValueError: a cost that is not positive and finite or has another shape than
            the blocks, naming the weight.
    """
    if not isinstance(costs, CostModel) and not callable(costs):
        raise TypeError(f"costs must be a cost model or a function of (name, module, grid); got {costs!r}")
    asked = costs if isinstance(costs, CostModel) else _Called(costs)
    own = [_checked(w, cost) for w, cost in zip(weights, asked.block_costs(model, weights), strict=True)]
    unit = sum(_total(w, cost) for w, cost in zip(weights, own, strict=True)) / sum(w.weight.numel() for w in weights)
    priced = []
    for weight, cost in zip(weights, own, strict=True):
        held = torch.as_tensor(cost / unit, dtype=torch.float64, device="cpu").to(
            weight.weight.dtype
        )  # as the solver reads them
        blocks = held if held.dim() else float(held)
        priced.append(BlockCosts(blocks, _total(weight, blocks), float(held.max())))
    return priced, unit


def _checked(weight: PricedWeight, cost: Any) -> float | torch.Tensor:
    """The cost as a float or a float64 tensor on the CPU."""
    if isinstance(cost, torch.Tensor) and cost.dim() == 0:
        cost = cost.item()
    number = isinstance(cost, (int, float)) and not isinstance(cost, bool)
    if not number and not isinstance(cost, torch.Tensor):
        raise TypeError(f"costs must give numbers or tensors; for weight {weight.name!r} it gave {cost!r}")
    values = torch.as_tensor(cost, dtype=torch.float64, device="cpu").detach()
    if values.dim() and tuple(values.shape) != weight.grid:
        raise ValueError(
            f"costs must give weight {weight.name!r} one number or a tensor of shape {weight.grid}, one for each block;"
            f" got shape {tuple(values.shape)}"
        )
    wrong = values[~((values > 0) & (values < math.inf))]
    if wrong.numel():
        raise ValueError(
            f"costs must be positive and finite; for weight {weight.name!r} there is {float(wrong.flatten()[0])}"
        )
    return values if values.dim() else float(values)


def _total(weight: PricedWeight, cost: float | torch.Tensor) -> float:
    return float(cost.double().sum()) if isinstance(cost, torch.Tensor) else cost * math.prod(weight.grid)
