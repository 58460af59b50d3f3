"""A sparse autoencoder, forward and backward: encoder, the k largest codes, decoder and the gradients of all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Settings, Work, case
from bench.checks import check_close
from bench.inputs import normal
from spartan.layers import TopKAutoencoder

_ROWS, _WIDTH, _FEATURES, _K = 512, 384, 3072, 16


def _codes(x: Tensor, center: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x - center, encoder, bias).relu()


def _dense(x: Tensor, center: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor) -> Tensor:
    """Codes with zeros, by `torch.topk` and scatter, and a dense decoder."""
    z = _codes(x, center, encoder, bias)
    values, features = z.topk(_K, dim=1)
    return torch.zeros_like(z).scatter(1, features, values) @ decoder + center


def _gathered(x: Tensor, center: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor) -> Tensor:
    """`torch.topk`, and the decoder's kept rows gathered."""
    values, features = _codes(x, center, encoder, bias).topk(_K, dim=1, sorted=False)
    return (values[..., None] * decoder[features]).sum(1) + center


def _batch(x: Tensor, center: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor) -> Tensor:
    """`torch.topk` of all codes of the batch, and a dense decoder."""
    z = _codes(x, center, encoder, bias).flatten()
    values, places = z.topk(_K * len(x))
    return torch.zeros_like(z).scatter(0, places, values).view(len(x), -1) @ decoder + center


def _case(s: Settings, by: str, peers: dict[str, Callable[..., Tensor]]) -> Work:
    rows = _ROWS // 8 if s.quick else _ROWS
    layer = TopKAutoencoder(_WIDTH, _FEATURES, _K, by=by, revive=0).to(s.device, s.dtype)  # type: ignore[arg-type]
    operands = [(normal((rows, _WIDTH), s, i), normal((rows, _WIDTH), s, i + 1)) for i in (0, 2)]

    def passes(call: Callable[..., Tensor], wide: bool = False) -> Callable[[Tensor, Tensor], list[Tensor]]:
        dtype = torch.float64 if wide else s.dtype
        parameters = [p.detach().to(dtype).requires_grad_() for p in layer.parameters()]

        def run(x: Tensor, upstream: Tensor) -> list[Tensor]:
            found = call(x, *parameters)
            return [found.detach(), *torch.autograd.grad(found, parameters, upstream)]

        return run

    def ours(x: Tensor, upstream: Tensor) -> list[Tensor]:
        found = layer(x)
        return [found.detach(), *torch.autograd.grad(found, list(layer.parameters()), upstream)]

    def check(found: list[Tensor], x: Tensor, upstream: Tensor) -> None:
        by_hand = next(iter(peers.values()))
        plain, exact = passes(by_hand)(x, upstream), passes(by_hand, wide=True)(x.double(), upstream.double())
        for mine, theirs, right in zip(found, plain, exact, strict=True):
            check_close(mine, right, theirs, 8 * torch.finfo(s.dtype).eps * right.abs().max())

    products = 2 * rows * _WIDTH * (3 * _FEATURES + 3 * _K)  # the encoder's, for x - c too, and the decoder's
    size = s.dtype.itemsize
    return Work(
        ours=ours,
        operands=operands,
        check=check,
        bytes=size * (4 * _FEATURES * _WIDTH + 3 * rows * _WIDTH),
        flops=products,
        peers={name: passes(call) for name, call in peers.items()},
    )


@case("layers", "topk-autoencoder-rows")
def _rows(s: Settings) -> Work:
    """512 rows of 384, 3072 features, 16 kept of each; forward and backward."""
    return _case(s, "row", {"torch.topk, dense decoder": _dense, "torch.topk, gathered decoder": _gathered})


@case("layers", "topk-autoencoder-batch")
def _of_a_batch(s: Settings) -> Work:
    """The same with 16 kept of a row on average."""
    return _case(s, "batch", {"torch.topk, dense decoder": _batch})
