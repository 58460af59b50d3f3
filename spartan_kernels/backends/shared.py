"""What backends share, in plain PyTorch: gradients around a product, sums over blocks, checks of a top-k's operands.

A backend states what it computes itself: a product, its gradient for the input, a product on some blocks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_scores
from spartan_kernels.groups import gather, refusal, require_agreement, total
from spartan_kernels.operands import (
    HardTopk,
    HardTopkIndices,
    MaskedConvBackward,
    MaskedLinearBackward,
    MaskedWeight,
    PackedLinearBackward,
)

_aten = torch.ops.aten


def before_activation(grad: torch.Tensor, saved: torch.Tensor, activation: str) -> torch.Tensor:
    """dL/dz from dL/dy; `saved` is y for relu, z for the others."""
    if activation == "relu":
        return _aten.threshold_backward(grad, saved, 0)
    if activation == "silu":
        return _aten.silu_backward(grad, saved)
    if activation:
        return _aten.gelu_backward(grad, saved, approximate="tanh" if activation == "gelu_tanh" else "none")
    return grad


def bias_gradient(dz: torch.Tensor) -> torch.Tensor:
    """dL/db [out] from dL/dz [..., out]."""
    return flat(dz).sum(0)


class LayerNeeds(NamedTuple):
    """Which operands of a masked layer want a gradient."""

    x: bool
    weight: bool
    gate: bool
    bias: bool


class PackedNeeds(NamedTuple):
    """Which operands of a packed layer want a gradient."""

    x: bool
    values: bool
    bias: bool


Gradient = torch.Tensor | None


def layer_gradients(
    o: MaskedLinearBackward,
    of_input: Callable[[torch.Tensor], torch.Tensor],
    of_parameters: Callable[[torch.Tensor, LayerNeeds], tuple[Gradient, Gradient]],
) -> list[Gradient]:
    """Gradients of x, weight, gate and bias; None where not needed.

    Args:
        o: what the operator takes.
        of_input: dL/dx from dL/dz.
        of_parameters: the gradients of weight and gate from dL/dz, those at least that are needed.
    """
    needs = LayerNeeds(*o.needs)
    dz = before_activation(o.grad, o.saved, o.activation)
    dx = of_input(dz) if needs.x else None
    dweight, dgate = of_parameters(dz, needs) if needs.weight or needs.gate else (None, None)
    dweight = dweight if needs.weight else None
    dgate = dgate.to(o.gate.dtype) if needs.gate and dgate is not None else None
    return [dx, dweight, dgate, bias_gradient(dz) if needs.bias else None]


def packed_gradients(
    o: PackedLinearBackward,
    of_input: Callable[[torch.Tensor], torch.Tensor],
    of_values: Callable[[torch.Tensor], torch.Tensor],
) -> list[Gradient]:
    """Gradients of x, values and bias, each from dL/dz; None where not needed."""
    needs = PackedNeeds(*o.needs)
    dz = before_activation(o.grad, o.saved, o.activation)
    dx = of_input(dz) if needs.x else None
    values = of_values(dz) if needs.values else None
    return [dx, values, bias_gradient(dz) if needs.bias else None]


def flat(x: torch.Tensor) -> torch.Tensor:
    """[..., features] as [tokens, features]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def expand(grid: torch.Tensor, shape: torch.Size, rows: int, columns: int) -> torch.Tensor:
    """The value of each weight's block, in the weight's shape."""
    if (rows, columns) == (1, 1) or grid.dim() == 0:
        return grid.expand(shape)
    return grid.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]


