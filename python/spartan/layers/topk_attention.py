"""Attention of each query to the k keys of its largest scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spartan.functional import soft_topk
from spartan.layers.gathered import gathered_sum
from spartan.layers.heads import Heads, check_heads
from spartan.layers.selection import kept_indices

__all__ = ["TopKAttention", "topk_attention"]


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int | Sequence[int],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    beta: float | Tensor | None = None,
    straight_through: bool = False,
    mixture: Tensor | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` over the k largest scores of each query.

    s = scale Q K^T + mask, p_j = m_j exp(s_j) / sum_i m_i exp(s_i), y = p V. Hard (beta None): m_j is 1 for the k
    largest s, 0 for others. Soft: m = soft_topk(s, k, beta), so that all keys have a gradient; it goes to the hard m
    for a large beta, and to dense attention for k of all keys. Several k: y = sum_i softmax(mixture)_i y(k_i).

    The hard way adds up the k kept values, or, where t is at most 16 k, multiplies by all values (`gathered_sum`).

    Args:
        query: `[n, heads, queries, d]`, floating point.
        key: `[n, heads, t, d]`.
        value: `[n, heads, t, d_v]`.
        k: how many keys a query attends to, or several such numbers. A query with fewer keys attends to all of them.
            With one key, hard, the weight is 1: query and key get no gradient.
        attn_mask: bool, True where a query may attend, or float, added to the scores; broadcasts to
            `[n, heads, queries, t]`. A query without any key gets 0.
        dropout_p: probability of dropping a weight; applied always, as in `scaled_dot_product_attention`.
        is_causal: query i attends to keys 0 to i; together with `attn_mask`, both hold. Needs as many queries as keys.
        scale: None: 1 / sqrt(d).
        beta: sharpness of the soft mask, at least 0; None: hard.
        straight_through: with beta, the hard mask forward, the gradient of the soft one.
        mixture: `[len(k)]`, logits of the shares of several k; None: equal ones.

    Returns:
        y `[n, heads, queries, d_v]`, dtype of `value`.

    Raises:
        ValueError: a k below 1, shapes that do not match, an `attn_mask` of integers, `straight_through` without beta.

    Source: Zhao et al., "Explicit Sparse Transformer", arXiv:1912.11637; the mixture: Chen et al., "Learning A Sparse
    Transformer Network for Effective Image Deraining" (DRSformer), CVPR 2023, arXiv:2303.11950.
    """
    check_heads(query, key, value, is_causal)
    sizes = _sizes(k, beta, straight_through)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # weights in float32, as in softmax
    shares = _shares(mixture, sizes, scores)
    bias = _bias(attn_mask, is_causal, scores)
    if bias is not None:
        scores = scores + bias
    if beta is not None:
        budget = _budget(bias, scores)
        soft = [soft_topk(scores, budget.clamp(max=n), beta=beta, straight_through=straight_through) for n in sizes]
        weights = sum(share * _normalised(scores, m) for share, m in zip(shares, soft, strict=True))
        return F.dropout(weights, dropout_p).to(value.dtype) @ value
    kept = kept_indices(scores.detach(), min(max(sizes), scores.shape[-1]))
    weights, kept = _hard_weights(scores.gather(-1, kept), kept, sizes, shares)
    return gathered_sum(F.dropout(weights, dropout_p).to(value.dtype), value, kept)


def _sizes(k: int | Sequence[int], beta: float | Tensor | None, straight_through: bool) -> list[int]:
    """The several k; refuses those, and a `straight_through`, that cannot be."""
    sizes = [k] if isinstance(k, int) else [*k]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"k must be at least 1, or several such numbers; got {k}")
    if straight_through and beta is None:
        raise ValueError("straight_through=True needs beta, the sharpness of the gradient; got beta=None")
    return sizes


def _shares(mixture: Tensor | None, sizes: list[int], scores: Tensor) -> Tensor:
    """How much each of several k adds to the weights."""
    if mixture is None:
        return scores.new_full((len(sizes),), 1 / len(sizes))
    if mixture.shape != (len(sizes),):
        raise ValueError(f"mixture must be [{len(sizes)}], a logit for each k; got shape {list(mixture.shape)}")
    return mixture.to(scores.dtype).softmax(0)


