"""From the logits of tokens to the terms of texts, with the gradient: the largest of each row, exactly k kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import Settings, Work, case
from bench.checks import check_close
from bench.inputs import normal
from spartan.layers import SparseEncoder

_TEXTS, _TOKENS, _VOCABULARY, _TERMS = 16, 32, 30522, 64


class _Given(nn.Module):
    """Gives the logits that it gets."""

    def forward(self, logits: Tensor, attention_mask: Tensor) -> Tensor:
        return logits


def _by_hand(logits: Tensor, mask: Tensor) -> Tensor:
    """As the papers write it, and then `torch.topk`."""
    weights = (logits.relu().log1p() * mask[..., None]).amax(1)
    values, indices = weights.topk(_TERMS, -1)
    return torch.zeros_like(weights).scatter(-1, indices, values)


def _all_terms(logits: Tensor, mask: Tensor) -> Tensor:
    return (logits.relu().log1p() * mask[..., None]).amax(1)


@case("layers", "sparse-encoder")
def _terms(s: Settings) -> Work:
    """16 texts of 32 tokens over 30,522 terms, 64 kept; forward and backward."""
    texts = _TEXTS // 4 if s.quick else _TEXTS
    mask = torch.arange(_TOKENS, device=s.device) < torch.arange(texts, device=s.device)[:, None] + _TOKENS // 2
    shape = (texts, _TOKENS, _VOCABULARY)
    operands = [(normal(shape, s, 0), normal((texts, _VOCABULARY), s, 1))]

    def passes(layer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def run(logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
            leaf = logits.detach().requires_grad_()
            weights = layer(leaf, mask)
            return weights.detach(), torch.autograd.grad(weights, leaf, upstream)[0]

        return run

    def check(found: tuple[Tensor, Tensor], logits: Tensor, upstream: Tensor) -> None:
        expected = passes(_by_hand)(logits.double(), upstream.double())
        for mine, theirs in zip(found, expected, strict=True):
            check_close(mine, theirs, theirs.to(s.dtype), 1e-6)

    return Work(
        ours=passes(SparseEncoder(_Given(), terms=_TERMS)),
        operands=operands,
        check=check,
        bytes=(2 * texts * _TOKENS + 2 * texts) * _VOCABULARY * s.dtype.itemsize,
        peers={"by hand, torch.topk": passes(_by_hand), "all terms": passes(_all_terms)},
    )
