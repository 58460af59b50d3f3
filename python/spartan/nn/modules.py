"""Modules whose weight is masked: the class of a Linear or Conv2d is swapped in place, others read a masked one."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from spartan.distributed import Seen, local, own_class, set_own_class
from spartan.functional import masked_conv2d, masked_linear
from spartan.functional.masked_conv import gate_of_weight
from spartan.nn.kinds import is_transformers_linear
from spartan.nn.linear import linear_with_masked_weight
from spartan.nn.mask_carrier import MaskCarrier
from spartan.nn.masked_attribute import mask_attribute, masked_class, plain_class, unmask_attribute
from spartan.nn.stacks import Stack
from spartan_kernels import BlockLayout, dispatch, expand_blocks
from spartan_kernels.break_even import dense_convolution_on_gpu, dense_convolution_wins
from spartan_kernels.layout import INDEX
from spartan_kernels.torch_private import transforms_active

__all__ = [
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedWeight",
    "largest_block",
    "mask_weight",
    "swappable",
    "unmask_weight",
]


class _MaskedProduct(MaskCarrier):
    """A linear layer that multiplies by its masked weight: by its kept blocks alone where it is masked by blocks.

    Attributes:
        mask_by_inputs: whether the weight, and masks with it, are stored as [in, out].
    """

    weight: torch.Tensor
    bias: nn.Parameter
    mask_by_inputs = False
    mask_multiplies_blocks = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + b with w = theta * m * h; where weights are masked by blocks, only kept blocks are multiplied."""
        if self.mask_divided or self.mask_block_size == (1, 1):
            return self._multiplied_by_all(input)
        gate, slope = self.gate_and_slope()
        layout = self._layout()
        backward = self.mask_backward
        return masked_linear(
            input,
            self._by_outputs(self.weight),
            self._by_outputs(gate),
            layout.block_size,
            self.bias,
            backward_mask=None if backward is None else self._by_outputs(backward),
            layout=layout,
            backward_layout=layout if backward is None and not self.mask_straight_through else None,
            slope=None if slope is None else self._by_outputs(slope),
        )

    def _multiplied_by_all(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self._by_outputs(self.masked(self.weight)), self.bias)

    @property
    def computes_backward_alone(self) -> bool:
        """Where weights are masked by blocks."""
        return self.mask_block_size != (1, 1) and not self.mask_divided

    def attach_masks(
        self,
        weight: torch.Tensor,
        block_size: tuple[int, int],
        soft: bool,
        preserve_scale: bool = False,
        straight_through: bool = False,
    ) -> None:
        """Also add the index of the kept blocks, where there are blocks."""
        super().attach_masks(weight, block_size, soft, preserve_scale, straight_through)
        if block_size != (1, 1):
            for name, index in zip(INDEX, self._index(), strict=True):
                self.register_buffer(f"mask_{name}", index, persistent=False)

    def detach_masks(self) -> None:
        """Remove everything `attach_masks` added."""
        if self.mask_block_size != (1, 1):
            for name in INDEX:
                delattr(self, f"mask_{name}")
        super().detach_masks()

    def masks_changed(self) -> None:
        """Index the kept blocks again."""
        if self.mask_block_size != (1, 1):
            for buffer, index in zip(self._layout().tensors(), self._index(), strict=True):
                buffer.copy_(index)

    def _by_outputs(self, values: torch.Tensor) -> torch.Tensor:
        """[out, in] of what is stored like the weight."""
        return values.mT if self.mask_by_inputs else values

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape and block as [out, in]."""
        turn = -1 if self.mask_by_inputs else 1
        (out, in_), (rows, columns) = self.mask_shape[::turn], self.mask_block_size[::turn]
        return (out, in_), (rows, columns)

    def _index(self) -> list[torch.Tensor]:
        return BlockLayout.from_gate(self._by_outputs(self.mask_hard), *self._sizes()).tensors()

    def _layout(self) -> BlockLayout:
        a, b, c, d, e = (self.get_buffer(f"mask_{name}") for name in INDEX)
        known = not (a.is_cpu or torch.compiler.is_compiling())  # a graph would be traced again for each number
        return BlockLayout(*self._sizes(), a, b, c, d, e, self.mask_expected if known else None)


class MaskedLinear(_MaskedProduct, nn.Linear):
    """`nn.Linear` that multiplies by its masked weight; made from one in place by `Sparsifier`."""

    def _multiplied_by_all(self, input: torch.Tensor) -> torch.Tensor:
        if self.mask_divided:
            return super()._multiplied_by_all(input)
        return linear_with_masked_weight(
            input,
            self.weight,
            self.bias,
            self.mask_soft,
            self.mask_hard,
            self.mask_beta,
            self.mask_costs,
            self.mask_scale,
            self.mask_straight_through,
        )


class MaskedByInputs(_MaskedProduct):
    """What the `Conv1D` of Hugging Face's transformers becomes, y = x w + b with w of shape [in, out]: likewise."""

    mask_by_inputs = True


