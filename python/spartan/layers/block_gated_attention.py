"""Attention to the key blocks that a gate expects most of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spartan.layers.block_gates import BlockGate, block_maxima, distillation
from spartan.layers.flex_blocks import FLEX_BLOCK, attend_flex
from spartan.layers.gathered_blocks import attend_gathered
from spartan.layers.heads import Heads, check_heads, heads_of, projections_of
from spartan.layers.selection import kept_indices

__all__ = ["BlockGatedAttention", "block_gated_attention", "block_maxima"]


def block_gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    k: int,
    block: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Dense attention within the k key blocks of the largest gates, for each block of queries.

    With B(i) the keys of these blocks: y_i = sum_{j in B(i)} softmax_{B(i)}(scale q_i K^T)_j v_j. Where causal, the
    diagonal block is one of the k, and a query block with fewer blocks before it keeps them all.

    The kept blocks are gathered, some at a time, and given to `scaled_dot_product_attention`; the backward gathers
    them again. On a GPU, blocks of a multiple of 128 are the `BlockMask` of FlexAttention instead.

    Args:
        query: `[n, heads, queries, d]`, floating point.
        key: `[n, heads, t, d]`.
        value: `[n, heads, t, d_v]`.
        gates: `[n, heads, query blocks, key blocks]`; only their order counts, so they get no gradient here.
        k: blocks that a query block keeps, at least 1; from the number of key blocks on, attention is dense.
        block: tokens of a block; the last one may be shorter.
        is_causal: query i attends to keys 0 to i; needs as many queries as keys.
        scale: None: 1 / sqrt(d).

    Returns:
        y `[n, heads, queries, d_v]`.

    Raises:
        ValueError: k or block below 1, shapes that do not match.

    Source: Gao et al., "SeerAttention", arXiv:2410.13276.
    """
    check_heads(query, key, value, is_causal)
    queries, keys = query.shape[-2], key.shape[-2]
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1; got k {k}, block {block}")
    shape = (*query.shape[:2], -(-queries // block), -(-keys // block))
    if gates.shape != shape:
        raise ValueError(f"gates must be {list(shape)}; got shape {list(gates.shape)}")
    if k >= shape[3] or not query.numel():
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    gates = gates.detach()
    if query.is_cuda and block % FLEX_BLOCK == 0:
        return attend_flex(query, key, value, gates, k, block, is_causal, scale)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # The first k causal query blocks keep all keys; behind them every block has k to keep, so that shapes are regular.
    dense = k if is_causal else 0
    kept = _kept(gates[:, :, dense:], k, dense if is_causal else None)
    behind = attend_gathered(query[:, :, dense * block :], key, value, kept, block, is_causal, scale)
    if not is_causal:
        return behind
    query, key, value = (x[:, :, : k * block] for x in (query, key, value))
    return torch.cat([F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale), behind], -2)


def _kept(gates: Tensor, k: int, first: int | None) -> Tensor:
    """Kept blocks of rows of gates `[..., k]`; where row 0 is block `first` of causal ones, the diagonal comes last."""
    if first is None:
        return kept_indices(gates, k)
    diagonal = torch.arange(first, gates.shape[-1], device=gates.device)
    diagonal = diagonal[:, None].expand(*gates.shape[:-1], 1)
    if k == 1:
        return diagonal
    later = torch.ones(gates.shape[-2:], dtype=torch.bool, device=gates.device).triu(first)
    return torch.cat([kept_indices(gates.masked_fill(later, -torch.inf), k - 1), diagonal], -1)


class BlockGatedAttention(Heads):
    """Multi-head self-attention over `[n, tokens, dim]` to the k key blocks of the largest gates.

    The gates (`BlockGate`) learn from `distillation_loss` what dense attention does; everything else stays as it is.
    The loss of the model gives them no gradient: where DistributedDataParallel trains that, freeze `gate`.

    Args:
        dim: of input and output, a multiple of `heads`.
        heads: of `dim / heads` features each.
        k: blocks that a query block keeps; None: all of them, dense attention. The attribute may change at any time.
        block: tokens of a block.
        causal: a token attends to itself and those before it.
        bias: whether the linear layers have one.

    Raises:
        ValueError: `dim` no multiple of `heads`, k or block below 1.
    """

    def __init__(
        self, dim: int, heads: int, k: int | None, *, block: int = 64, causal: bool = False, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, bias)
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, or None; got {k}")
        self.k, self.block, self.causal = k, block, causal
        self.gate = BlockGate(heads, dim // heads, block)

    @classmethod
    def from_attention(
        cls, attention: nn.Module, k: int | None, *, block: int = 64, causal: bool | None = None
    ) -> BlockGatedAttention:
        """Copy a trained attention: an `nn.MultiheadAttention`, or layers `query_key_value` and `projection`.

        Args:
            attention: has its number of heads as `num_heads` or `heads`.
            k: as above.
            block: as above.
            causal: None: the attribute `causal` of `attention`, False if it has none.

        Raises:
            TypeError: another kind of module.
        """
        (weight, bias), projection = projections_of(attention)
        heads = heads_of(attention)
        if heads is None:
            raise TypeError(f"attention must have its number of heads as num_heads or heads; got {attention}")
        causal = bool(getattr(attention, "causal", False)) if causal is None else causal
        layer = cls(projection.out_features, heads, k, block=block, causal=causal, bias=bias is not None)
        layer.copy_projections(attention)
        return layer.to(weight.device, weight.dtype).train(attention.training)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x `[n, tokens, dim]`; the same shape."""
        query, key, value = self.split(x)
        if self.k is None:
            return self.join(F.scaled_dot_product_attention(query, key, value, is_causal=self.causal))
        with torch.no_grad():  # the loss of the model gives the gates no gradient
            gates = self.gate(query, key)
        return self.join(block_gated_attention(query, key, value, gates, self.k, self.block, self.causal))

    def distillation_loss(self, x: Tensor) -> Tensor:
        """How far the gates are from the block maxima of dense attention on x `[n, tokens, dim]`: a divergence.

        KL(T || softmax(gates)), T = `block_maxima` divided by its sum along a row; only the gate gets a gradient.
        """
        with torch.no_grad():
            query, key, _ = self.split(x)
        return distillation(self.gate(query, key), block_maxima(query, key, self.block, self.causal), self.causal)

    def extra_repr(self) -> str:
        """Settings that `print` shows."""
        return f"heads={self.heads}, k={self.k}, block={self.block}, causal={self.causal}"
