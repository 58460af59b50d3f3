"""Attention of query blocks to gathered key blocks: the way of the CPU, and of small blocks everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attend_gathered"]

_GATHERED_BYTES = 2**22  # of keys at a time on a CPU: what the allocator hands out again, without new pages
_ON_OTHER_DEVICES = 64  # times as many: enough problems at a time to fill a GPU


def attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, block: int, is_causal: bool, scale: float
) -> Tensor:
    """Attention of query blocks to their kept blocks, each of them a small problem of its own."""
    n, heads, rows, k = kept.shape
    queries, keys = query.shape[-2], key.shape[-2]
    query, key, value = (_in_blocks(x, block) for x in (query, key, value))
    bias = None
    if is_causal:  # of the kept blocks only the last one, the diagonal, has keys that come later
        later = torch.ones(block, k * block, dtype=torch.bool, device=query.device).triu((k - 1) * block + 1)
        bias = query.new_zeros(block, k * block).masked_fill(later, -torch.inf).expand(n * heads * rows, -1, -1)
    elif keys % block:  # what fills the last block is no key
        positions = kept.unsqueeze(-1) * block + torch.arange(block, device=kept.device)
        filled = (positions >= keys).view(n * heads * rows, 1, k * block)
        bias = query.new_zeros(filled.shape).masked_fill(filled, -torch.inf).expand(-1, block, -1)
    first = torch.arange(0, n * heads * key.shape[2], key.shape[2], device=kept.device).view(n, heads, 1, 1)
    problems = (query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2), (kept + first).flatten(0, 2), bias)
    attended = _attended(*problems, scale) if torch.compiler.is_compiling() else _InParts.apply(*problems, scale)
    return attended.view(n, heads, rows * block, -1)[:, :, :queries]


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """`[n, heads, blocks, block, d]`; zeros fill the last block."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))


def _taken(x: Tensor, kept: Tensor) -> Tensor:
    """Blocks `[problems, k block, d]` of x `[blocks, block, d]`, copied by whole rows."""
    return F.embedding(kept, x.flatten(1)).view(kept.shape[0], -1, x.shape[2])


def _dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    mask = None if bias is None else bias[:, None]
    attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], mask, scale=scale)
    return attended[:, 0]


def _attended(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of each problem: queries `[problems, block, d]` to blocks `kept` `[problems, k]` of key and value."""
    return _dense(query, _taken(key, kept), _taken(value, kept), bias, scale)


class _InParts(torch.autograd.Function):
    """`_attended`, some problems at a time, so that gathered blocks stay in the cache; the backward gathers again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, kept, bias)
        ctx.scale = scale
        parts = _parts(kept, key)
        return torch.cat([_attended(query[p], key, value, kept[p], _of(bias, p), scale) for p in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, kept, bias = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        for p in _parts(kept, key):
            parts = (query[p], _taken(key, kept[p]), _taken(value, kept[p]))
            with torch.enable_grad():
                q, blocks, values = (x.detach().requires_grad_() for x in parts)
                attended = _dense(q, blocks, values, _of(bias, p), ctx.scale)
            of_query, *of_blocks = torch.autograd.grad(attended, (q, blocks, values), grad[p].to(attended.dtype))
            grads[0][p] = of_query
            for whole, part in zip(grads[1:], of_blocks, strict=True):
                whole.index_put_((kept[p].flatten(),), part.view(-1, *whole.shape[1:]), accumulate=True)
        return *grads, None, None, None


def _parts(kept: Tensor, key: Tensor) -> Iterator[slice]:
    each = kept.shape[1] * key[0].numel() * key.element_size()
    step = max(1, _GATHERED_BYTES * (1 if key.device.type == "cpu" else _ON_OTHER_DEVICES) // each)
    return (slice(start, start + step) for start in range(0, kept.shape[0], step))


def _of(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]
