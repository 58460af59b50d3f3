"""A finalized model whose layers run on packed blocks, and what is said of those that do not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

from spartan.distributed import own_class
from spartan.nn import BlockSparseConv2d, BlockSparseLinear, PackedLayer
from spartan.nn.kinds import is_convolution, is_norm, is_transformers_linear
from spartan.nn.selection import Candidate, find_weights
from spartan.saving.encodings import block_activity
from spartan.saving.tables import text_table
from spartan_kernels import BlockSparseFilter, BlockSparseWeight
from spartan_kernels.arguments import block_shape, memory_format
from spartan_kernels.break_even import FEW_TOKENS, dense_wins, packed_convolution_time, packed_time
from spartan_kernels.dispatch import refusal

__all__ = [
    "PackedWeight",
    "PackingReport",
    "PackingRow",
    "can_be_packed",
    "packed_layer",
    "packed_weight",
    "packing_report",
    "replace_modules",
    "to_block_sparse",
    "to_dense",
]

PackedWeight: TypeAlias = "BlockSparseWeight | BlockSparseFilter"

# blocks to choose from; those of few weights where there are kernels of their own
_SQUARES = tuple((side, side) for side in (128, 64, 32, 16, 8))
_NARROW = ((4, 1), (1, 1))
_LINEAR = "block_sparse_linear_forward"
_AS_FAST = 1.25  # the largest blocks that take no longer than this beside the fastest: their index is smaller
_INDEX_BYTES = 12  # of a packed block: its column, its row, and where it lies


@dataclass(frozen=True)
class PackingRow:
    """A weight as it is multiplied, or would be by `to_block_sparse`.

    Attributes:
        name: of the weight. shape: (outputs, inputs, ...) as it is stored.
        block_size: (rows, columns) of its packed blocks; None: it is multiplied densely.
        density: stored blocks / blocks; 1 for a dense one.
        reason: why it is multiplied densely, else None.
        speedup: time of the dense product / time of the packed one, as measured by `spartan.tune` or as the model
            says; None for a dense one, and in 8 bits.
        float8: whether its blocks are in 8 bits.
    """

    name: str
    shape: tuple[int, ...]
    block_size: tuple[int, int] | None
    density: float
    reason: str | None
    speedup: float | None = None
    float8: bool = False


@dataclass(frozen=True, repr=False)
class PackingReport:
    """The weights of a model that multiply; `print` shows them as a table.

    Attributes:
        rows: one for each weight of at least two dimensions, but embeddings and norms.
    """

    rows: tuple[PackingRow, ...]

    def __str__(self) -> str:
        packed = [row for row in self.rows if row.reason is None]
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                "" if row.block_size is None else "x".join(map(str, row.block_size)) + " float8" * row.float8,
                "" if row.block_size is None else f"{row.density:.2%}",
                "" if row.speedup is None else f"{row.speedup:.1f}",
                row.reason or "",
            )
            for row in self.rows
        ]
        headings = ("weight", "shape", "block", "stored", "times as fast", "multiplied densely because")
        return text_table(f"{len(packed)} of {len(self.rows)} weights in packed blocks", headings, rows, [])

    __repr__ = __str__


@dataclass(frozen=True)
class _Choice:
    """What becomes of a weight: packed, or dense for a reason; `hidden` if packing it would have been faster."""

    candidate: Candidate
    packed: PackedWeight | None = None
    reason: str = ""
    hidden: bool = False
    present: PackedLayer | None = None


def to_block_sparse(
    model: nn.Module,
    block_size: int | tuple[int, int] | None = None,
    *,
    tokens: int = 128,
    float8: bool = False,
) -> nn.Module:
    """Replace each linear layer and 2-d convolution that has blocks of zeros by one on packed blocks, in place.

    Linear layers are exact `nn.Linear` and the `Conv1D` of Hugging Face's transformers; convolutions are exact
    `nn.Conv2d` of one group, padded by zeros, where the compiled CPU kernels serve them. Others stay as they are:
    subclasses, layers with hooks, layers that share their weight, what `MultiheadAttention` reads itself.
    A warning names those whose blocks of zeros are not made use of; `packing_report` says why each layer is dense.

    Args:
        model: plain modules, after `Sparsifier.finalize()`.
        block_size: an int or (rows, columns) of (outputs, inputs): layers are packed unless all blocks are kept or
            `spartan.tune` measured the dense product as faster. None: for each layer the largest block whose product
            takes about the least time, and none where the dense one takes less or is smaller. Squares of 8 to 128, of
            linear layers on CPUs also (4, 1) and single weights, on GPUs single weights for at most 16 tokens; as
            measured by `spartan.tune`, else by a model of a CPU, or as predicted for single weights on a GPU; for
            convolutions always by a model, which reads from the weight whether channels lie last in memory.
        tokens: rows of the input that a layer sees in a call, pixels of the result of a convolution, which that choice
            is for: a call with few, or of a small layer, takes its time whatever is multiplied.
        float8: keep the blocks of linear layers, those packed before too, in 8 bits (`BlockSparseWeight.to_float8`):
            for inference alone. Convolutions keep their dtype.

    Returns:
        `model`, or its replacement where it is such a layer itself.

    Raises:
        ValueError: a model that is still masked, by name; a block size or tokens that are not positive.
    """
    choices = list(_choices(model, block_size, tokens, float8))
    left = [f"{choice.candidate.name} ({choice.reason})" for choice in choices if choice.hidden]
    if left:
        warnings.warn(f"these weights have blocks of zeros but are multiplied densely: {', '.join(left)}", stacklevel=2)
    packed = [(choice.candidate.uses[0].module, choice.packed) for choice in choices]
    return replace_modules(model, {id(module): packed_layer(module, p) for module, p in packed if p is not None})


def to_dense(model: nn.Module) -> nn.Module:
    """Undo `to_block_sparse` in memory: each packed layer becomes the plain one with its dense weight, in place.

    For tools that know no packed layers, such as ONNX or quantisation.

    Returns:
        `model`, or its replacement where it is a packed layer itself.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLayer)]
    return replace_modules(model, {id(module): module.dense() for module in packed})


