"""Attention to gated blocks of keys, forward and backward, beside dense attention and what is written by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.case import Settings, Work, case
from bench.inputs import normal
from bench.layers.attention import Causal
from spartan.layers import block_gated_attention

_HEADS, _TOKENS, _DIM, _BLOCK = 8, 4096, 64, 64


def _kept(gates: Tensor, k: int) -> Tensor:
    """The k - 1 best blocks before the diagonal, and the diagonal, `[n, heads, blocks, k]`; too few: some twice."""
    blocks = gates.shape[-1]
    diagonal = torch.arange(blocks, device=gates.device).expand(gates.shape[:-1]).unsqueeze(-1)
    if k == 1:
        return diagonal
    later = torch.ones(blocks, blocks, dtype=torch.bool, device=gates.device).triu()
    return torch.cat([gates.masked_fill(later, -torch.inf).topk(k - 1).indices, diagonal], -1)


def _by_hand(query: Tensor, key: Tensor, value: Tensor, gates: Tensor, k: int) -> Tensor:
    """From torch.topk and gather: blocks `[n, heads, blocks, k block, d]`, a mask, softmax and a product."""
    n, heads, tokens, dim = query.shape
    kept, blocks = _kept(gates, k), tokens // _BLOCK
    index = kept.flatten(2)[..., None, None].expand(-1, -1, -1, _BLOCK, dim)
    keys, values = (
        x.unflatten(2, (blocks, _BLOCK)).gather(2, index).view(n, heads, blocks, k * _BLOCK, dim) for x in (key, value)
    )
    row = torch.arange(tokens, device=query.device).view(blocks, _BLOCK, 1)
    column = (kept.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=query.device)).flatten(3).unsqueeze(3)
    earlier = kept < torch.arange(blocks, device=query.device)[:, None]
    once = earlier | (torch.arange(k, device=query.device) == k - 1)
    allowed = (column <= row) & once.repeat_interleave(_BLOCK, -1).unsqueeze(3)
    scores = (query.unflatten(2, (blocks, _BLOCK)) @ keys.mT / math.sqrt(dim)).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ values).flatten(2, 3)


def _register(k: int) -> None:
    def build(s: Settings) -> Work:
        tokens = 1024 if s.quick else _TOKENS
        blocks = tokens // _BLOCK
        gates = normal((1, _HEADS, blocks, blocks), s, 10)

        def kept(query: Tensor, key: Tensor) -> Tensor:
            chosen = torch.zeros_like(gates, dtype=torch.bool).scatter(-1, _kept(gates, k), True).tril()
            pairs = chosen.repeat_interleave(_BLOCK, 2).repeat_interleave(_BLOCK, 3)
            return pairs.tril()

        pairs = sum(min(k, row + 1) - 0.5 for row in range(blocks)) * _BLOCK**2
        return Causal(_HEADS, tokens, _DIM, kept, int(pairs)).work(
            s,
            lambda *operands: block_gated_attention(*operands, gates, k, _BLOCK, is_causal=True),
            {"torch.topk and gather": lambda *operands: _by_hand(*operands, gates, k)},
            {"k": float(k), "blocks": float(blocks)},
        )

    build.__doc__ = f"Causal attention over 4096 tokens, 8 heads of 64, to {k} of 64 blocks of 64 keys."
    case("layers", f"block-gated-attention-{k}-of-64")(build)


for _k in (3, 6):
    _register(_k)
