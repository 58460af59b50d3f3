"""A finalized model whose linear layers run on packed blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from spartan.nn import BlockSparseLinear
from spartan.packing import block_activity
from spartan_kernels import BlockSparseWeight
from spartan_kernels.arguments import block_shape
from spartan_kernels.break_even import FEW_TOKENS, dense_wins

__all__ = ["replace_modules", "to_block_sparse"]

_SQUARES = (128, 64, 32, 16, 8)
_WASTE = 1.1  # larger blocks are faster, even where they store this much more


def to_block_sparse(model: nn.Module, block_size: int | tuple[int, int] | None = None) -> nn.Module:
    """Replace each `nn.Linear` that has blocks of zeros by one on packed blocks, in place.

    Layers whose blocks are all kept, or so many that the dense product is faster (see `spartan.tune`), stay as they
    are; so do subclasses of `nn.Linear`, layers with hooks, and layers that share their weight with another module.
    Convolutions stay dense.

    Args:
        model: plain modules, after `Sparsifier.finalize()`.
        block_size: an int or (rows, columns); None takes for each layer the largest square of 8 to 128 that stores at
            most a tenth more than the best of them.

    Returns:
        `model`, or its replacement where it is an `nn.Linear` itself.

    Raises:
        ValueError: a model that is still masked, by name; a block size that is not positive.
    """
    size = None if block_size is None else block_shape(block_size)
    for name, module in model.named_modules():
        if hasattr(module, "mask_hard"):
            raise ValueError(f"model is still masked at {name!r}: call Sparsifier.finalize() first")
    modules = list(model.modules())
    uses = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    linear = [m for m in modules if type(m) is nn.Linear and uses[id(m.weight)] == 1 and not _hooked(m)]
    return replace_modules(model, {id(module): _packed(module, size) for module in linear})


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put each replacement where the module of this id is, under all its names; the new root is returned."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    return replacements.get(id(model), model)


def _hooked(module: nn.Module) -> bool:
    """Whether something is to run with the module, which would be lost with it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _packed(linear: nn.Linear, size: tuple[int, int] | None) -> nn.Module:
    weight = linear.weight.detach()
    size = _best_square(weight) if size is None else size
    packed = BlockSparseWeight.from_dense(weight, size)
    density, tokens = packed.density, FEW_TOKENS + 1
    if density == 1 or dense_wins(density, weight.device, weight.dtype, size, tokens):
        return linear
    return BlockSparseLinear.replacing(linear, packed)


def _best_square(weight: torch.Tensor) -> tuple[int, int]:
    stored = {side: int(block_activity(weight != 0, (side, side)).sum()) * side**2 for side in _SQUARES}
    fewest = min(stored.values())
    return next((side, side) for side in _SQUARES if stored[side] <= _WASTE * fewest)