def packing_report(
    model: nn.Module,
    block_size: int | tuple[int, int] | None = None,
    *,
    tokens: int = 128,
    float8: bool = False,
) -> PackingReport:
    """Which weights run on packed blocks, or would after `to_block_sparse` with these arguments, and why others do not.

    Raises:
        ValueError: as `to_block_sparse`.
    """
    rows = []
    for choice in _choices(model, block_size, tokens, float8):
        candidate, packed = choice.candidate, choice.packed
        if choice.present is not None:
            name = candidate.name.removesuffix("values") + "weight"
            last = getattr(choice.present, "channels_last", False)
            rows.append(_row(name, packed or choice.present.packed, tokens, last))
        elif packed is not None:
            rows.append(_row(candidate.name, packed, tokens, _channels_last(candidate.weight)))
        else:
            rows.append(PackingRow(candidate.name, tuple(candidate.weight.shape), None, 1.0, choice.reason))
    return PackingReport(tuple(rows))


def packed_weight(weight: torch.Tensor, block_size: tuple[int, int]) -> PackedWeight:
    """The blocks of a linear layer's or a convolution's weight."""
    kind = BlockSparseFilter if weight.dim() == 4 else BlockSparseWeight
    return kind.from_dense(weight, block_size)


def can_be_packed(layer: nn.Module, packed: PackedWeight) -> bool:
    """Whether `layer`, packed or not, can run on this weight, as far as its class and settings go."""
    if isinstance(packed, BlockSparseFilter):
        plain = type(layer) is nn.Conv2d and _unlike_plain(layer) is None
        return plain or isinstance(layer, BlockSparseConv2d)
    return type(layer) is nn.Linear or is_transformers_linear(layer) or isinstance(layer, BlockSparseLinear)


def packed_layer(layer: nn.Module, packed: PackedWeight) -> PackedLayer:
    """What stands for `layer`, packed or not, on this weight."""
    if isinstance(packed, BlockSparseFilter):
        return BlockSparseConv2d.replacing(layer, packed)
    return BlockSparseLinear.replacing(layer, packed)


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put each replacement where the module of this id is, under all its names; the new root is returned."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    return replacements.get(id(model), model)


def _choices(
    model: nn.Module, block_size: int | tuple[int, int] | None, tokens: int, float8: bool
) -> Iterator[_Choice]:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be an int of at least 1; got {tokens!r}")
    size = None if block_size is None else block_shape(block_size)
    require_finalized(model)
    for candidate in find_weights(model):
        module = candidate.uses[0].module
        if isinstance(module, PackedLayer):
            if candidate.uses[0].parameter == "values":
                small = module.packed.to_float8() if float8 and isinstance(module, BlockSparseLinear) else None
                yield _Choice(candidate, small if module.scales is None else None, present=module)
            continue
        if candidate.unfit is not None or is_norm(module) or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        kind = unpackable(candidate)
        weight = candidate.weight.detach()
        convolution = kind is None and own_class(module) is nn.Conv2d
        if weight.dim() != 2 and not convolution:
            yield _Choice(candidate, reason=kind or "it is no matrix")
            continue
        by_outputs = weight.mT if candidate.transposed else weight
        packed = _packed(by_outputs, size, tokens, float8)
        if isinstance(packed, str):
            yield _Choice(candidate, reason=packed if kind is None or "no block" in packed else kind)
        elif kind is not None:
            yield _Choice(candidate, reason=kind, hidden=True)
        else:
            yield _Choice(candidate, packed)


def require_finalized(model: nn.Module) -> None:
    """Raise a ValueError that names the first module that is still masked."""
    for name, module in model.named_modules():
        if hasattr(module, "mask_hard"):
            raise ValueError(f"model is still masked at {name!r}: call Sparsifier.finalize() first")


