"""A block-sparse matrix as the compiled extension takes it, and its products."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension

__all__ = ["BlockMatrix"]


class BlockMatrix(extension.BlockMatrix):
    """A block-sparse matrix, and its products."""

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str, save: bool, y: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """act(z), written to `y` where that is given, and z if it is to be saved."""
        cpu, flat, threads = extension.native.cpu, extension.tokens_of(x), torch.get_num_threads()
        tokens = flat.shape[0]
        y = x.new_empty(*x.shape[:-1], self.out) if y is None else y
        saved = torch.empty_like(y) if save else None
        bias = None if bias is None else bias.contiguous()
        scratch = extension.workspace(cpu.masked_matmul_workspace_bytes(self.handle, tokens, False, threads))
        cpu.masked_matmul(
            self.dtype,
            self.handle,
            flat.data_ptr(),
            tokens,
            flat.stride(0),
            0 if bias is None else bias.data_ptr(),
            extension.ACTIVATIONS[activation],
            y.data_ptr(),
            0 if saved is None else saved.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
            threads,
        )
        return y, saved

    def input_gradient(self, dz: torch.Tensor) -> torch.Tensor:
        """dz times the matrix."""
        cpu, flat, threads = extension.native.cpu, extension.tokens_of(dz), torch.get_num_threads()
        tokens = flat.shape[0]
        dx = dz.new_empty(*dz.shape[:-1], self.in_)
        scratch = extension.workspace(cpu.masked_matmul_workspace_bytes(self.handle, tokens, True, threads))
        cpu.masked_matmul_input_gradient(
            self.dtype,
            self.handle,
            flat.data_ptr(),
            tokens,
            flat.stride(0),
            dx.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
            threads,
        )
        return dx

    def sampled(self, dz: torch.Tensor, x: torch.Tensor, raw: torch.Tensor, grad_gate: torch.Tensor | None) -> None:
        """raw = dz^T x on the blocks, times the gate; grad_gate = its products with the data before that."""
        cpu, left, right = extension.native.cpu, extension.tokens_of(dz), extension.tokens_of(x)
        tokens, stride = left.shape[0], right.stride(0)
        scratch = extension.workspace(cpu.sampled_matmul_workspace_bytes(self.handle, tokens, stride))
        cpu.sampled_matmul(
            self.dtype,
            self.handle,
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            stride,
            tokens,
            raw.data_ptr(),
            0 if grad_gate is None else grad_gate.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
            torch.get_num_threads(),
        )
