"""Gates of key blocks: what a block of queries expects to find in a block of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spartan.layers.heads import check_heads

__all__ = ["BlockGate", "block_maxima", "distillation"]


class BlockGate(nn.Module):
    """Scores of key blocks for query blocks, from pooled queries and keys.

    With P(x) the mean, the largest and the smallest of each feature over a block, and W_q, W_k `[heads, 3 d, d]`:
    gates = (P(Q) W_q) (P(K) W_k)^T / sqrt(d). An untrained gate compares the means of the blocks.

    Args:
        heads: each has weights of its own.
        dim: d, features of a head.
        block: tokens of a block; the last one may be shorter.

    Source: Gao et al., "SeerAttention", arXiv:2410.13276, section 3.
    """

    def __init__(self, heads: int, dim: int, block: int = 64) -> None:
        super().__init__()
        if min(heads, dim, block) < 1:
            raise ValueError(f"heads, dim and block must be at least 1; got {heads}, {dim}, {block}")
        self.block = block
        means = torch.eye(3 * dim, dim).expand(heads, 3 * dim, dim)
        self.query = nn.Parameter(means.clone())
        self.key = nn.Parameter(means.clone())

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Gates `[n, heads, query blocks, key blocks]` of query and key `[n, heads, tokens, d]`."""
        pooled_query = _pooled(query, self.block) @ self.query
        pooled_key = _pooled(key, self.block) @ self.key
        return pooled_query @ pooled_key.transpose(-1, -2) / math.sqrt(query.shape[-1])


def _pooled(x: Tensor, block: int) -> Tensor:
    """Mean, largest and smallest of each feature by block: `[n, heads, blocks, 3 d]`."""
    whole = x.shape[-2] // block * block
    parts = [x[..., :whole, :].unflatten(-2, (-1, block))] if whole else []
    if whole < x.shape[-2]:
        parts.append(x[..., None, whole:, :])
    return torch.cat([torch.cat([p.mean(-2), p.amax(-2), p.amin(-2)], -1) for p in parts], -2)


@torch.no_grad()
def block_maxima(
    query: Tensor, key: Tensor, block: int = 64, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """The largest weight of dense attention in each pair of a query block and a key block.

    A = softmax(scale Q K^T) is made for one block of queries at a time, never as a whole.

    Args:
        query: `[n, heads, queries, d]`.
        key: `[n, heads, t, d]`.
        block: tokens of a block; the last one may be shorter.
        is_causal: query i attends to keys 0 to i.
        scale: None: 1 / sqrt(d).

    Returns:
        `[n, heads, query blocks, key blocks]`, float32 for half precision; 0 above the diagonal if `is_causal`.
    """
    check_heads(query, key, key)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    blocks, rows = -(-key.shape[-2] // block), []
    for start in range(0, query.shape[-2], block):
        part = query[..., start : start + block, :]
        end = min(start + block, key.shape[-2]) if is_causal else key.shape[-2]
        scores = part @ key[..., :end, :].transpose(-1, -2) * scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(start + 1)
            scores = scores.masked_fill(later, -torch.inf)
        largest = scores.softmax(-1).amax(-2)
        rows.append(F.pad(largest, (0, blocks * block - end)).unflatten(-1, (blocks, block)).amax(-1))
    return torch.stack(rows, -2)


def distillation(gates: Tensor, maxima: Tensor, is_causal: bool = False) -> Tensor:
    """Kullback-Leibler divergence of softmax(gates) from normalised `maxima`, mean over rows.

    Args:
        gates: `[n, heads, query blocks, key blocks]`.
        maxima: of the same shape, from `block_maxima`.
        is_causal: leave out the gates above the diagonal.
    """
    target = maxima / maxima.sum(-1, keepdim=True)
    masked = torch.full(maxima.shape[-2:], is_causal, device=maxima.device).triu(1)
    found = gates.to(target.dtype).masked_fill(masked, -torch.inf).log_softmax(-1).masked_fill(masked, 0)
    return F.kl_div(found, target, reduction="none").sum(-1).mean()
