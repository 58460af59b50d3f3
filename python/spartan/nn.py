"""Modules whose weight is masked: the class of a Linear or Conv2d is swapped in place, others read a masked one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spartan.distributed import Seen, local, own_class, set_own_class
from spartan.functional import block_sparse_linear, masked_conv2d, masked_linear
from spartan.functional.masked_conv import gate_of_weight
from spartan.kinds import is_transformers_linear
from spartan.linear import linear_with_masked_weight
from spartan.mask_carrier import MaskCarrier
from spartan.masked_attribute import mask_attribute, masked_class, plain_class, unmask_attribute
from spartan.stacks import Stack
from spartan_kernels import BlockLayout, BlockSparseWeight, block_grid, expand_blocks
from spartan_kernels.break_even import dense_convolution_wins
from spartan_kernels.layout import INDEX
from spartan_kernels.torch_private import transforms_active

__all__ = [
    "BlockSparseLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedWeight",
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
        return BlockLayout(*self._sizes(), a, b, c, d, e)


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


class BlockSparseLinear(nn.Module):
    """`nn.Linear` on the packed blocks of its weight: for inference, or to train the kept blocks alone.

    Args:
        packed: the weight.
        bias: [out_features] or None.
        plain: the class of the layer that it stands for: `nn.Linear`, or transformers' `Conv1D`.

    Attributes:
        values: parameter [blocks, rows, columns]. bias: parameter or None. The index of the blocks is in buffers.
    """

    def __init__(
        self, packed: BlockSparseWeight, bias: torch.Tensor | None = None, *, plain: type[nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.plain = plain
        self.out_features, self.in_features = packed.shape
        self.block_size = packed.block_size
        self.values = nn.Parameter(packed.values.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name in INDEX:
            self.register_buffer(name, getattr(packed.layout, name))
        self.register_buffer("positions", packed.positions)

    @staticmethod
    def replacing(layer: Any, packed: BlockSparseWeight) -> BlockSparseLinear:
        """What stands for a linear `layer`, packed or not, with this weight and its bias, device and modes."""
        values = layer.values if isinstance(layer, BlockSparseLinear) else layer.weight
        plain = layer.plain if isinstance(layer, BlockSparseLinear) else type(layer)
        new = BlockSparseLinear(packed, layer.bias, plain=plain).to(values.device).train(layer.training)
        new.values.requires_grad_(values.requires_grad)
        if new.bias is not None and layer.bias is not None:
            new.bias.requires_grad_(layer.bias.requires_grad)
        return new

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The names of the parameter and the buffers that make the weight."""
        return ("values", *INDEX, "positions")

    def load_packed(self, packed: BlockSparseWeight) -> None:
        """Take over a weight of the same shape, number and size of blocks; the parameter stays the same object.

        Raises:
            ValueError: another shape, number or size of blocks.
        """
        if packed.shape != (self.out_features, self.in_features) or packed.values.shape != self.values.shape:
            raise ValueError(
                f"packed must be {(self.out_features, self.in_features)} in blocks of shape {tuple(self.values.shape)};"
                f" got {packed.shape} in {tuple(packed.values.shape)}"
            )
        parts = (packed.values.detach(), *packed.layout.tensors(), packed.positions)
        with torch.no_grad():
            for name, part in zip(self.packed_names, parts, strict=True):
                getattr(self, name).copy_(part)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load, and refuse an index that is not one: products would read past their tensors by it."""
        *_, error_msgs = rest
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(tensor.is_meta for tensor in self.state_dict().values()):
            return
        try:
            self.packed.require_valid()
        except ValueError as error:
            error_msgs.append(f"{prefix or 'the packed layer'}: {error}")

    @property
    def packed(self) -> BlockSparseWeight:
        """The weight, whose values are the parameter itself."""
        grid = block_grid((self.out_features, self.in_features), self.block_size)
        density = self.values.shape[0] / max(1, math.prod(grid))
        a, b, c, d, e = (self.get_buffer(name) for name in INDEX)
        layout = BlockLayout((self.out_features, self.in_features), self.block_size, a, b, c, d, e, density)
        return BlockSparseWeight(self.values, layout, self.get_buffer("positions"))

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight as the layer that this stands for stores it, for modules that read it of their parts."""
        dense = self.packed.to_dense()
        return dense.mT if self.by_inputs else dense

    @property
    def by_inputs(self) -> bool:
        """Whether the layer that this stands for stores its weight as [in, out]."""
        return self.plain is not nn.Linear

    @property
    def stored(self) -> BlockSparseWeight:
        """`packed`, as that layer stores it."""
        return self.packed.transposed() if self.by_inputs else self.packed

    def dense(self) -> nn.Module:
        """The layer that this stands for, with a dense weight."""
        new: Any = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        if self.by_inputs:
            new = self.plain.__new__(self.plain)
            nn.Module.__init__(new)
            new.nf, new.nx = self.out_features, self.in_features
        new.weight = nn.Parameter(self.weight.detach().contiguous(), requires_grad=self.values.requires_grad)
        new.bias = None if self.bias is None else nn.Parameter(self.bias.detach(), self.bias.requires_grad)
        return new.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + b; in an ONNX graph, which knows no packed products, by the dense weight made of its blocks."""
        if torch.onnx.is_in_onnx_export():
            return functional.linear(input, self.packed.to_dense(), self.bias)
        return block_sparse_linear(input, self.packed, self.bias)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        density = self.packed.density
        return f"{self.in_features}, {self.out_features}, block_size={self.block_size}, density={density:.3g}"


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
        """Convolution with w = theta * m * h; on the CPU, only kept blocks are multiplied where that is faster."""
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
            return True
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
