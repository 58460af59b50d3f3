"""What the checks over processes share: the registry, and the whole that the ranks' parts make up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spartan_kernels import dispatch
from spartan_kernels.testing import (
    assert_within_error_budget,
    budget_error,
    cost_tensor,
    make_costs,
    make_values,
    oracle_soft_topk,
    plain_soft_topk,
    soft_topk_tolerance,
)

WORLDS = (2, 4)
# Triton's kernels are interpreted in a run of their own, which need not test the others again.
BACKENDS = [name for name in dispatch.GROUP_BACKENDS if dispatch.unavailable(name) is None]
BACKENDS = ["triton"] if "triton" in BACKENDS else BACKENDS
SHAPES = [(40, 33), (7,), (16, 5, 3), (1001,)]
COSTS = ("none", "numbers", "mixed")
CUTS = ("even", "uneven", "first", "last")


class Check(NamedTuple):
    """A check, called with a backend on every rank of a world of one of these sizes.

    Those of one suite share a start. Checks of "operators" run on every backend over their fewest ranks, and over more
    on the first; others with "auto".
    """

    function: Callable[[str], None]
    worlds: tuple[int, ...]
    suite: str

    def backends(self, size: int) -> list[str]:
        """Those of a world of this size."""
        if self.suite != "operators":
            return ["auto"]
        return BACKENDS if size == min(self.worlds) else BACKENDS[:1]


CHECKS: dict[str, Check] = {}


def check(*worlds: int, suite: str = "operators") -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Register a check; of every world size unless some are named."""

    def register(function: Callable[[str], None]) -> Callable[[str], None]:
        CHECKS[function.__name__] = Check(function, worlds or WORLDS, suite)
        return function

    return register


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def raises(text: str) -> AbstractContextManager[Any]:
    return pytest.raises(ValueError, match=text)


def cuts(length: int, kind: str) -> list[int]:
    """How many of `length` entries each rank has."""
    n = world()
    if kind == "even":
        return [length * (i + 1) // n - length * i // n for i in range(n)]
    if kind == "first":
        return [length, *[0] * (n - 1)]
    if kind == "last":
        return [*[0] * (n - 1), length]
    sizes = [length // (2 ** (i + 1)) for i in range(n - 1)]  # uneven, and the second rank has none
    sizes[min(1, n - 2)] = 0 if n > 2 else sizes[min(1, n - 2)]
    return [*sizes, length - sum(sizes)]


def shard(tensor: Tensor, kind: str) -> Tensor:
    return tensor.reshape(-1).split(cuts(tensor.numel(), kind))[rank()]


def layers(distribution: str = "normal", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of different scale, the same on every rank."""
    return [make_values(distribution, s, scale=10.0 ** (i - 1), seed=i, dtype=dtype) for i, s in enumerate(SHAPES)]


def layer_costs(kind: str, values: list[Tensor]) -> list[Any] | None:
    if kind == "none":
        return None
    if kind == "numbers":
        return [float(2**i) for i in range(len(values))]
    return [[2.0, make_costs("power_of_two", v.shape, seed=i), torch.tensor(0.5)][i % 3] for i, v in enumerate(values)]


def shard_costs(costs: list[Any] | None, kind: str) -> list[Any] | None:
    return costs and [shard(a, kind) if isinstance(a, Tensor) and a.dim() else a for a in costs]


def gathered(parts: Sequence[Tensor]) -> Tensor:
    """What all ranks hold, in their order, each its list in order."""
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, [part.detach().clone() for part in parts])
    return torch.cat([part.reshape(-1) for row in every for part in row])


def rank_major(tensors: Sequence[Tensor], kind: str) -> Tensor:
    """The whole list in the order that breaks ties: by rank, then by tensor, then by index."""
    pieces = [t.reshape(-1).split(cuts(t.numel(), kind)) for t in tensors]
    return torch.cat([piece[r] for r in range(world()) for piece in pieces])


def written_out(costs: list[Any] | None, values: list[Tensor]) -> list[Tensor]:
    return [cost_tensor(a, v) for a, v in zip(costs or [None] * len(values), values, strict=True)]


def require_same_bits(*tensors: Tensor) -> None:
    """The same bytes on every rank."""
    own = [t.detach().contiguous().view(torch.uint8).tolist() if t.dim() else t.item() for t in tensors]
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, own)
    assert all(other == every[0] for other in every), every


def require_soft(mask: Tensor, row: Tensor, budget: float, a: Tensor, beta: float) -> None:
    exact = oracle_soft_topk(row, budget, a, beta)
    floor = soft_topk_tolerance(exact, row, budget, a, beta)
    assert_within_error_budget(mask, exact, plain_soft_topk(row, budget, a, beta), floor=floor)
    assert budget_error(mask, budget, a) <= 1e-6
