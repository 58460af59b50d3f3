"""Memories of two levels: children gathered for each token, and all multiplied and masked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import Settings, Work, case
from bench.checks import check_close
from bench.inputs import normal
from spartan.layers import HierarchicalMemory

_WIDTH, _CHILDREN, _KEPT, _TOKENS = 384, 4, 4, 768
_SECONDS = 2.0


def _by_hand(memory: HierarchicalMemory, x: Tensor) -> Tensor:
    """What a user writes: topk, and indexing with it."""
    shares, kept = (x @ memory.parent_keys.T).topk(memory.kept)
    within = torch.einsum("td,tkcd->tkc", x, memory.child_keys[kept]).softmax(-1)
    return x + torch.einsum("tkc,tkcd->td", shares.softmax(-1)[..., None] * within, memory.cells[kept])


def _dense(memory: HierarchicalMemory, x: Tensor) -> Tensor:
    """All parents kept: another function, and what the choice saves."""
    shares = (x @ memory.parent_keys.T).softmax(-1)
    within = torch.einsum("td,pcd->tpc", x, memory.child_keys).softmax(-1)
    return x + torch.einsum("tpc,pcd->td", shares[..., None] * within, memory.cells)


def _memory(s: Settings, parents: int) -> HierarchicalMemory:
    memory = HierarchicalMemory(_WIDTH, parents, _CHILDREN, _KEPT).to(s.device, s.dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(memory.parameters()):
            parameter.copy_(normal(parameter.shape, s, 10 + seed, _WIDTH**-0.5))
    return memory


def _work(s: Settings, parents: int) -> Work:
    memory = _memory(s, parents)
    tokens = _TOKENS // 8 if s.quick else _TOKENS
    operands = [(normal((tokens, _WIDTH), s, i), normal((tokens, _WIDTH), s, 100 + i)) for i in range(3)]
    weights = list(memory.parameters())

    def passes(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        def run(x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
            leaf = x.requires_grad_()
            y = layer(leaf)
            return y.detach(), *torch.autograd.grad(y, (leaf, *weights), upstream)

        return run

    def check(found: tuple[Tensor, ...], x: Tensor, upstream: Tensor) -> None:
        exact = copy.deepcopy(memory).double()
        leaf = x.detach().double().requires_grad_()
        y = _by_hand(exact, leaf)
        expected = (y.detach(), *torch.autograd.grad(y, (leaf, *exact.parameters()), upstream.double()))
        for mine, theirs in zip(found, expected, strict=True):
            check_close(mine, theirs, theirs.to(s.dtype), 1e-4 * float(theirs.abs().max()))

    def other(gather: bool) -> nn.Module:
        layer = copy.copy(memory)  # on the same weights
        layer.gather = gather
        return layer

    return Work(
        ours=passes(memory),
        operands=operands,
        check=check,
        bytes=(5 * tokens * _WIDTH + 2 * sum(weight.numel() for weight in weights)) * s.dtype.itemsize,
        flops=6 * tokens * other(True).multiply_adds,
        peers={
            "gathered": passes(other(True)),
            "masked": passes(other(False)),
            "topk and indexing": passes(lambda x: _by_hand(memory, x)),
            "all parents kept": passes(lambda x: _dense(memory, x)),
        },
        notes={
            "multiply-adds, gathered": float(other(True).multiply_adds),
            "multiply-adds, masked": float(other(False).multiply_adds),
        },
        seconds=_SECONDS,
    )


def _register(parents: int) -> None:
    def build(s: Settings) -> Work:
        return _work(s, parents)

    build.__doc__ = f"A memory of {parents} parents of {_CHILDREN} cells, {_KEPT} kept; forward and backward."
    case("layers", f"hierarchical-memory-{parents}-parents", quick=parents == 32)(build)


for _parents in (32, 512):
    _register(_parents)
