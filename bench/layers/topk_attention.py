"""Attention to the k largest scores, forward and backward, beside dense attention and what is written by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Settings, Work, case
from bench.layers.attention import Causal, causal_scores
from spartan.layers import topk_attention

_HEADS, _TOKENS, _DIM = 4, 1024, 64


def _masked(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    """From torch.topk and scatter: all other scores become -inf."""
    scores = causal_scores(query, key)
    found = scores.topk(k)
    kept = torch.full_like(scores, -torch.inf).scatter(-1, found.indices, found.values)
    return kept.softmax(-1) @ value


def _gathered(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    """From torch.topk and gather: the kept values alone."""
    found = causal_scores(query, key).topk(k)
    indices = found.indices.flatten(2).unsqueeze(-1).expand(-1, -1, -1, value.shape[-1])
    kept = value.gather(2, indices).unflatten(2, (-1, k))
    return (found.values.softmax(-1).unsqueeze(-2) @ kept).squeeze(-2)


def _register(k: int) -> None:
    def build(s: Settings) -> Work:
        tokens = 128 if s.quick else _TOKENS

        def kept(query: Tensor, key: Tensor) -> Tensor:
            scores = causal_scores(query, key)
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)
            return chosen & (scores > -torch.inf)

        pairs = sum(min(k, token + 1) for token in range(tokens))
        return Causal(_HEADS, tokens, _DIM, kept, pairs).work(
            s,
            lambda *operands: topk_attention(*operands, k, is_causal=True),
            {
                "torch.topk and scatter": lambda *operands: _masked(*operands, k),
                "torch.topk and gather": lambda *operands: _gathered(*operands, k),
            },
            {"k": float(k), "tokens": float(tokens)},
        )

    build.__doc__ = f"Causal attention over 1024 tokens, 4 heads of 64, to the {k} keys of the largest scores."
    case("layers", f"topk-attention-{k}-of-1024")(build)


for _k in (8, 64):
    _register(_k)
