"""A block-sparse matrix as the compiled extension takes it, and its products."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension

__all__ = ["BlockMatrix"]


class BlockMatrix(extension.BlockMatrix):
    """A block-sparse matrix, and its products."""

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str, save: bool, y: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(z), written to `y` where that is given, and z if it is to be saved."""
        flat, threads = extension.tokens_of(x), torch.get_num_threads()
        y = x.new_empty((*x.shape[:-1], self.out)) if y is None else y
        saved = torch.empty_like(y) if save else x.new_empty(0)
        b = None if bias is None else bias.detach().contiguous()
        scratch = extension.workspace(
            extension.native.cpu.masked_matmul_workspace_bytes(self.handle, flat.shape[0], False, threads)
        )
        extension.native.cpu.masked_matmul(
            self.dtype,
            self.handle,
            flat.data_ptr(),
            flat.shape[0],
            flat.stride(0),
            extension.pointer(b),
            extension.ACTIVATIONS[activation],
            y.data_ptr(),
            saved.data_ptr() if save else 0,
            scratch.data_ptr(),
            scratch.numel(),
            threads,
        )
        return y, saved

    def input_gradient(self, dz: torch.Tensor) -> torch.Tensor:
        """dz times the matrix."""
        flat, threads = extension.tokens_of(dz), torch.get_num_threads()
        dx = dz.new_empty((*dz.shape[:-1], self.in_))
        scratch = extension.workspace(
            extension.native.cpu.masked_matmul_workspace_bytes(self.handle, flat.shape[0], True, threads)
        )
        extension.native.cpu.masked_matmul_input_gradient(
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
        left, right = extension.tokens_of(dz), extension.tokens_of(x)
        scratch = extension.workspace(
            extension.native.cpu.sampled_matmul_workspace_bytes(self.handle, left.shape[0], right.stride(0))
        )
        extension.native.cpu.sampled_matmul(
            self.dtype,
            self.handle,
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            right.stride(0),
            left.shape[0],
            raw.data_ptr(),
            extension.pointer(grad_gate),
            scratch.data_ptr(),
            scratch.numel(),
            torch.get_num_threads(),
        )
