"""Products with block-sparse matrices on the extension's CUDA kernels: tensors to pointers, sizes and the stream.

Nothing waits for the GPU. float32 is multiplied in float32 or in TF32, as PyTorch's switch says; the gradient of a
weight with every block active is PyTorch's own dense product.
"""

from __future__ import annotations

import torch

from spartan_kernels import precision
from spartan_kernels.backends import native, native_cuda

_TF32 = 4  # ops.h, Dtype
_ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # ops.h, Activation
_aten = torch.ops.aten


def block_layout(gate: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks; two launches."""
    gate = gate.detach().contiguous()
    mask = None if mask is None else mask.contiguous()
    grid_rows, grid_columns = gate.shape
    lines = grid_rows + grid_columns
    sizes = (lines, grid_rows + 1, gate.numel(), grid_columns + 1, gate.numel(), lines)
    make = torch.empty if gate.numel() else torch.zeros  # of a gate without entries not every line writes
    counts, *parts = (make(size, dtype=torch.int32, device=gate.device) for size in sizes)
    native_cuda.call(
        native_cuda._native.cuda.block_layout,
        gate,
        gate.data_ptr(),
        gate.element_size(),
        native.pointer(mask),
        grid_rows,
        grid_columns,
        counts.data_ptr(),
        *(part.data_ptr() for part in parts),
    )
    return tuple(parts)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """x as [tokens, features] whose features lie side by side."""
    flat = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
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
        self.layout = [part.contiguous() for part in layout]
        self.positions = None if positions is None else positions.contiguous()
        stride = 0 if positions is not None else self.data.stride(0)
        offsets = [part.data_ptr() for part in self.layout] if layout else [0] * 5
        packed = (0, 0) if self.positions is None else (self.positions.data_ptr(), self.data.shape[0])
        self.handle = native_cuda._native.cpu.BlockMatrix(
            self.data.data_ptr(), *shape, *block, stride, native.pointer(self.gate), *offsets, *packed
        )
        self.dtype = native_cuda.DTYPES[data.dtype]
        self.multiplied = _TF32 if data.dtype == torch.float32 and precision.tf32() else self.dtype
        self.out, self.in_ = shape

    def _workspace(self, tokens: int) -> torch.Tensor:
        size = native_cuda._native.cuda.masked_matmul_workspace_bytes(self.multiplied, self.handle, tokens)
        return torch.empty(size, dtype=torch.uint8, device=self.data.device)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str, save: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = _tokens(x)
        y = x.new_empty((*x.shape[:-1], self.out))
        saved = torch.empty_like(y) if save else x.new_empty(0)
        b = None if bias is None else bias.detach().contiguous()
        scratch = self._workspace(flat.shape[0])
        native_cuda.call(
            native_cuda._native.cuda.masked_matmul,
            x,
            self.multiplied,
            self.handle,
            flat.data_ptr(),
            flat.shape[0],
            flat.stride(0),
            native.pointer(b),
            _ACTIVATIONS[activation],
            y.data_ptr(),
            saved.data_ptr() if save else 0,
            scratch.data_ptr(),
        )
        return y, saved

    def input_gradient(self, dz: torch.Tensor) -> torch.Tensor:
        flat = _tokens(dz)
        dx = dz.new_empty((*dz.shape[:-1], self.in_))
        scratch = self._workspace(flat.shape[0])
        native_cuda.call(
            native_cuda._native.cuda.masked_matmul_input_gradient,
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
        left, right = _tokens(dz), _tokens(x)
        native_cuda.call(
            native_cuda._native.cuda.sampled_matmul,
            x,
            self.multiplied,
            self.handle,
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            right.stride(0),
            left.shape[0],
            result.data_ptr(),
            native.pointer(grad_gate),
        )

    def gate_gradient(self, raw: torch.Tensor, grad_gate: torch.Tensor) -> None:
        """The same from a dense raw = dz^T x, which is multiplied by the gates in place."""
        native_cuda.call(
            native_cuda._native.cuda.gate_gradient,
            raw,
            self.dtype,
            self.handle,
            raw.data_ptr(),
            grad_gate.data_ptr(),
        )


def _before_activation(grad: torch.Tensor, saved: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return _aten.threshold_backward(grad, saved, 0)
    if activation == "silu":
        return _aten.silu_backward(grad, saved)
    if activation:
        return _aten.gelu_backward(grad, saved, approximate="tanh" if activation == "gelu_tanh" else "none")
    return grad


def masked_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    layout: list[torch.Tensor],
    bias: torch.Tensor | None,
    activation: str,
    rows: int,
    columns: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(z), z = x (theta * gate on the layout's blocks)^T + b, and z when it is to be saved."""
    matrix = _Matrix(weight, (weight.shape[0], weight.shape[1]), (rows, columns), layout, gate)
    return matrix.forward(x, bias, activation, save)


def masked_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    layout: list[torch.Tensor],
    backward_layout: list[torch.Tensor],
    saved: torch.Tensor,
    activation: str,
    rows: int,
    columns: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed."""
    shape, block = (weight.shape[0], weight.shape[1]), (rows, columns)
    dz = _before_activation(grad, saved, activation)
    results = [x.new_empty(0)] * 4
    if needs[0]:
        results[0] = _Matrix(weight, shape, block, layout, gate).input_gradient(dz)
    if needs[1] or needs[2]:
        matrix = _Matrix(weight, shape, block, backward_layout, gate)
        grad_gate = torch.zeros(gate.shape, dtype=torch.float32, device=gate.device)
        if backward_layout:
            result = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            matrix.sampled(dz, x, result, grad_gate)
        else:
            result = (_tokens(dz).mT @ _tokens(x)).contiguous()
            matrix.gate_gradient(result, grad_gate)
        results[1] = result if needs[1] else results[1]
        results[2] = grad_gate.to(gate.dtype) if needs[2] else results[2]
    if needs[3]:
        results[3] = dz.reshape(dz.shape[:-1].numel(), shape[0]).sum(0)
    return results


def sampled_matmul_forward(
    a: torch.Tensor, b: torch.Tensor, layout: list[torch.Tensor], rows: int, columns: int
) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    result = torch.zeros((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    _Matrix(result, (a.shape[0], b.shape[1]), (rows, columns), layout).sampled(a.mT, b, result, None)
    return result


def block_sparse_linear_forward(
    x: torch.Tensor,
    values: torch.Tensor,
    layout: list[torch.Tensor],
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(z), z = x w^T + b with w given by its blocks, and z when it is to be saved."""
    block = (values.shape[1], values.shape[2])
    return _Matrix(values, (out, x.shape[-1]), block, layout, positions=positions).forward(x, bias, activation, save)


def block_sparse_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    layout: list[torch.Tensor],
    positions: torch.Tensor,
    saved: torch.Tensor,
    activation: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, values and bias; empty where not needed."""
    shape, block = (grad.shape[-1], x.shape[-1]), (values.shape[1], values.shape[2])
    dz = _before_activation(grad, saved, activation)
    matrix = _Matrix(values, shape, block, layout, positions=positions)
    results = [x.new_empty(0)] * 3
    if needs[0]:
        results[0] = matrix.input_gradient(dz)
    if needs[1]:
        results[1] = torch.zeros_like(matrix.data)
        matrix.sampled(dz, x, results[1], None)
    if needs[2]:
        results[2] = dz.reshape(dz.shape[:-1].numel(), shape[0]).sum(0)
    return results
