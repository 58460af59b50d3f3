"""Products with block-sparse matrices on the compiled extension: tensors to pointers, sizes and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from spartan_kernels.backends import native

_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_aten = torch.ops.aten


def block_layout(gate: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks."""
    gate = gate.detach().contiguous()
    mask = None if mask is None else mask.contiguous()
    grid_rows, grid_columns = gate.shape
    sizes = (grid_rows + 1, gate.numel(), grid_columns + 1, gate.numel())
    parts = torch.empty(sum(sizes), dtype=torch.int32).split(sizes)
    native._native.cpu.block_layout(
        gate.data_ptr(),
        gate.element_size(),
        0 if mask is None else mask.data_ptr(),
        grid_rows,
        grid_columns,
        *(part.data_ptr() for part in parts),
    )
    return parts


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """x as [tokens, features] whose features lie side by side."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


class _Matrix:
    """A block-sparse matrix as the extension takes it; keeps what it points to."""

    def __init__(
        self,
        data: torch.Tensor,
        shape: tuple[int, int],
        block: tuple[int, int],
        layout: list[torch.Tensor],
        gate: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        self.data = data.detach()
        if positions is not None or self.data.stride(-1) != 1:
            self.data = self.data.contiguous()
        self.gate = None if gate is None else gate.detach().to(torch.float32).contiguous()
        self.layout, self.positions = [part.contiguous() for part in layout], positions
        stride = 0 if positions is not None else self.data.stride(0)
        offsets = [part.data_ptr() for part in self.layout] if layout else [0] * 4
        self.handle = native._native.cpu.BlockMatrix(
            self.data.data_ptr(), *shape, *block, stride, _pointer(self.gate), *offsets, _pointer(positions)
        )
        self.dtype = _DTYPES[data.dtype]
        self.out, self.in_ = shape

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str, save: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat, threads = _tokens(x), torch.get_num_threads()
        y = x.new_empty((*x.shape[:-1], self.out))
        saved = torch.empty_like(y) if save else x.new_empty(0)
        b = None if bias is None else bias.detach().contiguous()
        scratch = native._workspace(
            native._native.cpu.masked_matmul_workspace_bytes(self.handle, flat.shape[0], threads)
        )
        native._native.cpu.masked_matmul(
            self.dtype,
            self.handle,
            flat.data_ptr(),
            flat.shape[0],
            flat.stride(0),
            _pointer(b),
            _ACTIVATIONS[activation],
            y.data_ptr(),
            saved.data_ptr() if save else 0,
            scratch.data_ptr(),
            scratch.numel(),
            threads,
        )
        return y, saved

    def input_gradient(self, dz: torch.Tensor) -> torch.Tensor:
        flat, threads = _tokens(dz), torch.get_num_threads()
        dx = dz.new_empty((*dz.shape[:-1], self.in_))
        scratch = native._workspace(
            native._native.cpu.masked_matmul_workspace_bytes(self.handle, flat.shape[0], threads)
        )
        native._native.cpu.masked_matmul_input_gradient(
            self.dtype,
            self.handle,
            flat.data_ptr(),
            flat.shape[0],
            flat.stride(0),
            dx.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
            threads,
        )
        return dx

    def sampled(self, dz: torch.Tensor, x: torch.Tensor, raw: torch.Tensor, grad_gate: torch.Tensor | None) -> None:
        """raw = dz^T x on the blocks, times the gate; grad_gate = its products with the data before that."""
        left, right = _tokens(dz), _tokens(x)
        scratch = native._workspace(native._native.cpu.sampled_matmul_workspace_bytes(self.handle, left.shape[0]))
        native._native.cpu.sampled_matmul(
            self.dtype,
            self.handle,
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            right.stride(0),
            left.shape[0],
            raw.data_ptr(),
            _pointer(grad_gate),
            scratch.data_ptr(),
            scratch.numel(),
            torch.get_num_threads(),
        )