def block_sum(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sum over each (rows, columns) block of the first two dimensions."""
    if (rows, columns) == (1, 1):
        return tensor
    out, in_, *rest = tensor.shape
    flat = tensor.reshape(out, in_, tensor.shape[2:].numel()).movedim(-1, 0)
    flat = functional.pad(flat, (0, -in_ % columns, 0, -out % rows))
    tiles = flat.reshape(flat.shape[0], flat.shape[1] // rows, rows, flat.shape[2] // columns, columns)
    sums = tiles.sum((2, 4)).movedim(0, -1)
    return sums.reshape(sums.shape[0], sums.shape[1], *rest)


def parameter_gradients(
    dense: torch.Tensor, keep: torch.Tensor | None, o: MaskedLinearBackward | MaskedConvBackward
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and gate from that of their product, where `keep` is set; empty where not needed."""
    needs = LayerNeeds(*o.needs)
    if keep is not None:
        dense = torch.where(keep, dense, 0.0)
    dweight = dgate = o.weight.new_empty(0)
    if needs.weight:
        dweight = (dense * expand(o.gate, o.weight.shape, o.rows, o.columns)).to(o.weight.dtype).contiguous()
    if needs.gate:
        wide = torch.promote_types(o.gate.dtype, torch.float32)
        weight = o.weight if keep is None else torch.where(keep, o.weight, 0.0)  # dropped ones may be NaN
        dgate = block_sum(dense.to(wide) * weight, o.rows, o.columns).to(o.gate.dtype).contiguous()
    return dweight, dgate


def dense_filter_gradients(
    o: MaskedConvBackward, masked: Callable[[MaskedWeight], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and gate from PyTorch's gradient of all of the weight, which `masked` scales by the gate."""
    geometry = o.stride, o.padding, o.dilation, False, [0, 0], o.groups
    dense = torch.ops.aten.convolution_backward(o.grad, o.x, o.weight, None, *geometry, [False, True, False])[1]
    if LayerNeeds(*o.needs).gate:  # sums over blocks
        mask = o.backward_mask
        keep = None if mask is None else expand(mask, o.weight.shape, o.rows, o.columns)
        return parameter_gradients(dense, keep, o)
    unused = o.gate.new_ones(())  # what the gradient of a masked weight takes
    gated = MaskedWeight(dense.contiguous(), o.gate.float(), o.backward_mask, unused, unused, o.rows, o.columns, True)
    return masked(gated), o.x.new_empty(0)


def require_one_group(groups: int, backend: str) -> None:
    """Raise ValueError for a convolution in groups, which this backend does not serve."""
    if groups != 1:
        raise ValueError(f"groups must be 1 for backend={backend!r}; got {groups}: leave the backend to 'auto'")


def check_rows(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor | None
) -> None:
    """Raise for values [rows, n], budgets [rows], costs or beta that cannot be used, where the host may look."""
    if not inspectable(values):
        return
    require_scores("values", values)
    if beta is not None:
        require_beta(beta)
    a = values.new_ones(()) if costs is None else costs
    require_costs(a)
    clamp_budget(budget, unmasked_cost(values, a))


def check_list(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor | None,
    group: str = "",
) -> None:
    """The same for a list that shares one budget; on every rank of a group alike, whichever has the bad value."""
    if not inspectable(values[0]):
        return

    def check() -> None:
        if beta is not None:
            require_beta(beta)
        for index, v in enumerate(values):
            require_scores(f"values[{index}]", v)
        for cost in costs:
            require_costs(cost)

    refused = refusal(check)
    ones = [v.new_ones(()) for v in values]
    each = [unmasked_cost(v.reshape(-1), c.reshape(-1)) for v, c in zip(values, costs or ones, strict=True)]
    numbers = (float(bool(refused)), budget, 0.0 if beta is None else beta, torch.stack(each).sum())
    every = gather(torch.stack([torch.as_tensor(n, dtype=torch.float64, device=budget.device) for n in numbers]), group)
    require_agreement(refused, every, group)
    clamp_budget(budget, total(every[:, 3]))


def unmasked_cost(values: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Sum of the costs along the last dimension, float64, of the entries that are not masked by -inf."""
    return torch.where(values == -torch.inf, 0.0, costs).sum(-1, dtype=torch.float64)


def costs_of_row(costs: torch.Tensor | None, row: int) -> list[torch.Tensor]:
    """The costs of one row as those of a list that holds this row alone."""
    if costs is None:
        return []
    return [costs[row] if costs.dim() == 2 else costs]


def with_indices(o: HardTopkIndices, select: Callable[[HardTopk], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask that `select` finds for k entries of each row, and their indices [rows, k], without a host sync.

    Index j of a row is the first place up to which j + 1 entries are taken; a row with fewer than k entries to keep
    takes its first masked ones too.
    """
    n = o.values.shape[1]
    masked = o.values == -torch.inf
    kept = (n - masked.sum(-1)).clamp(max=o.k)
    mask = select(HardTopk(o.values, kept.to(torch.float64), None))
    filling = masked & (masked.cumsum(-1, dtype=torch.int32) <= (o.k - kept)[:, None])
    taken = (mask | filling).cumsum(-1, dtype=torch.int32)
    ranks = torch.arange(1, o.k + 1, dtype=torch.int32, device=taken.device).repeat(taken.shape[0], 1)
    return mask, torch.searchsorted(taken, ranks).clamp(max=n - 1)  # a row with NaN, on a GPU, may take fewer


def row_gradients(
    values: torch.Tensor, cost_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the gradients of values and costs (empty unless `cost_grad`) and, by row, of budget and beta."""
    grad_values = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    grad_costs = torch.empty_like(grad_values) if cost_grad else values.new_empty(0)
    grad_budget, grad_beta = (torch.empty(values.shape[0], dtype=torch.float64, device=values.device) for _ in range(2))
    return grad_values, grad_costs, grad_budget, grad_beta
