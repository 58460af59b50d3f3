"""Experts found by product keys beside the same from torch.topk and copied rows, and beside a dense perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.case import Peer, Settings, Work, case
from bench.inputs import normal
from spartan.layers import ProductKeyExperts

_DIM, _HEADS, _KEPT, _KEY_DIM = 256, 8, 16, 64
_EXPERTS, _TOKENS = 16_384, 1024
_QUICK_EXPERTS, _QUICK_TOKENS = 4096, 64
_FEW = 16  # tokens of the result that are compared with all experts in float64
_ERROR = 1e-5  # of the largest entry


def _scores(module: ProductKeyExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the two halves, each `[tokens, heads, side]`."""
    assert module.norm is not None
    halves = module.norm(module.query(x)).view(len(x), _HEADS, 2, -1)
    return halves[:, :, 0] @ module.keys[0].T, halves[:, :, 1] @ module.keys[1].T


def _copied(module: ProductKeyExperts, x: Tensor) -> Tensor:
    """The k largest of each half, all sums of these, and copies of the rows that they name."""
    first, second = _scores(module, x)
    (a, of_a), (b, of_b) = first.topk(_KEPT), second.topk(_KEPT)
    scores, best = (a[..., :, None] + b[..., None, :]).flatten(-2).topk(_KEPT)
    indices = of_a.gather(-1, best // _KEPT) * first.shape[-1] + of_b.gather(-1, best % _KEPT)
    hidden = F.gelu(torch.einsum("td,thkd->thk", x, module.down[indices]))
    return torch.einsum("thk,thkd->td", scores.softmax(-1) * hidden, module.up[indices])


def _exact(module: ProductKeyExperts, x: Tensor) -> Tensor:
    """All experts in float64, of which a mask leaves those with the largest of all sums."""
    with torch.no_grad():
        first, second = _scores(module, x)
        sums = (first[..., :, None] + second[..., None, :]).flatten(-2)
        kept = torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, sums.topk(_KEPT).indices, True)
        gates = sums.double().masked_fill(~kept, -torch.inf).softmax(-1).sum(1)
        return (gates * F.gelu(x.double() @ module.down.double().T)) @ module.up.double()


def _work(s: Settings, training: bool) -> Work:
    experts, tokens = (_QUICK_EXPERTS, _QUICK_TOKENS) if s.quick else (_EXPERTS, _TOKENS)
    torch.manual_seed(0)
    module = ProductKeyExperts(_DIM, experts, _HEADS, _KEPT, _KEY_DIM).to(s.device, s.dtype).eval()
    hidden = module.active_parameters() // (2 * _DIM)
    dense = nn.Sequential(nn.Linear(_DIM, hidden), nn.GELU(), nn.Linear(hidden, _DIM)).to(s.device, s.dtype)
    x = normal((tokens, _DIM), s, 1)

    def check(y: Tensor, x: Tensor) -> None:
        exact = _exact(module, x[:_FEW])
        error = float((y[:_FEW] - exact).abs().max() / exact.abs().max())
        if not error <= _ERROR * torch.finfo(s.dtype).eps / torch.finfo(torch.float32).eps:
            raise AssertionError(f"the result is wrong by {error:.1e} of the largest entry")

    def of(model: nn.Module, function: Peer) -> Peer:
        def step(x: Tensor) -> Tensor:
            model.zero_grad()
            y = function(x)
            y.square().mean().backward()
            return y.detach()

        return step if training else torch.no_grad()(function)

    active = module.active_parameters()
    return Work(
        ours=of(module, module.forward),
        operands=[(x,)],
        check=check,
        bytes=2 * x.nbytes + sum(p.nbytes for p in module.parameters()),
        flops=2 * tokens * active * (3 if training else 1),
        peers={
            "torch.topk, copied rows": of(module, lambda x: _copied(module, x)),
            "dense of as many active parameters": of(dense, dense.forward),
        },
        notes={"tokens": tokens, "experts": experts, "kept": _HEADS * _KEPT, "active parameters": active},
    )


@case("layers", "product-key-experts")
def forward(s: Settings) -> Work:
    """Forward."""
    return _work(s, training=False)


@case("layers", "product-key-experts-training")
def training(s: Settings) -> Work:
    """Forward and backward, with dense gradients."""
    return _work(s, training=True)
