"""Modules whose weight is masked: the class of a Linear or Conv2d is swapped in place, others get a parametrization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from spartan.conv import gate_of_weight, masked_conv2d
from spartan.distributed import Seen, own_class
from spartan.linear import linear_with_masked_weight
from spartan.mask_carrier import MaskCarrier
from spartan.matmul import block_sparse_linear, masked_linear
from spartan_kernels import BlockLayout, BlockSparseWeight, block_grid, expand_blocks
from spartan_kernels.break_even import dense_convolution_wins
from spartan_kernels.layout import INDEX

__all__ = [
    "BlockSparseLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedWeight",
    "mask_weight",
    "share_mask",
    "swappable",
    "unmask_weight",
]


class MaskedLinear(MaskCarrier, nn.Linear):
    """`nn.Linear` that multiplies by its masked weight; made from one in place by `Sparsifier`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + b with w = theta * m * h; where weights are masked by blocks, only kept blocks are multiplied."""
        if self.mask_divided:
            return functional.linear(input, self.masked(self.weight), self.bias)
        if self.mask_block_size == (1, 1):
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
        gate, slope = self.gate_and_slope()
        layout = self._layout()
        return masked_linear(
            input,
            self.weight,
            gate,
            self.mask_block_size,
            self.bias,
            backward_mask=self.mask_backward,
            layout=layout,
            backward_layout=layout if self.mask_backward is None and not self.mask_straight_through else None,
            slope=slope,
        )

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

    def _index(self) -> list[torch.Tensor]:
        return BlockLayout.from_gate(self.mask_hard, self.mask_shape, self.mask_block_size).tensors()

    def _layout(self) -> BlockLayout:
        a, b, c, d, e = (self.get_buffer(f"mask_{name}") for name in INDEX)
        return BlockLayout((self.mask_shape[0], self.mask_shape[1]), self.mask_block_size, a, b, c, d, e)


class BlockSparseLinear(nn.Module):
    """`nn.Linear` on the packed blocks of its weight: for inference, or to train the kept blocks alone.

    Args:
        packed: the weight.
        bias: [out_features] or None.

    Attributes:
        values: parameter [blocks, rows, columns]. bias: parameter or None. The index of the blocks is in buffers.
    """

    def __init__(self, packed: BlockSparseWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.block_size = packed.block_size
        self.values = nn.Parameter(packed.values.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name in INDEX:
            self.register_buffer(name, getattr(packed.layout, name))
        self.register_buffer("positions", packed.positions)

    @staticmethod
    def replacing(layer: nn.Linear | BlockSparseLinear, packed: BlockSparseWeight) -> BlockSparseLinear:
        """What stands for `layer`, with this weight and its bias, device and modes."""
        values = layer.values if isinstance(layer, BlockSparseLinear) else layer.weight
        new = BlockSparseLinear(packed, layer.bias).to(values.device).train(layer.training)
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
        """The dense weight, for modules that read it of their parts."""
        return self.packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + b."""
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
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if self.mask_kept is None:
            self.mask_kept = int(self.mask_hard.sum()) / max(1, self.mask_hard.numel())
        image = input if input.dim() == 4 else input[None]
        return dense_convolution_wins(image, self.weight, self.mask_kept, max(self.mask_block_size))


class MaskedWeight(MaskCarrier):
    """Parametrization of a parameter of any other module: the attribute is theta * m * h."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """theta * m * h."""
        return self.masked(weight)


_SWAPS: dict[type[nn.Module], type[MaskCarrier]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
_SWAPS_BACK: dict[type[nn.Module], type[nn.Module]] = {masked: plain for plain, masked in _SWAPS.items()}


def swappable(module: nn.Module) -> bool:
    """Whether the weight of `module` is masked by a class of its own."""
    return own_class(module) in _SWAPS


def mask_weight(
    module: nn.Module,
    block_size: tuple[int, int],
    *,
    soft: bool,
    preserve_scale: bool = False,
    straight_through: bool = False,
    parametrized: bool = False,
    parameter: str = "weight",
    seen: Seen | None = None,
) -> MaskCarrier:
    """Give a parameter of `module` masks that keep everything, and return what carries them.

    The weight of an exact `nn.Linear` or `nn.Conv2d` changes the module's class in place, so names and identity of its
    parameters stay. Any other, and these where something else reads `.weight` itself (`parametrized`), gets a
    parametrization. `seen` is what the module computes with, where that is not the parameter as it is.
    """
    seen = seen or Seen.of(getattr(module, parameter))
    settings = block_size, soft, preserve_scale, straight_through
    if swappable(module) and not parametrized:
        _set_own_class(module, _SWAPS[own_class(module)])
        assert isinstance(module, MaskCarrier)
        module.attach_masks(seen.like, *settings)
        module.mask_divided = seen.mesh is not None
        return module
    carrier = MaskedWeight()
    carrier.attach_masks(seen.like, *settings)
    carrier.mask_divided = seen.mesh is not None
    share_mask(module, parameter, carrier)
    return carrier


def share_mask(module: nn.Module, parameter: str, carrier: MaskCarrier) -> None:
    """Parametrize a parameter of `module` by the masks of `carrier`, which other modules that have it may share."""
    earlier: Any = getattr(module, "parametrizations", {})
    order = next((masks.parameter_order for masks in earlier.values()), tuple(module._parameters))
    parametrize.register_parametrization(module, parameter, carrier)
    parametrizations: Any = module.parametrizations
    parametrizations[parameter].parameter_order = order


def unmask_weight(module: nn.Module, carrier: MaskCarrier, parameter: str = "weight") -> None:
    """Undo `mask_weight` or `share_mask`; the parameter keeps its present value."""
    if carrier is module:
        carrier.detach_masks()
        _set_own_class(module, _SWAPS_BACK[own_class(module)])
        return
    parametrizations: Any = module.parametrizations
    order = parametrizations[parameter].parameter_order
    _leave_class_to_copies(module)
    parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
    for name in order:  # which the states of optimizers are saved by
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


def _leave_class_to_copies(module: nn.Module) -> None:
    """Give a parametrized module a class that it shares with no copy of it: removal takes properties out of it."""
    kind = type(module)
    members = {name: member for name, member in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    object.__setattr__(module, "__class__", type(kind.__name__, kind.__bases__, members))


def _set_own_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make `module` a `kind`, under the class that `fully_shard` put before its own."""
    now = type(module)
    if own_class(module) is not now:
        key = now, kind
        if key not in _SHARDED:
            members = {"__deepcopy__": now.__deepcopy__}  # type: ignore[attr-defined]
            _SHARDED[key] = type(f"FSDP{kind.__name__}", (now.__bases__[0], kind), members)
        kind = _SHARDED[key]
    object.__setattr__(module, "__class__", kind)


_SHARDED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def largest_block(shape: torch.Size, block_size: tuple[int, int]) -> int:
    """Number of weights in the largest block of a weight of this shape."""
    if block_size == (1, 1):
        return 1
    return math.prod(min(side, size) for side, size in zip(block_size, shape[:2], strict=True))
