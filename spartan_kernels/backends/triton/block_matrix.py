"""The block-sparse matrix of a product on Triton: launches and their sizes."""

from __future__ import annotations

import torch
import triton

from spartan_kernels.backends.triton import launches, sampled_kernels
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.product_launches import pointer_or, product_launches
from spartan_kernels.backends.triton.product_plan import SampledPlan, kind_of, precision_of
from spartan_kernels.tiles import architecture_of, tile_for


class BlockMatrix:
    """The block-sparse matrix of a product: dense in memory, or its blocks alone with `positions`."""

    def __init__(
        self,
        data: torch.Tensor,
        shape: tuple[int, int],
        block: tuple[int, int],
        layout: list[torch.Tensor],
        gate: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> None:
        self.data = data if positions is None and data.stride(-1) == 1 else data.contiguous()
        self.shape, self.block, self.layout, self.positions = shape, block, layout, positions
        self.gate = None if gate is None else dense_float(gate)

    def product(
        self,
        x: torch.Tensor,
        forward: bool,
        bias: torch.Tensor | None = None,
        activation: str = "",
        save: bool = False,
        scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        result: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(x w^T + b) by rows of blocks, or x w by columns of blocks, and the sums before the activation.

        `scales` of tokens and of outputs multiply the sums; `result` is the dtype of both, if not that of x.
        """
        flat = tokens_of(x)
        extent = self.shape[0] if forward else self.shape[1]
        device, dtype, packed = x.device, result or x.dtype, self.positions is not None
        y = torch.empty((*x.shape[:-1], extent), dtype=dtype, device=device)
        saved = torch.empty_like(y) if save else torch.empty(0, dtype=dtype, device=device)
        if y.numel() == 0:
            return y, saved
        offsets, indices = self.layout[:2] if forward else self.layout[2:4]
        order = self.layout[4] if forward else self.layout[4][self.layout[0].shape[0] - 1 :]
        tokens, stride = flat.shape[0], flat.stride(0)
        span, other = self.block if forward else self.block[::-1]
        precision = precision_of(x)
        tile = tile_for(device, tokens, span, other, kind_of(x.dtype, precision))
        row = self.block[1] if packed else self.data.stride(0)
        product = product_launches(
            device, x.dtype, dtype, tokens, stride, self.shape, self.block, row, forward, packed,
            self.gate is not None, bias is not None, scales[0] is not None, activation, save, precision, tile,
        )  # fmt: skip
        out = y if product.split == 1 else torch.empty((product.split, y.numel()), dtype=torch.float32, device=device)
        workspace = product.workspace()
        index = order, offsets, indices
        pointers = [flat, self.data, out, *index]
        pointers += [p for p in (self.gate, bias, *scales, self.positions, *workspace) if p is not None]
        pointers += [saved] * save + [y] * (out is not y)
        operands = flat, self.data, self.gate, bias, scales, out, y, saved, index, self.positions, workspace
        launches.run(product.recording, pointers, lambda: product.launches(*operands))
        return y, saved

    def sampled(
        self, dz: torch.Tensor, x: torch.Tensor, out: torch.Tensor, grad_gate: torch.Tensor | None
    ) -> torch.Tensor:
        """dz^T x on the active blocks of `out`, times the gate; `grad_gate`: its products with the data before that."""
        left = dz if dz.dim() == 2 else dz.reshape(dz.shape[:-1].numel(), dz.shape[-1])
        right = tokens_of(x)
        rows, columns = self.block
        grid = triton.cdiv(self.shape[0], rows), triton.cdiv(self.shape[1], columns)
        precision = precision_of(x)
        plan = SampledPlan(grid, rows, columns, kind_of(x.dtype, precision), architecture_of(x.device))
        programs = grid[0] * plan.parts
        if programs == 0 or left.shape[0] == 0:
            return out
        arguments = (
            left, right, self.data, pointer_or(self.gate, right), out, pointer_or(grad_gate, right), *self.layout[:2],
            left.shape[0], *self.shape, grid[1], plan.parts, left.stride(0), left.stride(1), right.stride(0),
            self.data.stride(0), 0 if self.positions is not None else out.stride(0),
        )  # fmt: skip
        options = {
            "ROWS": rows, "COLUMNS": columns, "PACKED": self.positions is not None, "HAS_GATE": self.gate is not None,
            "GATE_GRAD": grad_gate is not None, "PRECISION": precision, **plan.options(),
        }  # fmt: skip
        start(Launch(sampled_kernels._sampled_kernel, programs, arguments, options))
        return out


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """x as [tokens, features] whose features lie side by side."""
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def dense_float(gate: torch.Tensor) -> torch.Tensor:
    """A gate in float32, without gaps."""
    return gate if gate.dtype == torch.float32 and gate.is_contiguous() else gate.to(torch.float32).contiguous()
