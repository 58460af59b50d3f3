"""A block-sparse matrix as the CUDA kernels take it, and its products.

Nothing waits for the GPU. float32 is multiplied in float32 or in TF32, as PyTorch's switch says.
"""

from __future__ import annotations

import torch

from spartan_kernels import precision
from spartan_kernels.backends import extension

__all__ = ["BlockMatrix"]


class BlockMatrix(extension.BlockMatrix):
    """A block-sparse matrix, and its products."""

    @property
    def multiplied(self) -> int:
        """The dtype in which the tensor cores multiply."""
        return extension.TF32 if self.data.dtype == torch.float32 and precision.tf32() else self.dtype

    def _workspace(self, tokens: int) -> torch.Tensor:
        size = extension.native.cuda.masked_matmul_workspace_bytes(self.multiplied, self.handle, tokens)
        return torch.empty(size, dtype=torch.uint8, device=self.data.device)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str, save: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(z), and z if it is to be saved."""
        flat = extension.tokens_of(x)
        y = x.new_empty((*x.shape[:-1], self.out))
        saved = torch.empty_like(y) if save else x.new_empty(0)
        b = None if bias is None else bias.detach().contiguous()
        scratch = self._workspace(flat.shape[0])
        extension.call(
            extension.native.cuda.masked_matmul,
            x,
            self.multiplied,
            self.handle,
            flat.data_ptr(),
            flat.shape[0],
            flat.stride(0),
            extension.pointer(b),
            extension.ACTIVATIONS[activation],
            y.data_ptr(),
            saved.data_ptr() if save else 0,
            scratch.data_ptr(),
        )
        return y, saved

    def input_gradient(self, dz: torch.Tensor) -> torch.Tensor:
        """dz times the matrix."""
        flat = extension.tokens_of(dz)
        dx = dz.new_empty((*dz.shape[:-1], self.in_))
        scratch = self._workspace(flat.shape[0])
        extension.call(
            extension.native.cuda.masked_matmul_input_gradient,
            dz,
            self.multiplied,
            self.handle,
            flat.data_ptr(),
            flat.shape[0],
            flat.stride(0),
            dx.data_ptr(),
            scratch.data_ptr(),
        )
        return dx

    def sampled(self, dz: torch.Tensor, x: torch.Tensor, result: torch.Tensor, grad_gate: torch.Tensor | None) -> None:
        """The layout's blocks of dz^T x, times their gate; grad_gate: their products with the data before that."""
        left, right = extension.tokens_of(dz), extension.tokens_of(x)
        extension.call(
            extension.native.cuda.sampled_matmul,
            x,
            self.multiplied,
            self.handle,
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            right.stride(0),
            left.shape[0],
            result.data_ptr(),
            extension.pointer(grad_gate),
        )

    def gate_gradient(self, raw: torch.Tensor, grad_gate: torch.Tensor) -> None:
        """The same from a dense raw = dz^T x, which is multiplied by the gates in place."""
        extension.call(
            extension.native.cuda.gate_gradient,
            raw,
            self.dtype,
            self.handle,
            raw.data_ptr(),
            grad_gate.data_ptr(),
        )