class MaskedConv2d(MaskCarrier, nn.Conv2d):
    """`nn.Conv2d` that convolves with its masked weight; made from one in place by `Sparsifier`.

    Attributes:
        mask_kept: fraction of blocks that the hard mask keeps; None until it is asked for.
        mask_dropped: bool, shape of the weight, True where the hard mask is not set; likewise.
    """

    mask_multiplies_blocks = True
    mask_kept: float | None = None
    mask_dropped: torch.Tensor | None = None

    def masks_changed(self) -> None:
        """Count the kept blocks again, and write the mask out, when that is next asked for."""
        self.mask_kept = self.mask_dropped = None

    def detach_masks(self) -> None:
        """Remove everything `attach_masks` and the forward passes added."""
        for name in ("mask_kept", "mask_dropped"):
            self.__dict__.pop(name, None)
        super().detach_masks()

    def masked(self, weight: torch.Tensor) -> torch.Tensor:
        """theta * m * h (* scale); a hard mask alone, which stays for many steps, is written out once on the CPU."""
        soft_or_dense = self.mask_straight_through or self.mask_soft is not None or self.mask_scale is not None
        if soft_or_dense or self.mask_divided or weight.device.type != "cpu" or torch.compiler.is_compiling():
            return super().masked(weight)
        if self.mask_dropped is None or self.mask_dropped.device != weight.device:
            self.mask_dropped = ~expand_blocks(self.mask_hard, weight.shape, self.mask_block_size)
        return weight.masked_fill(self.mask_dropped, 0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolution with w = theta * m * h; only kept blocks are multiplied where that is faster."""
        padding = self.padding
        plain = self.groups == 1 and self.padding_mode == "zeros"
        plain = plain and not self.mask_divided
        if self.mask_block_size == (1, 1) or not plain or isinstance(padding, str) or self._dense_wins(input):
            return self._conv_forward(input, self.masked(self.weight), self.bias)
        gate, slope = self.gate_and_slope()
        backward_mask = self.mask_backward
        if backward_mask is None and not self.mask_straight_through:
            backward_mask = self.mask_hard
        return masked_conv2d(
            input,
            self.weight,
            gate if slope is None else gate_of_weight(self.weight, gate, slope, self.mask_block_size),
            self.mask_block_size,
            self.bias,
            (self.stride[0], self.stride[1]),
            (padding[0], padding[1]),
            (self.dilation[0], self.dilation[1]),
            forward_mask=self.mask_hard,
            backward_mask=backward_mask,
        )

    def _dense_wins(self, input: torch.Tensor) -> bool:
        """Whether to form the masked weight: where there is only that, or it is faster and nothing is traced."""
        if input.device.type != "cpu":
            if input.device.type != "cuda" or dense_convolution_on_gpu(min(self.mask_block_size)):
                return True
            like = input.device.type, self.weight.dtype, dispatch.requested(None)
            return dispatch.select("masked_conv2d_forward", *like) == "reference"
        if torch.compiler.is_compiling() or transforms_active():
            return False
        if self.mask_kept is None:
            self.mask_kept = int(self.mask_hard.sum()) / max(1, self.mask_hard.numel())
        image = input if input.dim() == 4 else input[None]
        return dense_convolution_wins(image, self.weight, self.mask_kept, max(self.mask_block_size))


class MaskedWeight(MaskCarrier):
    """The masks of a parameter of any other module, whose attribute is theta * m * h."""

    def computes_with(self, weight: torch.Tensor) -> bool:
        """Whether a DTensor is what the module computes with, and not what FSDP stores of it."""
        return self.mask_divided and local(weight).shape == self.mask_shape

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """theta * m * h."""
        if self.mask_stack is None:
            return self.masked(weight)
        return self.mask_stack.back(self.masked(self.mask_stack.turned(weight)))


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
_SWAPS_BACK: dict[type[nn.Module], type[nn.Module]] = {masked: plain for plain, masked in _SWAPS.items()}


def swappable(module: nn.Module) -> bool:
    """Whether the weight of `module` is masked by a class of its own."""
    return _swap(module) is not None


def _swap(module: nn.Module) -> type[nn.Module] | None:
    kind = own_class(module)
    return masked_class(kind, MaskedByInputs, ()) if is_transformers_linear(module) else _SWAPS.get(kind)


def mask_weight(
    module: nn.Module,
    block_size: tuple[int, int],
    *,
    soft: bool,
    preserve_scale: bool = False,
    straight_through: bool = False,
    read_elsewhere: bool = False,
    parameter: str = "weight",
    seen: Seen | None = None,
    stack: Stack | None = None,
) -> MaskCarrier:
    """Give a parameter of `module` masks that keep everything, and return what carries them.

    The weight of an exact `nn.Linear`, `nn.Conv2d` or transformers' `Conv1D` changes the module's class in place. Any
    other, and these where something else reads `.weight` itself (`read_elsewhere`), gets an attribute that is masked.
    Names and identity of parameters stay. `seen` is what the module computes with, where that is not the parameter as
    it is; `stack` how masks see it where it is several matrices.
    """
    seen = seen or Seen.of(getattr(module, parameter))
    settings = block_size, soft, preserve_scale, straight_through
    swap = None if read_elsewhere else _swap(module)
    if swap is not None:
        set_own_class(module, swap)
        assert isinstance(module, MaskCarrier)
        module.attach_masks(seen.like, *settings)
        module.mask_divided = seen.mesh is not None
        return module
    carrier = MaskedWeight()
    carrier.mask_stack = stack
    carrier.attach_masks(seen.like, *settings)
    carrier.mask_divided = seen.mesh is not None
    mask_attribute(module, parameter, carrier)
    return carrier


def unmask_weight(module: nn.Module, carrier: MaskCarrier, parameter: str = "weight") -> None:
    """Undo `mask_weight` or `mask_attribute`; the parameter keeps its present value."""
    if carrier is module:
        carrier.detach_masks()
        kind = own_class(module)
        set_own_class(module, _SWAPS_BACK.get(kind) or plain_class(kind))
        return
    unmask_attribute(module, parameter)


def largest_block(shape: torch.Size, block_size: tuple[int, int]) -> int:
    """Number of weights in the largest block of a weight of this shape."""
    if block_size == (1, 1):
        return 1
    return math.prod(min(side, size) for side, size in zip(block_size, shape[:2], strict=True))
