"""Attention whose pairs of tokens are predicted before their scores are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spartan.functional import soft_topk
from spartan.layers.gathered import attention_at_kept
from spartan.layers.heads import Heads
from spartan.layers.selection import kept_indices

__all__ = ["ConnectivityAttention"]


class ConnectivityAttention(Heads):
    """Self-attention that scores only the k keys of each query that a predictor of low rank finds connected.

        L = softmax(Q (D K)^T / sqrt(d))        [tokens, rank], by head
        C = L (U * h),  h the `basis` largest abs(U) of each column
        i_q = the k largest of row q of C
        y_q = sum over j in i_q of softmax_j(<q_q, k_j> / sqrt(d)) v_j

    D `[rank, tokens]` mixes keys, U `[rank, tokens]` is a sparse basis of rows of C. At first D averages neighbouring
    tokens and U spreads the attention to an average over them, so that a query keeps keys of groups it attends to.

    Selecting has no gradient. In training m - m.detach(), with m = soft_topk(C) by rows, is added to the scores.
    Outputs stay those above; D, U, Q and K get the gradient that a factor m at each kept pair would have, and h that
    of a soft mask. With one key for a query these gradients are 0.

    Args:
        dim: width of a token.
        heads: must divide `dim`.
        tokens: how many tokens an input has.
        keep: k as an int, or the share of the tokens as a float in (0, 1], which is rounded to at least one.
        rank: rows of D and U, from 1 to `tokens`.
        basis: entries of U that stay for each token, from 1 to `rank`.
        beta: sharpness of m in training, above 0; C has entries around 1 / rank.
        bias: whether the projections have biases.

    Raises:
        ValueError: a setting out of its range; an input of another shape.

    Source: Wei, Duke, Jiang, Aarabi, Taylor, Shkurti, "Sparsifiner", CVPR 2023, which trains the predictor otherwise.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        keep: int | float = 0.25,
        rank: int = 8,
        basis: int = 2,
        beta: float = 20.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, bias)
        for name, number, most in (("rank", rank, tokens), ("basis", basis, rank)):
            if not 1 <= number <= most:
                raise ValueError(f"{name} must be from 1 to {most}; got {number}")
        if not beta > 0:
            raise ValueError(f"beta must be above 0; got {beta}")
        self.dim, self.tokens, self.rank, self.basis, self.beta = dim, tokens, rank, basis, beta
        self.k = _count(keep, tokens)
        group = torch.arange(tokens) * rank // tokens
        member = nn.functional.one_hot(group, rank).T.to(torch.get_default_dtype())
        self.down = nn.Parameter(member / member.sum(-1, keepdim=True))
        self.up = nn.Parameter(member + 0.02 * torch.randn(rank, tokens))

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend, then project.

        Args:
            x: `[n, tokens, dim]`.
            key_padding_mask: `[n, tokens]` bool, True for tokens that no query keeps; each row leaves one at least.

        Returns:
            `[n, tokens, dim]`.
        """
        self._check(x, key_padding_mask)
        query, key, value = self.split(x)
        padded = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        connectivity = self.connectivity(query, key if padded is None else key.masked_fill(padded.mT, 0))
        connectivity = connectivity.to(torch.promote_types(connectivity.dtype, torch.float32))
        if padded is not None:
            connectivity = connectivity.masked_fill(padded, -torch.inf)
        indices = kept_indices(connectivity.detach(), self.k)
        bias = self._soft_bias(connectivity, indices, padded is not None)
        if padded is not None:
            left_out = padded.expand(connectivity.shape).gather(-1, indices)
            bias = torch.where(left_out, -torch.inf, 0.0 if bias is None else bias)
        return self.join(attention_at_kept(query, key, value, indices, bias))

    def connectivity(self, query: Tensor, key: Tensor) -> Tensor:
        """C `[n, heads, tokens, tokens]` from queries and keys `[n, heads, tokens, d]`."""
        low = (query @ (self.down @ key).mT * query.shape[-1] ** -0.5).softmax(-1)
        kept = soft_topk(self.up.abs(), float(self.basis), dim=0, straight_through=True)
        return low @ (self.up * kept)

    def flops(self) -> dict[str, int]:
        """Floating point operations for one input, a multiplication and an addition as two; selecting has none.

        Returns:
            "projections", "predictor" (D K, L, and C from the kept entries of U) and "attention" (scores and values of
            the kept pairs). Where `attention_at_kept` takes its dense form, it multiplies all pairs.
        """
        tokens, dim = self.tokens, self.dim
        upward = self.heads * tokens * self.basis * tokens
        return {
            "projections": 8 * tokens * dim * dim,
            "predictor": 2 * (2 * self.rank * tokens * dim + upward),
            "attention": 4 * tokens * self.k * dim,
        }

    def extra_repr(self) -> str:
        """Settings in the module's description."""
        return f"heads={self.heads}, tokens={self.tokens}, k={self.k}, rank={self.rank}, basis={self.basis}"

    def _soft_bias(self, connectivity: Tensor, indices: Tensor, padded: bool) -> Tensor | None:
        """Zeros with the gradient of log m at the kept pairs, where m is 1; None where no gradient is wanted."""
        if not (torch.is_grad_enabled() and connectivity.requires_grad):
            return None
        budget = (
            (connectivity > -torch.inf).sum(-1).clamp(max=self.k).to(connectivity.dtype) if padded else float(self.k)
        )
        soft = soft_topk(connectivity, budget, beta=self.beta).gather(-1, indices)
        return soft - soft.detach()

    def _check(self, x: Tensor, key_padding_mask: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[1:] != (self.tokens, self.dim):
            raise ValueError(f"x must be [n, {self.tokens}, {self.dim}]; got {list(x.shape)}")
        if key_padding_mask is not None and (
            key_padding_mask.shape != x.shape[:2] or key_padding_mask.dtype != torch.bool
        ):
            raise ValueError(
                f"key_padding_mask must be bool {list(x.shape[:2])}; got {key_padding_mask.dtype} "
                f"{list(key_padding_mask.shape)}"
            )


def _count(keep: int | float, tokens: int) -> int:
    share = isinstance(keep, float)
    if not (0 < keep <= 1 if share else 1 <= keep <= tokens):
        raise ValueError(f"keep must be an int from 1 to {tokens}, or a float in (0, 1]; got {keep!r}")
    return max(1, round(keep * tokens)) if share else int(keep)