def _bias(attn_mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """What is added to the scores, as small as it broadcasts from."""
    bias = attn_mask
    if attn_mask is not None:
        if torch.broadcast_shapes(attn_mask.shape, scores.shape) != scores.shape:
            raise ValueError(f"attn_mask must broadcast to {list(scores.shape)}; got shape {list(attn_mask.shape)}")
        if not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
            raise ValueError(f"attn_mask must be bool or floating; got {attn_mask.dtype}")
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
    if is_causal:
        causal = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
        bias = causal if bias is None else bias + causal
    return bias


def _budget(bias: Tensor | None, scores: Tensor) -> Tensor:
    """How many keys each query may attend to."""
    if bias is None:
        return scores.new_full(scores.shape[:-1], scores.shape[-1])
    allowed = (bias > -torch.inf).expand(*bias.shape[:-1], scores.shape[-1])
    return allowed.sum(-1).to(scores.dtype).expand(scores.shape[:-1])


def _normalised(scores: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """m exp(s) / sum m exp(s) along a row; 0 where all scores are -inf."""
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    exponentials = mask * (scores - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / (total + (total == 0))


def _hard_weights(scores: Tensor, kept: Tensor, sizes: list[int], shares: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the kept keys, and these in the order of the weights: the smaller selections lie in the larger."""
    if len(sizes) == 1:
        return _normalised(scores), kept
    scores, order = scores.sort(-1, descending=True)
    parts = [share * _normalised(scores[..., :n]) for share, n in zip(shares, sizes, strict=True)]
    padded = [F.pad(part, (0, scores.shape[-1] - part.shape[-1])) for part in parts]
    return torch.stack(padded).sum(0), kept.gather(-1, order)


class TopKAttention(Heads):
    """Multi-head attention over `[n, tokens, dim]` in which each query attends to k keys (`topk_attention`).

    Args:
        dim: of input and output, a multiple of `heads`.
        heads: of `dim / heads` features each.
        k: how many keys a query attends to; several such numbers are mixed by the parameter `mixture`.
        causal: a token attends to itself and those before it.
        beta: sharpness of a soft mask; None: hard. The attribute may change between steps.
        straight_through: with beta, the hard mask forward and the soft one's gradient.
        dropout: probability of dropping a weight in training.
        bias: whether the linear layers have one.

    Raises:
        ValueError: `dim` no multiple of `heads`, a k below 1, `straight_through` without beta.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        k: int | Sequence[int],
        *,
        causal: bool = False,
        beta: float | None = None,
        straight_through: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, bias)
        self.k = k if isinstance(k, int) else tuple(k)
        _sizes(self.k, beta, straight_through)
        self.causal, self.beta, self.straight_through, self.dropout = causal, beta, straight_through, dropout
        self.mixture = None if isinstance(self.k, int) else nn.Parameter(torch.zeros(len(self.k)))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from `x` to itself, or to `context`.

        Args:
            x: `[n, tokens, dim]`.
            context: `[n, t, dim]`; None: x.
            attn_mask: as in `topk_attention`: bool, True where a query may attend, or float, added to the scores.
            key_padding_mask: bool `[n, t]`, True at keys that are padding, as in `nn.MultiheadAttention`.

        Returns:
            `[n, tokens, dim]`.
        """
        query, key, value = self.split(x, context)
        if key_padding_mask is not None:
            attn_mask = _without_padding(attn_mask, key_padding_mask, key)
        attended = topk_attention(
            query,
            key,
            value,
            self.k,
            attn_mask,
            self.dropout if self.training else 0.0,
            self.causal,
            beta=self.beta,
            straight_through=self.straight_through,
            mixture=self.mixture,
        )
        return self.join(attended)

    def extra_repr(self) -> str:
        """Settings that `print` shows."""
        return f"heads={self.heads}, k={self.k}, causal={self.causal}, beta={self.beta}"


def _without_padding(attn_mask: Tensor | None, padding: Tensor, key: Tensor) -> Tensor:
    if padding.dtype != torch.bool or padding.shape != (key.shape[0], key.shape[2]):
        found = f"{padding.dtype} {list(padding.shape)}"
        raise ValueError(f"key_padding_mask must be torch.bool [{key.shape[0]}, {key.shape[2]}]; got {found}")
    allowed = ~padding[:, None, None]
    if attn_mask is None:
        return allowed
    return attn_mask & allowed if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~allowed, -torch.inf)
