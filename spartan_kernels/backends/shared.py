"""What backends share, in plain PyTorch: gradients of activations and biases, and sums over blocks."""

from __future__ import annotations

import torch
from torch.nn import functional

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
    return dz.reshape(dz.shape[:-1].numel(), dz.shape[-1]).sum(0)


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
    dense: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    backward_mask: torch.Tensor | None,
    rows: int,
    columns: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and gate from that of their product; empty where not needed."""
    if backward_mask is not None:
        dense = torch.where(expand(backward_mask, weight.shape, rows, columns), dense, 0.0)
    dweight = dgate = weight.new_empty(0)
    if needs[1]:
        dweight = (dense * expand(gate, weight.shape, rows, columns)).to(weight.dtype).contiguous()
    if needs[2]:
        wide = torch.promote_types(gate.dtype, torch.float32)
        dgate = block_sum(dense.to(wide) * weight, rows, columns).to(gate.dtype).contiguous()
    return dweight, dgate
