"""A call of every operator on small inputs of awkward shapes: what the smoke test and the GPU tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spartan_kernels import dispatch, ops
from spartan_kernels.block_sparse import BlockSparseWeight
from spartan_kernels.block_sparse_filter import BlockSparseFilter
from spartan_kernels.layout import BlockLayout
from spartan_kernels.operands import (
    AddBlockSigns,
    KeptSoftMass,
    MaskedConvBackward,
    MaskedLinearBackward,
    MaskedWeightBackward,
    PackedConvBackward,
    PackedLinearBackward,
    SoftTopk,
    SoftTopkBackward,
    SoftTopkGlobal,
    SoftTopkGlobalBackward,
)
from spartan_kernels.ops.block_sparse import block_sparse_linear_backward
from spartan_kernels.ops.block_sparse_conv import block_sparse_conv2d_backward
from spartan_kernels.ops.masked_conv import masked_conv2d_backward
from spartan_kernels.ops.masked_matmul import masked_linear_backward
from spartan_kernels.ops.masked_weight import (
    add_block_signs_,
    kept_soft_mass,
    masked_weight_backward,
    masked_weight_backward_,
)
from spartan_kernels.ops.soft_topk import (
    soft_topk_backward,
    soft_topk_forward,
    soft_topk_global_backward,
    soft_topk_global_forward,
)
from spartan_kernels.precision import convolving_in_full

Inputs = dict[str, Any]
Call = Callable[[Inputs, str], Any]

_BLOCK = (16, 8)
# float32 against float64, relative to the largest entry; a wrong kernel misses by far more
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Probe:
    """One operator called on the shared inputs; nothing in `call` waits for the device, so a graph can hold it."""

    operator: str
    call: Call


def make_inputs(seed: int = 0) -> Inputs:
    """Small float64 inputs."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs = {
        "values": draw(5, 203),
        "costs": torch.randint(1, 5, (203,), generator=g).double(),
        "budget": torch.tensor([0.5, 20.0, 60.25, 101.0, 300.0], dtype=torch.float64),
        "beta": torch.tensor(7.0, dtype=torch.float64),
        "grad": draw(5, 203),
        "weight": draw(70, 45),
        "gate": draw(5, 6).abs().clamp(0.05, 0.95),
        "hard": draw(5, 6) > 0,
        "x": draw(33, 45),
        "bias": draw(70),
        "grad_y": draw(33, 70),
        "scale": torch.tensor(0.3, dtype=torch.float64),
        "solution": torch.tensor([0.6, -0.2], dtype=torch.float64),
        "image": draw(2, 20, 9, 7),
        "filter": draw(37, 20, 3, 2),
        "filter_gate": draw(3, 3, 3, 2).clamp(0.0),
        "grad_image": draw(2, 37, 5, 3),
    }
    return inputs | _pack(inputs)


def _pack(inputs: Inputs) -> Inputs:
    """The chosen blocks of both weights. Packing waits for the device: it counts them."""
    packed = BlockSparseWeight.from_dense(inputs["weight"], _BLOCK, inputs["hard"])
    return {
        "packed": packed,
        "packed_float8": packed.to_float8(),
        "packed_filter": BlockSparseFilter.from_dense(inputs["filter"], _BLOCK, inputs["filter_gate"] != 0),
    }


