"""What the cases of sparse attention share: causal operands, gradients beside the result, a check in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Settings, Work
from bench.checks import check_close
from bench.inputs import normal

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
_FLOOR = 1e-6  # of the largest entry


def causal_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled products, -inf where a key comes later."""
    later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
    return (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(later, -torch.inf)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's causal attention."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def with_gradients(attend: Attend) -> Call:
    """Forward and backward in one call: y and the gradients of query, key and value."""

    def call(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        y = attend(query, key, value)
        return y, *torch.autograd.grad(y, (query, key, value), upstream)

    return call


@dataclass(frozen=True)
class Causal:
    """Sparse attention of every token to those before it, `[1, heads, tokens, dim]`.

    Attributes:
        kept: which pairs of tokens count, for a head of query and key.
        pairs: how many pairs of tokens count in a head.
    """

    heads: int
    tokens: int
    dim: int
    kept: Callable[[Tensor, Tensor], Tensor]
    pairs: int

    def work(self, s: Settings, ours: Attend, by_hand: dict[str, Attend], notes: dict[str, float]) -> Work:
        """Ours beside dense attention and what is written by hand."""
        shape = (1, self.heads, self.tokens, self.dim)
        operands = tuple(normal(shape, s, seed).requires_grad_(seed < 3) for seed in range(4))
        plain = with_gradients(next(iter(by_hand.values())))

        def check(found: tuple[Tensor, ...], *operands: Tensor) -> None:
            query, key, value, upstream = (x.detach().double() for x in operands)
            with torch.no_grad():  # chosen as ours chooses: scores that tie in float32 may not in float64
                kept = self.kept(operands[0].detach(), operands[1].detach())
            leaves = [x.requires_grad_() for x in (query, key, value)]
            exact = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=kept))
            for ours, wanted, peer in zip(found, exact(*leaves, upstream), plain(*operands), strict=True):
                check_close(ours, wanted, peer, _FLOOR * wanted.abs().amax())

        return Work(
            ours=with_gradients(ours),
            operands=[operands],
            check=check,
            bytes=8 * math.prod(shape) * s.dtype.itemsize,  # query, key, value, upstream; y and three gradients
            flops=14 * self.heads * self.pairs * self.dim,  # two products forward, five backward
            peers={"dense": with_gradients(dense), **{name: with_gradients(peer) for name, peer in by_hand.items()}},
            notes=notes,
            seconds=6.0,
        )
