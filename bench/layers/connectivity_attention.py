"""Attention at predicted pairs beside attention at all pairs, and beside what is written from torch.topk by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Peer, Settings, Work, case
from bench.inputs import normal
from spartan.layers import ConnectivityAttention

_DIM, _HEADS, _RANK = 128, 4, 16
_IMAGES, _TOKENS, _KEPT = 4, 1024, 32
_QUICK_IMAGES, _QUICK_TOKENS = 2, 196
_ERROR = 1e-5  # of the largest entry


def _dense(module: ConnectivityAttention, x: Tensor) -> Tensor:
    return module.join(F.scaled_dot_product_attention(*module.split(x)))


def _gathered(module: ConnectivityAttention, x: Tensor) -> Tensor:
    """Copies of the kept keys and values, whose predictor gets no gradient."""
    query, key, value = module.split(x)
    indices = module.connectivity(query, key).topk(module.k).indices
    at = indices[..., None].expand(*indices.shape, query.shape[-1])
    keys, values = (t[:, :, None].expand(*at.shape[:3], *t.shape[2:]).gather(3, at) for t in (key, value))
    shares = (torch.einsum("nhqd,nhqkd->nhqk", query, keys) * query.shape[-1] ** -0.5).softmax(-1)
    return module.join(torch.einsum("nhqk,nhqkd->nhqd", shares, values))


def _masked(module: ConnectivityAttention, x: Tensor) -> Tensor:
    """Products of all pairs and a mask of the kept ones, whose predictor gets no gradient."""
    query, key, value = module.split(x)
    connectivity = module.connectivity(query, key).detach()
    mask = torch.zeros_like(connectivity, dtype=torch.bool).scatter_(-1, connectivity.topk(module.k).indices, True)
    return module.join(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def _trained(forward: Peer, module: ConnectivityAttention) -> Peer:
    def step(x: Tensor) -> Tensor:
        module.zero_grad()
        y = forward(x)
        y.square().mean().backward()
        return y.detach()

    return step


def _work(s: Settings, training: bool) -> Work:
    images, tokens = (_QUICK_IMAGES, _QUICK_TOKENS) if s.quick else (_IMAGES, _TOKENS)
    torch.manual_seed(0)
    module = ConnectivityAttention(_DIM, _HEADS, tokens, keep=_KEPT, rank=_RANK).to(s.device, s.dtype)
    x = normal((images, tokens, _DIM), s, 1)

    def check(y: Tensor, x: Tensor) -> None:
        with torch.no_grad():
            query, key, value = module.split(x)
            kept = module.connectivity(query, key).topk(module.k).indices
            scores = (query.double() @ key.double().mT) * query.shape[-1] ** -0.5
            mask = torch.full_like(scores, -torch.inf).scatter_(-1, kept, 0)
            attended = ((scores + mask).softmax(-1) @ value.double()).transpose(1, 2).flatten(2)
            exact = F.linear(attended, module.projection.weight.double(), module.projection.bias.double())
        error = float((y - exact).abs().max() / exact.abs().max())
        if not error <= _ERROR * torch.finfo(s.dtype).eps / torch.finfo(torch.float32).eps:
            raise AssertionError(f"the result is wrong by {error:.1e} of the largest entry")

    def of(function: Peer) -> Peer:
        def forward(x: Tensor) -> Tensor:
            return function(module, x)

        return _trained(forward, module) if training else torch.no_grad()(forward)

    counts = module.flops()
    return Work(
        ours=of(lambda module, x: module(x)),
        operands=[(x,)],
        check=check,
        bytes=2 * x.nbytes + sum(p.nbytes for p in module.parameters()),
        flops=images * sum(counts.values()) * (3 if training else 1),
        peers={"all pairs": of(_dense), "torch.topk, gather": of(_gathered), "torch.topk, mask": of(_masked)},
        notes={"tokens": tokens, "kept": _KEPT, "rank": _RANK},
    )


@case("layers", "connectivity-attention")
def forward(s: Settings) -> Work:
    """Forward."""
    return _work(s, training=False)


@case("layers", "connectivity-attention-training")
def training(s: Settings) -> Work:
    """Forward and backward; ours alone trains its predictor."""
    return _work(s, training=True)
