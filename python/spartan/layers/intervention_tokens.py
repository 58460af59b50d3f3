"""Learned tokens for interventions whose targets are unknown."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spartan.layers.gated_attention import check_mask

__all__ = ["InterventionTokens"]


class InterventionTokens(nn.Module):
    """A learned token for each intervention, put among the tokens of a set; gates then learn whom it touches.

    An intervention has a number and nothing else: what it does and to whom is not given. For one that was not seen in
    training, freeze the model and train a new `InterventionTokens` alone.

    Args:
        interventions: how many there are, at least 1.
        dim: features of a token.

    Raises:
        ValueError: `interventions` or `dim` below 1.

    Source: Lei, Schoelkopf and Posner, SPARTAN, arXiv 2411.06890.
    """

    def __init__(self, interventions: int, dim: int) -> None:
        super().__init__()
        if interventions < 1 or dim < 1:
            raise ValueError(f"interventions and dim must be at least 1; got {interventions} and {dim}")
        self.tokens = nn.Parameter(torch.randn(interventions, dim) / math.sqrt(dim))

    def forward(self, x: Tensor, which: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append a token to each set.

        Args:
            x: `[..., tokens, dim]`.
            which: number of the intervention, int64 `[...]`; -1 for none, which leaves the token absent.
            mask: floating, `[..., tokens]`, 0 or -inf for absent tokens, or None.

        Returns:
            x `[..., tokens + 1, dim]` and the mask `[..., tokens + 1]` that `GatedAttention` takes.

        Raises:
            ValueError: shapes that do not fit, or a mask that is not floating.
        """
        if x.dim() < 2 or x.shape[-1] != self.tokens.shape[1]:
            raise ValueError(f"x must be [..., tokens, {self.tokens.shape[1]}]; got {list(x.shape)}")
        if which.shape != x.shape[:-2]:
            raise ValueError(f"which must be {list(x.shape[:-2])}, one number per set of x; got {list(which.shape)}")
        if mask is None:
            mask = x.new_zeros(x.shape[:-1])
        else:
            check_mask(mask, x)
        token = self.tokens[which.clamp_min(0)].to(x.dtype).unsqueeze(-2)
        absent = mask.new_zeros(which.shape).masked_fill(which < 0, -math.inf).unsqueeze(-1)
        return torch.cat([x, token], dim=-2), torch.cat([mask, absent], dim=-1)
