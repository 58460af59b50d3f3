"""Attention through sampled gates, forward and backward, beside one written by hand and dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import Settings, Work, case
from bench.inputs import normal
from spartan.layers import GatedAttention, path_sparsity

_SETS, _TOKENS, _DIM, _HEADS = 256, 32, 64, 4
_WEIGHT = 0.1  # of the penalty in the loss
_ERROR = 1e-4  # of the largest entry

Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@case("layers", "gated-attention")
def gated_attention(s: Settings) -> Work:
    """A layer with its path sparsity, forward and backward: 256 sets of 32 tokens of 64 features, 4 heads."""
    torch.manual_seed(0)
    factory = {"device": s.device, "dtype": s.dtype}
    layer = GatedAttention(_DIM, _HEADS, openness=0.0).to(**factory)
    multihead = nn.MultiheadAttention(_DIM, _HEADS, batch_first=True).to(**factory)
    sets = 16 if s.quick else _SETS
    x, along = (normal((sets, _TOKENS, _DIM), s, seed).requires_grad_(seed == 0) for seed in (0, 1))

    def peer(forward: Forward, module: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
        inputs = [x, *module.parameters()]

        def call(x: Tensor) -> tuple[Tensor, ...]:
            y, gates = forward(x)
            loss = (y * along).sum()
            if gates is not None:
                loss = loss + _WEIGHT * path_sparsity([gates])
            return y, *([] if gates is None else [gates]), *torch.autograd.grad(loss, inputs, allow_unused=True)

        return call

    def check(result: tuple[Tensor, ...], x: Tensor) -> None:
        _check(layer, result, x, along)

    area = sets * _TOKENS * _DIM
    return Work(
        ours=peer(layer, layer),
        operands=[(x,)],
        check=check,
        bytes=(4 * area + 2 * sets * _TOKENS**2) * s.dtype.itemsize,
        flops=3 * 2 * area * (6 * _DIM + 3 * _TOKENS),
        peers={
            "by hand": peer(lambda x: _by_hand(layer, x), layer),
            "dense, SDPA": peer(lambda x: (_dense(layer, x), None), layer),
            "dense, nn.MultiheadAttention": peer(lambda x: multihead(x, x, x, need_weights=False), multihead),
        },
        notes={"open": float(layer(x.detach())[1].detach().mean()), "rows": float(sets)},
        seconds=4.0,
    )


def _heads(layer: GatedAttention, x: Tensor) -> tuple[Tensor, ...]:
    split = layer.project(x).view(*x.shape[:-1], 3, layer.heads, -1)
    return split.permute(2, 0, 3, 1, 4).unbind()


def _dense(layer: GatedAttention, x: Tensor) -> Tensor:
    read = nn.functional.scaled_dot_product_attention(*_heads(layer, x))
    y: Tensor = layer.out(read.transpose(1, 2).flatten(-2))
    return y


def _by_hand(layer: GatedAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates as factors of the exponentials: gradients by differentiating the quotient."""
    score = layer.gate_scores(x)
    uniform = torch.rand_like(score).clamp(1e-6, 1 - 1e-6)
    relaxed = torch.sigmoid(score + torch.logit(uniform))
    gates = (relaxed > 0.5).to(x.dtype) + relaxed - relaxed.detach()
    queries, keys, values = _heads(layer, x)
    logits = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    weights = gates.unsqueeze(1) * torch.exp(logits - logits.amax(-1, keepdim=True))
    read = weights @ values / weights.sum(-1, keepdim=True).clamp_min(1e-6)
    return layer.out(read.transpose(1, 2).flatten(-2)), gates


def _check(layer: GatedAttention, result: tuple[Tensor, ...], x: Tensor, along: Tensor) -> None:
    """y and the gradients of the projections, in float64 for the gates that were sampled.

    Raises:
        AssertionError: where they differ, or gates are no zeros and ones.
    """
    y, gates = result[0], result[1]
    if not bool(((gates == 0) | (gates == 1)).all()) or not 0 < float(gates.mean()) < 1:
        raise AssertionError("gates are zeros and ones, and some of both")
    weights = [layer.project.weight, layer.project.bias, layer.out.weight]
    project, bias, out = (w.detach().double().requires_grad_() for w in weights)
    split = nn.functional.linear(x.detach().double(), project, bias).view(*x.shape[:-1], 3, layer.heads, -1)
    queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind()
    masked = gates.detach().double().log().unsqueeze(1)
    logits = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1]) + masked
    read = torch.nan_to_num(logits).softmax(-1) * (gates > 0).unsqueeze(1) @ values
    expected = read.transpose(1, 2).flatten(-2) @ out.T
    gradients = torch.autograd.grad((expected * along).sum(), [project, bias, out])
    names = [name for name, _ in layer.named_parameters()]
    found = [result[3 + names.index(name)] for name in ("project.weight", "project.bias", "out.weight")]
    for ours, reference in zip([y, *found], [expected, *gradients], strict=True):
        error = float((ours - reference).abs().max() / reference.abs().max())
        if not error <= (_ERROR if ours.dtype == torch.float32 else 0.05):
            raise AssertionError(f"the result is wrong by {error:.1e} of the largest entry")