def probes() -> list[Probe]:
    """Every operator of the package, once."""

    def soft_backward(i: Inputs, b: str) -> Any:
        _, threshold = soft_topk_forward(SoftTopk(i["values"], i["budget"], i["costs"], i["beta"], b))
        o = SoftTopkBackward(i["grad"], i["values"], threshold, i["costs"], i["beta"], True, b)
        return soft_topk_backward(o)

    def global_backward(i: Inputs, b: str) -> Any:
        parts, g = list(i["values"].split([2, 3])), list(i["grad"].split([2, 3]))
        _, threshold = soft_topk_global_forward(SoftTopkGlobal(parts, i["budget"][4], [], i["beta"], "", b))
        return soft_topk_global_backward(SoftTopkGlobalBackward(g, parts, threshold, [], i["beta"], False, "", b))

    def solve(i: Inputs, b: str) -> Any:
        parts = list(i["values"].split([1, 4]))
        soft, hard = [torch.empty_like(p) for p in parts], [torch.empty_like(p, dtype=torch.bool) for p in parts]
        state = ops.new_solver_state(parts[0].device)
        ops.solve_masks_(parts, i["budget"][4], None, i["beta"], soft, hard, state, absolute=True, backend=b)
        return [*soft, *hard]

    def correct(i: Inputs, b: str) -> Any:
        grad = i["weight"] * 2
        ops.masked_weight_correct_(grad, i["weight"], i["gate"], i["scale"], (16, 8), backend=b)
        return grad

    def signs(i: Inputs, b: str) -> Any:
        grad = i["weight"] * 2
        add_block_signs_(AddBlockSigns(grad, i["weight"], i["gate"], block[0], block[1], b))
        return grad

    def backward_in_place(i: Inputs, b: str) -> Any:
        grad = i["weight"] * 2
        operands = grad, i["weight"], i["gate"], i["hard"], i["beta"], i["scale"], *block, True
        masked_weight_backward_(MaskedWeightBackward(*operands, b))
        return grad

    def layout(i: Inputs, b: str) -> list[torch.Tensor]:
        return BlockLayout.from_gate(i["gate"], i["weight"].shape, block, i["hard"], backend=b).tensors()

    def linear_backward(i: Inputs, b: str) -> Any:
        index, needs = layout(i, b), [True] * 4
        operands = i["x"], i["weight"], i["gate"], index, index, i["grad_y"] * 2, "gelu", *block, needs, -1.0, i["gate"]
        return masked_linear_backward(MaskedLinearBackward(i["grad_y"], *operands, b))

    def packed_backward(i: Inputs, b: str) -> Any:
        p = i["packed"]
        operands = i["x"], p.values, p.layout.tensors(), p.positions, i["grad_y"] * 2, "gelu", [True] * 3
        return block_sparse_linear_backward(PackedLinearBackward(i["grad_y"], *operands, b))

    def convolution_backward(i: Inputs, b: str) -> Any:
        settings = [2, 2], [1, 0], [1, 1], 1, *block, [True] * 3 + [False]
        operands = i["image"], i["filter"], i["filter_gate"], i["filter_gate"] != 0, i["filter_gate"] != 0
        return masked_conv2d_backward(MaskedConvBackward._make((i["grad_image"], *operands, *settings, b)))

    def packed_convolution_backward(i: Inputs, b: str) -> Any:
        p = i["packed_filter"]
        operands = i["image"], p.values, p.matrix.layout.tensors(), p.matrix.positions
        settings = list(p.kernel_size), [2, 2], [1, 0], [1, 1], [True] * 3
        return block_sparse_conv2d_backward(PackedConvBackward._make((i["grad_image"], *operands, *settings, b)))

    block = _BLOCK
    calls: dict[str, Call] = {
        "soft_topk_forward": lambda i, b: ops.soft_topk(i["values"], i["budget"], i["costs"], i["beta"], backend=b),
        "soft_topk_backward": soft_backward,
        "soft_topk_global_forward": lambda i, b: ops.soft_topk_global(
            list(i["values"].split([2, 3])), i["budget"][4], None, i["beta"], backend=b
        ),
        "soft_topk_global_backward": global_backward,
        "solve_masks_": solve,
        "hard_topk_forward": lambda i, b: ops.hard_topk(i["values"], i["budget"], i["costs"], backend=b),
        "hard_topk_indices_forward": lambda i, b: ops.hard_topk(i["values"], 2, return_indices=True, backend=b),
        "hard_topk_global_forward": lambda i, b: ops.hard_topk_global(
            list(i["values"].split([2, 3])), i["budget"][4], backend=b
        ),
        "masked_weight_forward": lambda i, b: ops.masked_weight(i["weight"], i["gate"], i["hard"], block, backend=b),
        "masked_weight_backward": lambda i, b: masked_weight_backward(
            MaskedWeightBackward(
                i["weight"] * 2, i["weight"], i["gate"], i["hard"], i["beta"], i["scale"], *block, True, b
            )
        ),
        "masked_weight_coupling": lambda i, b: ops.masked_weight_coupling(
            i["weight"] * 2, i["weight"], i["gate"], block, beta=i["beta"], costs=128.0, backend=b
        ),
        "masked_weight_correct_": correct,
        "kept_soft_mass": lambda i, b: kept_soft_mass(
            KeptSoftMass(i["weight"], i["solution"], i["weight"] > 0.5, i["beta"], i["scale"], b)
        ),
        "add_block_signs_": signs,
        "masked_weight_backward_": backward_in_place,
        "block_scores": lambda i, b: ops.block_scores(i["weight"], block, backend=b),
        "masked_linear_forward": lambda i, b: ops.masked_linear(
            i["x"], i["weight"], i["gate"], block, i["bias"], "silu", i["hard"], backend=b
        ),
        "masked_linear_backward": linear_backward,
        "sampled_matmul_forward": lambda i, b: ops.sampled_matmul(i["grad_y"].mT, i["x"], i["hard"], block, backend=b),
        "block_sparse_linear_forward": lambda i, b: ops.block_sparse_linear(
            i["x"], i["packed"], i["bias"], "silu", backend=b
        ),
        "block_sparse_linear_backward": packed_backward,
        "block_sparse_linear_float8_forward": lambda i, b: ops.block_sparse_linear(
            i["x"].float(), i["packed_float8"], i["bias"].float(), "silu", backend=b
        ),
        "masked_conv2d_forward": lambda i, b: ops.masked_conv2d(
            i["image"], i["filter"], i["filter_gate"], block, None, 2, (1, 0), backend=b
        ),
        "masked_conv2d_backward": convolution_backward,
        "block_sparse_conv2d_forward": lambda i, b: ops.block_sparse_conv2d(
            i["image"], i["packed_filter"], None, 2, (1, 0), backend=b
        ),
        "block_sparse_conv2d_backward": packed_convolution_backward,
        "block_layout": layout,
    }
    return [
        Probe(operator, _in_full_precision(calls[operator]) if "conv2d" in operator else calls[operator])
        for operator in dispatch.SUPPORT
    ]


