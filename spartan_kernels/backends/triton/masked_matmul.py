"""Block-sparse products on Triton: launches and their sizes. Kernels are in masked_matmul_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from spartan_kernels.backends.triton import masked_matmul_kernels as kernels
from spartan_kernels.backends.triton.configs import CompileCase, name_of, power_of_two

_aten = torch.ops.aten
_WIDEST = 128  # of a tile of outputs, and of a block that one program sums
_LAYOUT_BLOCK = 256
_JOIN_BLOCK = 1024
_FEW_PROGRAMS = 256  # under which a sum is split between programs
_MOST_PARTS = 16


def _precision(x: torch.Tensor) -> str:
    """How float32 is multiplied: PyTorch's switch for TF32."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return "widened"
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _on_tensor_cores(x: torch.Tensor, precision: str) -> bool:
    return x.dtype != torch.float32 or precision == "tf32"


def product_tile(tokens: int, span: int, tensor_cores: bool, width: int) -> dict[str, int]:
    """The tile of a product and its launch, for numbers of `width` bytes.

    Tokens are on the side of 64 and more rows, so that small blocks use the tensor cores fully. Without tensor cores
    (float32 in full precision) operands are held in registers as well, and tiles are smaller.
    """
    most = 128 if tensor_cores else 64
    block_m = min(most, max(16, power_of_two(tokens)))
    block_n = min(most, max(16, power_of_two(span)))
    outputs = block_m * block_n
    block_k = (64 if outputs > 8192 or block_m < block_n else 128) // width if tensor_cores else 16
    warps = 8 if outputs >= (8192 if tensor_cores else 4096) else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 3}


@dataclass(frozen=True)
class Traffic:
    """What a product asks for: floating-point operations, bytes into the multiprocessors and bytes written."""

    flops: int
    x_bytes: int
    weight_bytes: int
    y_bytes: int


def product_traffic(
    tokens: int, extent: int, block: tuple[int, int], active: int, tile: dict[str, int], width: int
) -> Traffic:
    """Traffic of a product with `active` blocks of (outputs, columns) under a tile, for numbers of `width` bytes.

    A tile of outputs reads the active columns of its tokens: each element of x that comes from the L2 cache serves
    min(outputs of a block, BLOCK_N) outputs, and each weight BLOCK_M tokens. That bounds a product with small blocks.
    """
    span, columns = block
    pieces, tiles = triton.cdiv(span, tile["BLOCK_N"]), triton.cdiv(tokens, tile["BLOCK_M"])
    return Traffic(
        flops=2 * tokens * active * span * columns,
        x_bytes=tokens * active * columns * pieces * width,
        weight_bytes=tiles * active * span * columns * width,
        y_bytes=tokens * extent * width,
    )


def sampled_tile(rows: int, columns: int, tensor_cores: bool, width: int) -> dict[str, int]:
    """The tile of a sampled product: a whole block, and the tokens of a step."""
    block_r, block_c = max(16, power_of_two(rows)), max(16, power_of_two(columns))
    block_t = 128 // width if tensor_cores else 16
    warps = 4 if block_r * block_c <= 8192 // width else 8
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_T": block_t, "num_warps": warps, "num_stages": 3}


