"""Masked weight theta * m * h and its gradient, block scores, and the coupling that a budget puts between blocks."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.arguments import block_grid, block_shape, clip_block, number, require_device, require_float
from spartan_kernels.operands import (
    AddBlockSigns,
    BlockScores,
    KeptSoftMass,
    MaskedWeight,
    MaskedWeightBackward,
    MaskedWeightCorrection,
    MaskedWeightCoupling,
)
from spartan_kernels.ops._define import define
from spartan_kernels.solution import is_solution


def _fake_weight(o: MaskedWeight | MaskedWeightBackward) -> torch.Tensor:
    return torch.empty_like(o.weight, memory_format=torch.contiguous_format)


def _fake_sums(o: MaskedWeightCoupling | KeptSoftMass) -> torch.Tensor:
    return o.weight.new_empty(2, dtype=torch.float64)


def _fake_scores(o: BlockScores) -> torch.Tensor:
    return o.weight.new_empty(block_grid(o.weight.shape, (o.rows, o.columns)))


def _fake_nothing(o: Any) -> None:
    return None


masked_weight_forward = define("masked_weight_forward", MaskedWeight, "Tensor", _fake_weight)
masked_weight_backward = define("masked_weight_backward", MaskedWeightBackward, "Tensor", _fake_weight)
# the same, in the memory of grad
masked_weight_backward_ = define("masked_weight_backward_", MaskedWeightBackward, "()", _fake_nothing, writes=("grad",))
_coupling = define("masked_weight_coupling", MaskedWeightCoupling, "Tensor", _fake_sums)
_correct = define("masked_weight_correct_", MaskedWeightCorrection, "()", _fake_nothing, writes=("grad",))
kept_soft_mass = define("kept_soft_mass", KeptSoftMass, "Tensor", _fake_sums)
add_block_signs_ = define("add_block_signs_", AddBlockSigns, "()", _fake_nothing, writes=("grad",))
_scores = define("block_scores", BlockScores, "Tensor", _fake_scores)


def block_costs(
    shape: tuple[int, ...] | torch.Size, block_size: int | tuple[int, int], device: torch.device | str | None = None
) -> float | torch.Tensor:
    """Number of weights in each block: a float where the blocks divide the shape, else a tensor of the grid's shape.

    The tensor is on `device`; None: on PyTorch's default one.
    """
    rows, columns = block_shape(block_size)
    grid = block_grid(shape, block_size)
    if (rows, columns) == (1, 1) or (shape[0] % rows == 0 and shape[1] % columns == 0):
        return float(rows * columns)
    height = torch.full((grid[0],), float(rows), device=device)
    height[-1] = shape[0] - rows * (grid[0] - 1)
    width = torch.full((grid[1],), float(columns), device=device)
    width[-1] = shape[1] - columns * (grid[1] - 1)
    area = height[:, None] * width
    return area.reshape(*area.shape, *(1 for _ in grid[2:])).expand(grid).contiguous()


def expand_blocks(
    grid: torch.Tensor, shape: tuple[int, ...] | torch.Size, block_size: int | tuple[int, int]
) -> torch.Tensor:
    """The value of each weight's block, in the weight's shape.

    Raises:
        ValueError: a grid that is not `block_grid(shape, block_size)`.
    """
    rows, columns = block_shape(block_size)
    _require_grid("grid", grid, shape, (rows, columns))
    if (rows, columns) == (1, 1):
        return grid
    tall = grid.repeat_interleave(rows, 0)[: shape[0]]
    return tall.repeat_interleave(columns, 1)[:, : shape[1]]


def block_scores(
    weight: torch.Tensor, block_size: int | tuple[int, int], *, backend: str | None = None
) -> torch.Tensor:
    """Magnitude of each block: v_b, the sum of |theta_i| over the block.

    Args:
        weight: theta, [out, in, ...], floating point.
        block_size: an int or (rows, columns) of the first two dimensions.
        backend: "auto" or the name of a backend.

    Returns:
        v of shape `block_grid(weight.shape, block_size)`, dtype of `weight`.

    Raises:
        TypeError: integer weights. ValueError: a block size that is not positive.
    """
    require_float("weight", weight)
    block_grid(weight.shape, block_size)
    o = BlockScores(weight.detach(), *clip_block(block_size, weight.shape), backend or "")
    scores: torch.Tensor = _scores(o)
    return scores


def masked_weight(
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    block_size: int | tuple[int, int] = 1,
    *,
    beta: float | torch.Tensor = 1.0,
    costs: float | torch.Tensor = 1.0,
    straight_through: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """The sparse weight of the forward pass, with a gradient that goes straight through the hard mask.

    w = theta * m_b * h_b;  dL/dtheta_i = G_i m_b + sign(theta_i) beta s_b g_b / a_b,  g_b = sum over b of G_i theta_i,
    s = m (1 - m): the part of equation (2) that needs this layer only. `masked_weight_coupling` gives the rest.

    Args:
        weight: theta, [out, in, ...].
        soft: m, one per block (`block_grid`), floating point; None for ones, whose gradient is G. Where each weight is
            a block it may be the solution (c, d) that `solve_masks_` leaves in its state, float64 [2]: then m =
            sigmoid(beta (|theta| / a - c) + d) is computed where it is needed, and takes no memory on the CPU.
        hard: h, one per block, bool; None for ones.
        block_size: an int or (rows, columns).
        beta: sharpness that m was solved with.
        costs: a, a number, 0-dim or one per block.
        straight_through: let the gradient reach blocks where h is 0; else it is multiplied by h.
        backend: "auto" or the name of a backend.

    Returns:
        w, shape and dtype of `weight`; differentiable in `weight` once `spartan` is imported.

    Raises:
        TypeError: integer weights or a mask of the wrong dtype. ValueError: a mask or costs of the wrong shape.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022, the training algorithm.
    """
    soft, hard, beta_, costs_, rows, columns = masked_weight_arguments(weight, soft, hard, block_size, beta, costs)
    o = MaskedWeight(weight, soft, hard, beta_, costs_, rows, columns, straight_through, backend or "")
    masked: torch.Tensor = masked_weight_forward(o)
    return masked


def masked_weight_coupling(
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor,
    block_size: int | tuple[int, int] = 1,
    *,
    beta: float | torch.Tensor,
    costs: float | torch.Tensor = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """This layer's share of the two sums that make the multiplier r of the budget, from its final gradient.

    q_b = sum over b of grad_i theta_i;  g_b m_b = q_b / (1 + beta (1 - m_b) v_b / a_b);
    returns [sum_b (1 - m_b) g_b m_b, sum_b a_b m_b (1 - m_b)]; r is the ratio of the sums over all layers of a budget.

    Args:
        grad: the `.grad` of `weight`: accumulated, reduced over ranks and unscaled.
        weight: theta, as in the forward pass.
        soft: m, one per block, or its solution, as for `masked_weight`.
        block_size: an int or (rows, columns).
        beta: sharpness that m was solved with.
        costs: a, a number, 0-dim or one per block.
        backend: "auto" or the name of a backend.

    Returns:
        float64 [2].

    Raises:
        TypeError, ValueError: as `masked_weight`; also for a gradient of another shape.
    """
    soft_, _, beta_, costs_, rows, columns = masked_weight_arguments(weight, soft, None, block_size, beta, costs)
    _require_grad(grad, weight)
    assert soft_ is not None
    o = MaskedWeightCoupling(grad, weight.detach(), soft_, beta_, costs_, rows, columns, backend or "")
    sums: torch.Tensor = _coupling(o)
    return sums


def masked_weight_correct_(
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor,
    scale: float | torch.Tensor,
    block_size: int | tuple[int, int] = 1,
    *,
    beta: float | torch.Tensor = 1.0,
    costs: float | torch.Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """Complete equation (2) in place: grad_i -= sign(theta_i) s_b scale, with scale = beta r.

    Args:
        grad: the gradient that `masked_weight_coupling` read.
        weight: theta, as in the forward pass.
        soft: m, one per block, or its solution, as for `masked_weight`.
        scale: beta r, a number or 0-dim tensor.
        block_size: an int or (rows, columns).
        beta: sharpness that m was solved with; read where `soft` is a solution.
        costs: a, a number, 0-dim or one per block; likewise.
        backend: "auto" or the name of a backend.

    Raises:
        TypeError, ValueError: as `masked_weight_coupling`.
    """
    soft_, _, beta_, costs_, rows, columns = masked_weight_arguments(weight, soft, None, block_size, beta, costs)
    _require_grad(grad, weight)
    assert soft_ is not None
    scale_ = number("scale", scale, weight.device)
    o = MaskedWeightCorrection(grad, weight.detach(), soft_, scale_, beta_, costs_, rows, columns, backend or "")
    _correct(o)


def masked_weight_arguments(
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    block_size: int | tuple[int, int],
    beta: float | torch.Tensor,
    costs: float | torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None, Any, Any, int, int]:
    """The arguments of the masked-weight operators, checked and brought to tensors; a number may stay one."""
    require_float("weight", weight)
    rows, columns = block_shape(block_size)
    if soft is not None:
        require_float("soft", soft)
        require_device("soft", soft, weight.device, "weight")
        if is_solution(soft, weight):
            _require_solution(soft, (rows, columns))
        else:
            _require_grid("soft", soft, weight.shape, (rows, columns))
            soft = soft.to(weight.dtype)
    if hard is not None:
        if hard.dtype != torch.bool:
            raise TypeError(f"hard must be a bool tensor; got dtype {hard.dtype}")
        _require_grid("hard", hard, weight.shape, (rows, columns))
        require_device("hard", hard, weight.device, "weight")
    if isinstance(costs, torch.Tensor) and costs.dim():
        _require_grid("costs", costs, weight.shape, (rows, columns))
        costs = costs.to(device=weight.device, dtype=weight.dtype)
    else:
        costs = number("costs", costs, weight.device)
    return soft, hard, number("beta", beta, weight.device), costs, *clip_block((rows, columns), weight.shape)


def _require_solution(soft: torch.Tensor, block_size: tuple[int, int]) -> None:
    if soft.shape != (2,) or soft.dtype != torch.float64:
        raise ValueError(
            "soft must have one entry per block, or be a solution (c, d), float64 of shape (2,);"
            f" got {soft.dtype} of shape {tuple(soft.shape)}"
        )
    if block_size != (1, 1):
        raise ValueError(f"soft may be a solution (c, d) where each weight is a block; got block_size {block_size}")


def _require_grid(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...] | torch.Size, block_size: tuple[int, int]
) -> None:
    grid = block_grid(shape, block_size)
    if tuple(tensor.shape) != grid:
        raise ValueError(
            f"{name} must have shape {grid}, one entry per {block_size} block of a weight of shape {tuple(shape)};"
            f" got {tuple(tensor.shape)}"
        )


def _require_grad(grad: torch.Tensor, weight: torch.Tensor) -> None:
    if grad.shape != weight.shape or grad.dtype != weight.dtype:
        raise ValueError(
            f"grad must be {weight.dtype} of shape {tuple(weight.shape)}; got {grad.dtype} of {tuple(grad.shape)}"
        )
    require_device("grad", grad, weight.device, "weight")
