"""Products with block-sparse matrices on the compiled extension: tensors to pointers, sizes and strides."""

from __future__ import annotations

import torch

from spartan_kernels.backends import native

_ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_aten = torch.ops.aten


def block_layout(gate: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks."""
    gate = gate.detach().contiguous()
    mask = None if mask is None else mask.contiguous()
    grid_rows, grid_columns = gate.shape
    lines = grid_rows + grid_columns
    sizes = (lines + 2, grid_rows + 1, gate.numel(), grid_columns + 1, gate.numel(), lines)
    # tensors of their own, not parts of one: what an operator returns may share no memory
    counts, *parts = (torch.empty(size, dtype=torch.int32) for size in sizes)
    native._native.cpu.block_layout(
        gate.data_ptr(),
        gate.element_size(),
        0 if mask is None else mask.data_ptr(),
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
        if positions is not None and positions.numel() == 0:
            positions = positions.new_zeros(1)  # a null pointer would say that the matrix is not packed
        self.layout, self.positions = [part.contiguous() for part in layout[:4]], positions  # the order is for GPUs
        stride = 0 if positions is not None else self.data.stride(0)
        offsets = [part.data_ptr() for part in self.layout] if layout else [0] * 4
        self.handle = native._native.cpu.BlockMatrix(
            self.data.data_ptr(),
            *shape,
            *block,
            stride,
            native.pointer(self.gate),
            *offsets,
            0,
            native.pointer(positions),
            0 if positions is None else self.data.shape[0],
        )
        self.dtype = native.DTYPES[data.dtype]
        self.out, self.in_ = shape

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str, save: bool, y: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(z), written to `y` where that is given, and z if it is to be saved."""
        flat, threads = _tokens(x), torch.get_num_threads()
        y = x.new_empty((*x.shape[:-1], self.out)) if y is None else y
        saved = torch.empty_like(y) if save else x.new_empty(0)
        b = None if bias is None else bias.detach().contiguous()
        scratch = native.workspace(
            native._native.cpu.masked_matmul_workspace_bytes(self.handle, flat.shape[0], threads)
        )
        native._native.cpu.masked_matmul(
            self.dtype,
            self.handle,
            flat.data_ptr(),
            flat.shape[0],
            flat.stride(0),
            native.pointer(b),
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
        scratch = native.workspace(
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
        scratch = native.workspace(
            native._native.cpu.sampled_matmul_workspace_bytes(self.handle, left.shape[0], right.stride(0))
        )
        native._native.cpu.sampled_matmul(
            self.dtype,
            self.handle,
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            right.stride(0),
            left.shape[0],
            raw.data_ptr(),
            native.pointer(grad_gate),
            scratch.data_ptr(),
            scratch.numel(),
            torch.get_num_threads(),
        )


_GRADIENTS = {
    "": lambda grad, saved: grad,
    "relu": lambda grad, saved: _aten.threshold_backward(grad, saved, 0),
    "gelu": lambda grad, saved: _aten.gelu_backward(grad, saved),
    "gelu_tanh": lambda grad, saved: _aten.gelu_backward(grad, saved, approximate="tanh"),
    "silu": lambda grad, saved: _aten.silu_backward(grad, saved),
}


def _bias_gradient(dz: torch.Tensor) -> torch.Tensor:
    return dz.reshape(dz.shape[:-1].numel(), dz.shape[-1]).sum(0)


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
    dz = _GRADIENTS[activation](grad, saved)
    results = [x.new_empty(0) for _ in range(4)]
    if needs[0]:
        results[0] = _Matrix(weight, shape, block, layout, gate).input_gradient(dz)
    if needs[1] or needs[2]:
        raw = torch.empty(shape, dtype=torch.float32)
        grad_gate = torch.empty(gate.shape, dtype=torch.float32) if needs[2] else None
        _Matrix(weight, shape, block, backward_layout, gate).sampled(dz, x, raw, grad_gate)
        if needs[1]:
            results[1] = raw.to(weight.dtype)
        if grad_gate is not None:
            results[2] = grad_gate.to(gate.dtype)
    if needs[3]:
        results[3] = _bias_gradient(dz)
    return results


def sampled_matmul_forward(
    a: torch.Tensor, b: torch.Tensor, layout: list[torch.Tensor], rows: int, columns: int
) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    shape = (a.shape[0], b.shape[1])
    raw = torch.empty(shape, dtype=torch.float32)
    _Matrix(raw.to(a.dtype), shape, (rows, columns), layout).sampled(a.mT, b, raw, None)
    return raw.to(a.dtype)


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
    dz = _GRADIENTS[activation](grad, saved)
    matrix = _Matrix(values, shape, block, layout, positions=positions)
    results = [x.new_empty(0) for _ in range(3)]
    if needs[0]:
        results[0] = matrix.input_gradient(dz)
    if needs[1]:
        raw = torch.empty(values.shape, dtype=torch.float32)
        matrix.sampled(dz, x, raw, None)
        results[1] = raw.to(values.dtype)
    if needs[2]:
        results[2] = _bias_gradient(dz)
    return results
