"""What a masked module has besides its weight: the masks, and the masked weight that they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spartan.distributed import placed_as
from spartan.functional import masked_weight
from spartan.nn.stacks import Stack
from spartan_kernels import block_costs, block_grid
from spartan_kernels.solution import is_solution, soft_values

__all__ = ["MaskCarrier"]


_COMPUTED_WITH = ("mask_soft_values", "mask_scale_value")  # in the weight's dtype
_COUNTED_WITH = ("mask_beta", "mask_costs", "mask_sizes")
_KEEPS_ALL = (0.0, 1e4)  # the solution of m = 1; finite, as differences of infinities are NaN


class MaskCarrier(nn.Module):
    """The masks of one weight, as buffers that are updated in place and never saved with the model.

    There are as many buffers at any time: copies such as `torch.optim.swa_utils.AveragedModel` keep theirs like the
    model's, one after the other. Once a soft mask is merged its buffer is a single one, and `mask_soft` None.

    Where each weight is a block, `mask_soft` may be the solution (c, d) of m = sigmoid(beta (|theta| / a - c) + d): m
    is then computed wherever it is needed, of the weights that it was just solved for, and takes no memory.

    Attributes:
        mask_hard: h, one per block, bool. mask_beta: float64 0-dim, the sharpness that m was solved
        with, scaled for the block size. mask_costs: a, 0-dim or one per block. mask_sizes: number of weights, likewise,
        which are the costs unless a cost model gives others. mask_backward: bool, one per block, the only blocks whose
        weight needs a gradient where those are not the kept ones; None if there is no such set.
        mask_block_size: (rows, columns).
        mask_shape: of the weight that the module computes with, of which masks are: on this rank, where it is divided.
        mask_dtype: of what the module computes with; it follows conversions of the model, such as `model.bfloat16()`.
        mask_divided: whether it is, by tensor parallelism.
        mask_straight_through: whether gradients reach dropped blocks.
        mask_multiplies_blocks: whether the module can multiply by kept blocks alone.
        mask_expected: the part of all blocks of its budget that is kept, None before that is known: a GPU is not asked
        how many blocks of its own are.
        mask_stack: how the masks see the weight where it is several matrices; None for one.
    """

    mask_multiplies_blocks = False
    mask_stack: Stack | None = None

    mask_soft_values: torch.Tensor | None
    mask_scale_value: torch.Tensor | None
    mask_hard: torch.Tensor
    mask_beta: torch.Tensor
    mask_costs: torch.Tensor
    mask_sizes: torch.Tensor
    mask_backward: torch.Tensor | None
    mask_merged: bool
    mask_block_size: tuple[int, int]
    mask_shape: torch.Size
    mask_dtype: torch.dtype
    mask_divided: bool
    mask_straight_through: bool
    mask_expected: float | None

    def attach_masks(
        self,
        weight: torch.Tensor,
        block_size: tuple[int, int],
        soft: bool,
        preserve_scale: bool = False,
        straight_through: bool = False,
    ) -> None:
        """Add masks that keep every block of `weight`; without `soft`, only a hard mask.

        That blocks gradients unless `straight_through`.
        """
        grid = block_grid(weight.shape, block_size)
        costs = block_costs(weight.shape, block_size, weight.device)
        # Never in half precision, which has no 17 x 17.
        wide = torch.promote_types(weight.dtype, torch.float32) if isinstance(costs, torch.Tensor) else torch.float64
        costs = torch.as_tensor(costs, dtype=wide, device=weight.device)
        buffers: dict[str, torch.Tensor | None] = {
            "mask_soft_values": weight.new_ones(grid) if soft else None,
            "mask_hard": torch.ones(grid, dtype=torch.bool, device=weight.device),
            "mask_beta": torch.zeros((), dtype=torch.float64, device=weight.device),
            "mask_costs": costs,
            "mask_sizes": costs,
            "mask_scale_value": weight.new_ones(self.mask_scale_shape) if preserve_scale else None,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer if buffer is None else buffer.detach(), persistent=False)
        self.mask_backward = None
        self.mask_merged = False
        self.mask_block_size = block_size
        self.mask_shape = weight.shape
        self.mask_dtype = weight.dtype
        self.mask_divided = False
        self.mask_straight_through = soft or straight_through
        self.mask_expected = None

    def detach_masks(self) -> None:
        """Remove everything `attach_masks` added."""
        for name in ("mask_soft_values", "mask_hard", "mask_beta", "mask_costs", "mask_sizes", "mask_scale_value"):
            delattr(self, name)
        del (
            self.mask_backward,
            self.mask_merged,
            self.mask_block_size,
            self.mask_shape,
            self.mask_dtype,
            self.mask_divided,
            self.mask_straight_through,
            self.mask_expected,
        )

    def take_masks(self, other: MaskCarrier) -> None:
        """Have copies of the masks of `other`, the carrier of the same weight in another copy of the model."""
        device = self.mask_hard.device
        for name, buffer in other._buffers.items():
            if name.startswith("mask_"):
                wide = name not in _COMPUTED_WITH or is_solution(buffer, self.mask_hard)
                dtype = None if wide else self.mask_dtype
                self._buffers[name] = None if buffer is None else buffer.detach().to(device, dtype, copy=True)
        backward = other.mask_backward
        self.mask_backward = None if backward is None else backward.detach().to(device, copy=True)
        self.mask_merged, self.mask_straight_through = other.mask_merged, other.mask_straight_through
        self.mask_expected = other.mask_expected
        self.masks_changed()

    @property
    def mask_soft(self) -> torch.Tensor | None:
        """m, one per block, or its solution; None once it is merged into the weight or if there is none."""
        return None if self.mask_merged else self.mask_soft_values

    @property
    def soft_is_solution(self) -> bool:
        """Whether the soft mask is computed from its solution."""
        return is_solution(self.mask_soft, self.mask_hard)

    def compute_soft(self, from_solution: bool) -> None:
        """Keep the solution of the soft mask, or its values, from now on; whatever it is, it keeps everything."""
        if from_solution:
            self.mask_soft_values = torch.tensor(_KEEPS_ALL, dtype=torch.float64, device=self.mask_hard.device)
        else:
            self.mask_soft_values = torch.ones_like(self.mask_hard, dtype=self.mask_dtype)

    def soft_of(self, values: torch.Tensor) -> torch.Tensor | None:
        """m, one per block, of a weight of these values; of a part of it, where m is computed."""
        soft = self.mask_soft
        if soft is None or not self.soft_is_solution:
            return soft
        return soft_values(values, soft, self.mask_beta, self.mask_costs)

    @property
    def mask_scale(self) -> torch.Tensor | None:
        """Factor of the masked weight: 0-dim, or [..., 1, 1] of each matrix of a stack; None for 1."""
        return None if self.mask_merged else self.mask_scale_value

    @property
    def mask_factor(self) -> torch.Tensor | None:
        """The same in a shape that broadcasts over the weight as the masks see it."""
        scale, stack = self.mask_scale, self.mask_stack
        return scale if scale is None or stack is None else stack.spread(scale)

    @property
    def mask_scale_shape(self) -> tuple[int, ...]:
        """Of `mask_scale`, where there is one."""
        return () if self.mask_stack is None else (*self.mask_stack.shape[:-2], 1, 1)

    def set_soft(self, soft: torch.Tensor | None, scale: torch.Tensor | None) -> None:
        """Replace m and the factor; None for both: they are merged into the weight."""
        self.mask_merged = soft is None and scale is None
        for name, value in (("mask_soft_values", soft), ("mask_scale_value", scale)):
            present = self._buffers[name]
            self._buffers[name] = present.new_ones(()) if value is None and present is not None else value

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.mask_backward is not None:  # not a buffer: there is none most of the time
            self.mask_backward = fn(self.mask_backward)
        solution = ("mask_soft_values",) if self.soft_is_solution else ()
        before = {name: self._buffers[name] for name in _COUNTED_WITH + solution}
        self.mask_dtype = fn(torch.empty((), dtype=self.mask_dtype, device=self.mask_hard.device)).dtype
        super()._apply(fn, recurse)
        for name, buffer in before.items():  # never narrower: half precision has no 17 x 17, nor a beta of 1e5
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device, torch.promote_types(now.dtype, buffer.dtype))
        return self

    @property
    def computes_backward_alone(self) -> bool:
        """Whether the gradient comes out of the backward pass as zero outside `mask_backward`."""
        return False

    def set_costs(self, costs: float | torch.Tensor) -> None:
        """Let each block cost `costs`, or its entry of it in the weight's dtype, instead of its number of weights."""
        dtype = costs.dtype if isinstance(costs, torch.Tensor) else torch.float64
        self.mask_costs = torch.as_tensor(costs, dtype=dtype, device=self.mask_hard.device)

    def masks_changed(self) -> None:
        """To be called after each change of the hard mask; what is derived from it follows."""

    def masked(self, weight: torch.Tensor) -> torch.Tensor:
        """theta * m * h (* scale), with the local part of the gradient of `spartan.masked_weight`."""
        if self.mask_divided:
            return placed_as(weight, self.masked_part(weight.to_local()))  # type: ignore[attr-defined]
        return self.masked_part(weight)

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight, or a part of it, as the masks see it: a view."""
        return weight if self.mask_stack is None else self.mask_stack.turned(weight)

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether the masks are of a weight of this shape."""
        stack = self.mask_stack
        return weight.shape == self.mask_shape if stack is None else tuple(weight.shape) == stack.shape

    def masked_part(self, values: torch.Tensor) -> torch.Tensor:
        """The same of this rank's values."""
        result = masked_weight(
            values,
            self.mask_soft,
            self.mask_hard,
            self.mask_block_size,
            beta=self.mask_beta,
            costs=self.mask_costs,
            straight_through=self.mask_straight_through,
        )
        factor = self.mask_factor
        return result if factor is None else result * factor

    def gate_and_slope(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """m (* scale), and its derivative by the weight: beta s / a for each sign(theta), s = m (1 - m)."""
        weight: Any = self.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = 1.0 if self.mask_scale is None else self.mask_scale.to(wide)
        if self.mask_soft is None:
            return torch.ones_like(self.mask_hard, dtype=wide) * scale, None
        soft = self.soft_of(weight).to(wide)  # type: ignore[union-attr]
        return soft * scale, (self.mask_beta * soft * (1 - soft) * scale / self.mask_costs).to(wide)
