"""Attention between tokens through learned binary gates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["GatedAttention"]


class GatedAttention(nn.Module):
    """Attention in which a binary gate for each pair of tokens decides whether one reads the other.

    With queries q, keys k, values v of the tokens, and a score c that is learned between them:

        c_ij = (G x_i) . (H x_j) / sqrt(dim) + b
        A_ij = [c_ij + logistic noise > 0]               in training, a sample of Bernoulli(sigmoid(c_ij))
        A_ij = [c_ij > 0]                                in evaluation
        s_ij = q_i . k_j / sqrt(dim / heads)
        y_i  = W sum_j A_ij exp(s_ij) v_j / sum_j A_ij exp(s_ij)

    A token with no open gate receives zero. All heads share the gates, so that A is one graph of the tokens. The
    gradient of A_ij is what y changes by when that gate alone is switched; it reaches c through the slope of
    sigmoid((c + noise) / temperature), the binary concrete relaxation of the gate (straight-through).

    Args:
        dim: features of a token.
        heads: of the attention; a divisor of `dim`.
        temperature: of the relaxation, above 0.
        openness: b at the start; at 2, gates are open with a probability of about 0.88.
        places: also learn a score for each pair among this many places, the same for all inputs (SwinBERT's mask).

    Raises:
        ValueError: `dim`, `heads`, `temperature` or `places` out of range.

    Source: Lei, Schoelkopf and Posner, SPARTAN: A Sparse Transformer Learning Local Causation, arXiv 2411.06890; the
    score for each pair of places: Lin et al., SwinBERT, arXiv 2111.13196.
    """

    def __init__(
        self, dim: int, heads: int = 1, *, temperature: float = 1.0, openness: float = 2.0, places: int | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"dim must be a positive multiple of heads; got dim {dim} and heads {heads}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {temperature}")
        if places is not None and places < 1:
            raise ValueError(f"places must be at least 1, or None; got {places}")
        self.dim, self.heads, self.temperature = dim, heads, temperature
        self.project = nn.Linear(dim, 3 * dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.openness = nn.Parameter(torch.tensor(float(openness)))
        self.places = None if places is None else nn.Parameter(torch.zeros(places, places))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend among the tokens of each set.

        Args:
            x: `[..., tokens, dim]`.
            mask: floating, `[..., tokens]`, 0 for a token that is there and -inf for one that is absent: its gates
                are closed in both directions. None: all are there.

        Returns:
            y `[..., tokens, dim]`, and the gates A `[..., tokens, tokens]` of zeros and ones in float32 (float64 for
            float64 scores), with gradient: A[..., i, j] = 1 where token i reads token j.

        Raises:
            ValueError: shapes that do not fit, or a mask that is not floating.
        """
        present = self._present(x, mask)
        score = self.gate_scores(x)
        gates = self._sampled(score).masked_fill(~present, 0)
        queries, keys, values = (_split(part, self.heads) for part in self.project(x).chunk(3, dim=-1))
        logits = queries @ keys.transpose(-1, -2) / math.sqrt(self.dim // self.heads)
        read = _GatedSoftmax.apply(logits, values, gates.unsqueeze(-3))
        y: Tensor = self.out(read.transpose(-2, -3).flatten(-2))
        return y, gates

    def gate_scores(self, x: Tensor) -> Tensor:
        """Return c `[..., tokens, tokens]`: the logit of the probability that token i reads token j."""
        reads, is_read = self.gate(x).chunk(2, dim=-1)
        score = reads @ is_read.transpose(-1, -2) / math.sqrt(self.dim) + self.openness
        return score if self.places is None else score + self.places

    def _sampled(self, score: Tensor) -> Tensor:
        score = score if score.dtype == torch.float64 else score.float()
        if self.training:
            uniform = torch.rand_like(score)
            tiny = torch.finfo(score.dtype).tiny
            score = score + torch.log(uniform.clamp_min(tiny)) - torch.log1p(-uniform)
        relaxed = torch.sigmoid(score / self.temperature)
        return (relaxed - relaxed.detach()) + (score > 0).to(score.dtype)

    def _present(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Pairs of tokens that are both there, bool `[..., tokens, tokens]`."""
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [..., tokens, {self.dim}]; got {list(x.shape)}")
        tokens = x.shape[-2]
        if self.places is not None and self.places.shape[0] != tokens:
            raise ValueError(f"x must have the {self.places.shape[0]} tokens of places; got {tokens}")
        if mask is None:
            return torch.ones(tokens, tokens, dtype=torch.bool, device=x.device)
        check_mask(mask, x)
        there = mask > torch.finfo(mask.dtype).min
        return there.unsqueeze(-1) & there.unsqueeze(-2)

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"dim={self.dim}, heads={self.heads}, temperature={self.temperature:g}"


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Refuse a mask that is not floating, or not `[..., tokens]` for x `[..., tokens, dim]`."""
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {list(x.shape[:-1])}, one entry per token of x; got {list(mask.shape)}")
    if not mask.is_floating_point():
        raise ValueError(f"mask must be floating, 0 or -inf where a token is absent; got {mask.dtype}")


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _weights(masked: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each row and the logarithm of its sum; a row that is all -inf has weights 0 and the least number."""
    largest = masked.amax(-1, keepdim=True).clamp_min(torch.finfo(masked.dtype).min)
    weights = (masked - largest).exp()
    total = weights.sum(-1, keepdim=True).clamp_min(1)
    return weights / total, largest + total.log()


class _GatedSoftmax(torch.autograd.Function):
    """Softmax over the open gates times values, and to each gate the gradient of what its switch changes.

    As a function of one gate A_j alone, the result o is o(closed) + A_j (o(open) - o(closed)): that difference is the
    slope. With w the weight of an open gate it is w / (1 - w) (v_j - o); for a closed gate it is p (v_j - o), where p
    is the weight that it would have. Where w is near 1, v_j - o is all rounding. So for the gate of the largest weight
    o(closed) is computed.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor, gates: Tensor) -> Tensor:
        opened = gates > 0
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights, normaliser = _weights(logits.masked_fill(~opened, -math.inf))
        output = weights.to(values.dtype) @ values
        ctx.save_for_backward(logits, normaliser, weights, values, opened, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, normaliser, weights, values, opened, output = ctx.saved_tensors
        along = grad @ values.transpose(-1, -2)  # what a unit of weight on v_j is worth
        gain = along - (grad * output).sum(-1, keepdim=True)
        of_gates = None
        if ctx.needs_input_grad[2]:
            # w / (1 - w) = 1 / (z - 1) and p = 1 / (z + 1), with z = exp(normaliser - logit)
            rest = (normaliser - logits).exp() + torch.where(opened, -1.0, 1.0)
            masked = logits.masked_fill(~opened, -math.inf)
            top = torch.zeros_like(masked, dtype=torch.bool).scatter(-1, masked.argmax(-1, keepdim=True), True) & opened
            closed = _weights(masked.masked_fill(top, -math.inf))[0].to(values.dtype) @ values
            of_top = (grad * (output - closed)).sum(-1, keepdim=True)
            of_gates = torch.where(top, of_top, gain / torch.where(top, 1.0, rest))
            of_gates = of_gates.sum(-3, keepdim=True).to(logits.dtype)
        return (weights * gain).to(grad.dtype), weights.to(grad.dtype).transpose(-1, -2) @ grad, of_gates