def block_layout(gate: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks; two launches."""
    grid_rows, grid_columns = gate.shape
    gate = (gate.view(torch.uint8) if gate.dtype == torch.bool else gate).contiguous()
    counts, row_offsets, column_offsets = (
        torch.zeros(n, dtype=torch.int32, device=gate.device)
        for n in (grid_rows + grid_columns, grid_rows + 1, grid_columns + 1)
    )
    column_indices, row_indices = (torch.zeros(gate.numel(), dtype=torch.int32, device=gate.device) for _ in range(2))
    grid = (grid_rows + grid_columns,)
    given = gate if mask is None else mask.contiguous().view(torch.uint8)
    rest: Any = {"HAS_MASK": mask is not None, "BLOCK": _LAYOUT_BLOCK, "num_warps": 4}
    if gate.numel():
        kernels._layout_count_kernel[grid](gate, given, counts, grid_rows, grid_columns, **rest)
        kernels._layout_fill_kernel[grid](
            gate,
            given,
            counts,
            row_offsets,
            column_indices,
            column_offsets,
            row_indices,
            grid_rows,
            grid_columns,
            **rest,
        )
    return row_offsets, column_indices, column_offsets, row_indices


class _Operand:
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
        self.gate = None if gate is None else gate.to(torch.float32).contiguous()

    def product(
        self, x: torch.Tensor, forward: bool, bias: torch.Tensor | None = None, activation: str = "", save: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(x w^T + b) by rows of blocks, or x w by columns of blocks, and the sums before the activation."""
        flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        extent, other_extent = self.shape if forward else self.shape[::-1]
        span, other = self.block if forward else self.block[::-1]
        y = x.new_empty((*x.shape[:-1], extent))
        saved = torch.empty_like(y) if save else x.new_empty(0)
        if y.numel() == 0:
            return y, saved
        offsets, indices = self.layout[:2] if forward else self.layout[2:]
        row = self.block[1] if self.positions is not None else self.data.stride(0)
        grid_columns = triton.cdiv(self.shape[1], self.block[1])
        strides = (row, 1, grid_columns, 1) if forward else (1, row, 1, grid_columns)
        lines = triton.cdiv(extent, span)
        precision = _precision(x)
        tile = product_tile(flat.shape[0], span, _on_tensor_cores(x, precision), x.element_size())
        tiles = triton.cdiv(flat.shape[0], tile["BLOCK_M"]) * lines * triton.cdiv(span, tile["BLOCK_N"])
        most = max(1, triton.cdiv(other_extent, tile["BLOCK_K"]))
        split = min(_MOST_PARTS, most, triton.cdiv(_FEW_PROGRAMS, tiles)) if tiles < _FEW_PROGRAMS else 1
        out = y if split == 1 else x.new_empty((split, y.numel()), dtype=torch.float32)
        flags: Any = {"HAS_BIAS": bias is not None, "ACTIVATION": activation, "SAVE": save, "SPLIT": split}
        with torch.cuda.device_of(x):
            kernels._product_kernel[(tiles, split)](
                flat, self.data, _or(self.gate, flat), _or(bias, flat), out, saved if save else out, offsets, indices,
                _or(self.positions, indices), flat.shape[0], lines, extent, other_extent, flat.stride(0), *strides,
                SPAN=span, OTHER=other, PACKED=self.positions is not None,
                HAS_POSITIONS=self.positions is not None and not forward, HAS_GATE=self.gate is not None,
                PRECISION=precision, **flags, **tile,
            )  # fmt: skip
            if split > 1:
                kernels._join_kernel[(triton.cdiv(y.numel(), _JOIN_BLOCK),)](
                    out, _or(bias, flat), y, saved if save else y, y.numel(), extent, **flags, BLOCK=_JOIN_BLOCK
                )
        return y, saved

    def sampled(
        self, dz: torch.Tensor, x: torch.Tensor, out: torch.Tensor, grad_gate: torch.Tensor | None
    ) -> torch.Tensor:
        """dz^T x on the active blocks of `out`, times the gate; `grad_gate`: its products with the data before that."""
        left, right = dz.reshape(dz.shape[:-1].numel(), dz.shape[-1]), x.reshape(x.shape[:-1].numel(), x.shape[-1])
        right = right if right.stride(-1) == 1 else right.contiguous()
        rows, columns = self.block
        grid_columns = triton.cdiv(self.shape[1], columns)
        programs = triton.cdiv(self.shape[0], rows) * grid_columns
        precision = _precision(x)
        if programs == 0 or left.shape[0] == 0:
            return out
        with torch.cuda.device_of(x):
            kernels._sampled_kernel[(programs,)](
                left, right, self.data, _or(self.gate, right), out, _or(grad_gate, right), *self.layout[:2],
                left.shape[0], *self.shape, grid_columns, left.stride(0), left.stride(1), right.stride(0),
                self.data.stride(0), 0 if self.positions is not None else out.stride(0),
                ROWS=rows, COLUMNS=columns, PACKED=self.positions is not None, HAS_GATE=self.gate is not None,
                GATE_GRAD=grad_gate is not None, PRECISION=precision,
                **sampled_tile(rows, columns, _on_tensor_cores(x, precision), x.element_size()),
            )  # fmt: skip
        return out


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow where there is no tensor."""
    return other if tensor is None else tensor


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
    shape = (weight.shape[0], weight.shape[1])
    return _Operand(weight, shape, (rows, columns), layout, gate, None).product(x, True, bias, activation, save)


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
    dz = _before_activation(grad, saved, activation)
    shape, block = (weight.shape[0], weight.shape[1]), (rows, columns)
    results = [x.new_empty(0) for _ in range(4)]
    if needs[0]:
        results[0] = _Operand(weight, shape, block, layout, gate, None).product(dz, False)[0]
    if needs[1] or needs[2]:
        grad_weight, grad_gate = _weight_gradient(dz, x, weight, gate, backward_layout, block)
        results[1] = grad_weight if needs[1] else results[1]
        results[2] = grad_gate.to(gate.dtype) if needs[2] else results[2]
    if needs[3]:
        results[3] = dz.reshape(dz.shape[:-1].numel(), shape[0]).sum(0)
    return results


def _weight_gradient(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    layout: list[torch.Tensor],
    block: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the layout's blocks one program each; on all of them, or on blocks too large for one, the dense product."""
    shape = (weight.shape[0], weight.shape[1])
    grad_gate = torch.zeros(gate.shape, dtype=torch.float32, device=x.device)
    if layout and max(block) <= _WIDEST:
        out = torch.zeros(shape, dtype=weight.dtype, device=x.device)
        return _Operand(weight, shape, block, layout, gate, None).sampled(dz, x, out, grad_gate), grad_gate
    raw = (dz.reshape(dz.shape[:-1].numel(), shape[0]).mT @ x.reshape(x.shape[:-1].numel(), shape[1])).contiguous()
    theta = weight if weight.stride(-1) == 1 else weight.contiguous()
    scale = gate.to(torch.float32).contiguous()
    if raw.numel():
        with torch.cuda.device_of(x):
            kernels._gate_gradient_kernel[(gate.numel(),)](
                raw, theta, scale, grad_gate, *shape, gate.shape[1], theta.stride(0), ROWS=block[0], COLUMNS=block[1],
                BLOCK_R=min(32, power_of_two(block[0])), BLOCK_C=min(64, power_of_two(block[1])), num_warps=4,
            )  # fmt: skip
    if layout:  # the active blocks of a dense result
        active = torch.zeros(gate.numel() + 1, dtype=torch.bool, device=x.device)
        order = torch.arange(gate.numel(), device=x.device)
        row = torch.searchsorted(layout[0][1:].contiguous(), order, right=True)
        place = torch.where(order < layout[0][-1], row * gate.shape[1] + layout[1][: gate.numel()], gate.numel())
        keep = active.index_fill(0, place, True)[:-1].view(gate.shape)
        grad_gate = torch.where(keep, grad_gate, 0.0)
        wide = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
        raw = torch.where(wide, raw, 0.0)
    return raw, grad_gate


def sampled_matmul_forward(
    a: torch.Tensor, b: torch.Tensor, layout: list[torch.Tensor], rows: int, columns: int
) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    out = torch.zeros((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    operand = _Operand(out, (a.shape[0], b.shape[1]), (rows, columns), layout, None, None)
    return operand.sampled(a.mT, b, out, None)


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
    operand = _Operand(values, (out, x.shape[-1]), (values.shape[1], values.shape[2]), layout, None, positions)
    return operand.product(x, True, bias, activation, save)


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
    operand = _Operand(values, shape, block, layout, None, positions)
    results = [x.new_empty(0) for _ in range(3)]
    if needs[0]:
        results[0] = operand.product(dz, False)[0]
    if needs[1]:
        results[1] = operand.sampled(dz, x, torch.zeros_like(operand.data), None)
    if needs[2]:
        results[2] = dz.reshape(dz.shape[:-1].numel(), shape[0]).sum(0)
    return results


# sizes and strides of layers as they are
_MULTIPLES = (
    "extent", "other_extent", "stride_x", "stride_wn", "rows_extent", "columns_extent", "stride_dz", "stride_theta",
    "stride_out",
)  # fmt: skip


def _compile_cases() -> list[CompileCase]:
    cases = []
    counts = {"tokens": "i32", "extent": "i32", "other_extent": "i32", "lines": "i32"}
    sizes = {"rows_extent": "i32", "columns_extent": "i32", "grid_columns": "i32", "grid_rows": "i32"}
    types = {"gate": "*fp32", "grad_gate": "*fp32", "offsets": "*i32", "indices": "*i32", "positions": "*i32"}
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        value, cores = f"*{name_of(dtype)}", dtype != torch.float32 or precision == "tf32"
        name = precision if precision == "tf32" else name_of(dtype)
        for side in (16, 32, 64, 128):
            flags: dict[str, Any] = {"PACKED": False, "HAS_GATE": True, "PRECISION": precision}
            product = {
                "SPAN": side, "OTHER": side, "HAS_POSITIONS": False, "HAS_BIAS": True, "ACTIVATION": "relu",
                "SAVE": False, "SPLIT": 1, "stride_wk": 1, "stride_gate_other": 1,
            }  # fmt: skip
            for tokens in (8, 8192):
                tile = product_tile(tokens, side, cores, dtype.itemsize)
                label = f"block {side}, {tokens} tokens, {name}"
                cases.append(
                    _case(kernels._product_kernel, flags | product, tile, types, value, counts | sizes, label, cores)
                )
            sampled = {"ROWS": side, "COLUMNS": side, "GATE_GRAD": True, "stride_dz_row": 1}
            tile = sampled_tile(side, side, cores, dtype.itemsize)
            label = f"block {side}, {name}"
            cases.append(
                _case(kernels._sampled_kernel, flags | sampled, tile, types, value, counts | sizes, label, cores)
            )
    return cases


def _case(
    kernel: Any,
    constants: dict[str, Any],
    tile: dict[str, int],
    types: dict[str, str],
    value: str,
    sizes: dict[str, str],
    label: str,
    cores: bool,
) -> CompileCase:
    constants = constants | {key: size for key, size in tile.items() if key.startswith("BLOCK")}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {n: types.get(n[:-4], value) if n.endswith("_ptr") else sizes.get(n, "i32") for n in names}
    return CompileCase(kernel, signature, constants, tile["num_warps"], label, tile["num_stages"], cores, _MULTIPLES)


COMPILE_CASES = _compile_cases()