def _in_full_precision(convolve: Call) -> Call:
    """PyTorch convolves float32 in TF32 unless it is told not to, and that misses by more than a probe allows."""

    def call(i: Inputs, b: str) -> Any:
        with convolving_in_full():
            return convolve(i, b)

    return call


def _flat(result: Any) -> list[torch.Tensor]:
    return [t for part in result for t in _flat(part)] if isinstance(result, (list, tuple)) else [result]


def compare(result: Any, expected: Any) -> str | None:
    """Why `result` is not `expected` (from float64), or None."""
    pairs = list(zip(_flat(result), _flat(expected), strict=True))
    for index, (ours, exact) in enumerate(pairs):
        ours = ours.detach().cpu()
        if ours.shape != exact.shape:
            return f"output {index} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
        if exact.dtype == torch.bool:
            if not torch.equal(ours, exact):
                return f"output {index} differs in {int((ours != exact).sum())} entries"
            continue
        if exact.numel() == 0:
            continue
        error = (ours.double() - exact).abs().max().item()
        if not error <= _TOLERANCE * max(1.0, exact.abs().max().item()):
            return f"output {index} is off by {error:.2e}"
    return None


def inputs_on(inputs: Inputs, device: str) -> Inputs:
    """The inputs on a device, what has a dtype of its own in float32."""
    scalars = ("budget", "beta", "scale", "solution")
    moved = {
        name: t.to(device) if t.dtype == torch.bool or name in scalars else t.to(device, torch.float32)
        for name, t in inputs.items()
        if not name.startswith("packed")
    }
    return moved | _pack(moved)