def unpackable(candidate: Candidate) -> str | None:
    """Why the module of a weight cannot be replaced by one on packed blocks; None if it can."""
    use = candidate.uses[0]
    kind = own_class(use.module)
    for owner in (use.module, use.owner):
        if isinstance(owner, nn.MultiheadAttention):
            return "MultiheadAttention reads its weights itself"
    if isinstance(use.module, nn.Conv2d) and kind is nn.Conv2d:
        unlike = _unlike_plain(use.module)
        if unlike is not None:
            return unlike
    elif is_convolution(use.module) and not is_transformers_linear(use.module):
        return f"it is of a {kind.__name__}, not of a Conv2d"
    elif kind is not nn.Linear and not is_transformers_linear(use.module):
        return f"{kind.__name__} is a class of its own"
    if len(candidate.uses) > 1:
        return f"it is shared with {candidate.uses[1].name}"
    return "its layer has hooks" if _hooked(use.module) else None


def _unlike_plain(module: nn.Conv2d) -> str | None:
    """What a convolution does that packed ones do not; None if nothing."""
    if module.groups != 1:
        return f"its convolution has {module.groups} groups"
    if module.padding_mode != "zeros":
        return f"its convolution pads by {module.padding_mode!r}, not by zeros"
    return None


def _hooked(module: nn.Module) -> bool:
    """Whether something is to run with the module, which would be lost with it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _row(name: str, packed: PackedWeight, tokens: int, last: bool) -> PackingRow:
    row = PackingRow(name, tuple(packed.shape), packed.block_size, packed.density, None)
    if packed.values.dtype != packed.dtype:  # in 8 bits, whose products nothing has measured
        return replace(row, float8=True)
    time = _time(packed.density, packed.block_size, packed.values, packed.shape, tokens, last)
    return replace(row, speedup=1 / time)


def _channels_last(weight: torch.Tensor) -> bool:
    return weight.dim() == 4 and memory_format(weight) == torch.channels_last


def _time(
    density: float, size: tuple[int, int], like: torch.Tensor, shape: Sequence[int], tokens: int, last: bool
) -> float:
    """Time of the product with packed blocks / time of the dense one."""
    if len(shape) == 4:
        return packed_convolution_time(density, shape, min(size[0], shape[0]), last, tokens)
    return packed_time(density, like.device, like.dtype, size, tokens, math.prod(shape))


def _packed(weight: torch.Tensor, size: tuple[int, int] | None, tokens: int, float8: bool) -> PackedWeight | str:
    """The weight in packed blocks, or why its dense product is taken."""
    packed = _unrounded(weight, size, tokens, float8)
    return packed.to_float8() if float8 and isinstance(packed, BlockSparseWeight) else packed


def _unrounded(weight: torch.Tensor, size: tuple[int, int] | None, tokens: int, float8: bool) -> PackedWeight | str:
    """The same before it is rounded to 8 bits, which the compiled CPU kernels do not multiply."""
    if not weight.numel():
        return "it is empty"
    convolution = weight.dim() == 4
    refused = convolution and refusal("block_sparse_conv2d_forward", "native", weight.device.type, weight.dtype)
    if refused:
        return f"only the compiled CPU kernels multiply blocks of a convolution, and {refused}"
    if size is not None:
        packed = packed_weight(weight, size)
        if packed.density == 1:
            return f"no block of {_named(size)} is all zeros"
        slower = not convolution and dense_wins(packed.density, weight.device, weight.dtype, size, tokens, packed=True)
        return _slower(packed.density, size) if slower else packed
    narrow = () if convolution or float8 else _narrow(weight.device, weight.dtype, tokens)
    sizes = _SQUARES + narrow
    densities = {size: _density(weight, size) for size in sizes}
    last = _channels_last(weight)
    times = {size: _time(density, size, weight, weight.shape, tokens, last) for size, density in densities.items()}
    best = next(size for size in sizes if times[size] <= _AS_FAST * min(times.values()))
    if densities[sizes[-1]] == 1:
        return f"no block of {_named(sizes[-1])} is all zeros" if sizes[-1] != (1, 1) else "it has no zeros"
    if times[best] >= 1:
        return f"{_slower(densities[best], best)}, with {tokens} {'pixels' if convolution else 'tokens'}"
    kept = 1 if float8 and not convolution else weight.element_size()  # bytes of a weight
    stored = densities[best] * (kept + _INDEX_BYTES / math.prod(best)) / weight.element_size()
    if stored > 1:
        return f"its blocks of {_named(best)} with their index are larger: {stored:.0%} of it"
    return packed_weight(weight, best)


def _narrow(device: torch.device, dtype: torch.dtype, tokens: int) -> tuple[tuple[int, int], ...]:
    """The blocks of few weights that a linear layer has kernels for."""
    if refusal(_LINEAR, "native", device.type, dtype) is None:
        return _NARROW
    served = device.type == "cuda" and tokens <= FEW_TOKENS and refusal(_LINEAR, "triton", device.type, dtype) is None
    return _NARROW[1:] if served else ()


def _density(weight: torch.Tensor, size: tuple[int, int]) -> float:
    """Which part of a weight's blocks holds anything but zeros."""
    activity = block_activity(weight != 0, size)
    return int(activity.sum()) / activity.numel()


def _slower(density: float, size: tuple[int, int]) -> str:
    return f"the dense product is faster: {density:.0%} of its blocks of {_named(size)} hold a nonzero"


def _named(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
