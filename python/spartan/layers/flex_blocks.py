"""Attention of query blocks to kept key blocks by PyTorch's FlexAttention: the way of the GPU, not yet run there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spartan.layers.selection import kept_indices

__all__ = ["FLEX_BLOCK", "attend_flex", "block_mask"]

FLEX_BLOCK = 128  # the tiles that FlexAttention's kernels choose by themselves divide it, forward and backward


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, k: int, block: int, is_causal: bool, scale: float | None
) -> Tensor:
    """Attention to the kept blocks by FlexAttention: compiled on a GPU, elsewhere its eager form with all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(gates, k, block, is_causal, (query.shape[-2], key.shape[-2]))
    if query.is_cuda and not torch.compiler.is_compiling():
        return _compiled_flex()(query, key, value, block_mask=mask, scale=scale)
    return flex_attention(query, key, value, block_mask=mask, scale=scale)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def block_mask(gates: Tensor, k: int, block: int, is_causal: bool, lengths: tuple[int, int]) -> Any:
    """FlexAttention's lists of the kept blocks; `mask_mod` says the same of each pair of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    whole = torch.zeros_like(gates, dtype=torch.bool)
    if not is_causal:
        whole = whole.scatter(-1, kept_indices(gates, k), True)
        partial = torch.zeros_like(whole)
    else:
        earlier = torch.ones_like(whole).tril(-1)
        if k > 1:
            whole = whole.scatter(-1, kept_indices(gates.masked_fill(~earlier, -torch.inf), k - 1), True) & earlier
        partial = torch.eye(gates.shape[-1], dtype=torch.bool, device=gates.device).expand_as(whole)
    kept = whole | partial

    def mask_mod(n: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = kept[n, head, i // block, j // block]
        return found & (i >= j) if is_causal else found

    return BlockMask.from_kv_blocks(
        *_lists(partial), *_lists(whole), BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=lengths
    )


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their columns before those of the others."""
    return mask.sum(-1, dtype=torch.int32), mask.int().argsort(dim=-1, descending=True, stable=True).int()
