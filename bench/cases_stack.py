"""A stack of packed layers against inference engines: four times 768 to 3072 to 768, each with ReLU."""

from __future__ import annotations

import itertools
import time
import warnings

import torch
from torch import Tensor, nn

import spartan
from bench.case import Peer, Settings, Work, case
from bench.inputs import normal
from bench.peers import engines, matmul

_WIDTHS = (768, 3072) * 4 + (768,)
_TOKENS = (128, 2048)
_PATTERNS: dict[str, tuple[tuple[int, int], float]] = {
    "single-90": ((1, 1), 0.9),
    "single-95": ((1, 1), 0.95),
    "4x1-90": ((4, 1), 0.9),
    "32x32-90": ((32, 32), 0.9),
}
_QUICK = ("single-90", 128)
_ERROR = 1e-5  # of the largest entry
_PAUSE = 0.02  # seconds before each call: the threads of the engine before wait actively for a while


def _weights(s: Settings, block: tuple[int, int], sparsity: float) -> list[Tensor]:
    """Random weights with exactly `sparsity` of their blocks zero, scaled so that activations keep their size."""
    weights = []
    for seed, (in_, out) in enumerate(itertools.pairwise(_WIDTHS)):
        grid = (out // block[0], in_ // block[1])
        order = normal(grid, s, 2 * seed).flatten().argsort()
        kept = torch.zeros(grid[0] * grid[1])
        kept[order[: round((1 - sparsity) * len(order))]] = 1
        mask = kept.view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        scale = (2 / (in_ * (1 - sparsity))) ** 0.5
        weights.append(normal((out, in_), s, 2 * seed + 1, scale) * mask)
    return weights


def _sequential(weights: list[Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layers += [layer, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _inference(model: nn.Module) -> Peer:
    return torch.no_grad()(model.forward)


def _stack(s: Settings, block: tuple[int, int], sparsity: float, tokens: int) -> Work:
    weights = _weights(s, block, sparsity)
    x = normal((tokens, _WIDTHS[0]), s, 1000)
    packed = spartan.to_block_sparse(_sequential(weights), block, tokens=tokens)
    with torch.no_grad():
        expected = _sequential([weight.double() for weight in weights])(x.double())

    layers = [matmul.torch_csr(weight, block) for weight in weights]

    def torch_csr(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer.forward(x).relu_()
        return x

    def check(y: Tensor, x: Tensor) -> None:
        error = float((y - expected).abs().max() / expected.abs().max())
        if not error <= _ERROR:
            raise AssertionError(f"the result is wrong by {error:.1e} of the largest entry")

    kept = sum(int(weight.count_nonzero()) for weight in weights)
    return Work(
        ours=_inference(packed),
        operands=[(x,)],
        check=check,
        bytes=(sum(_WIDTHS) * tokens + kept) * s.dtype.itemsize,
        flops=2 * tokens * kept,
        peers={
            "dense": _inference(_sequential(weights)),
            "torch CSR": torch_csr,
            **engines.peers(weights, x, expected.float()),
        },
        notes={"rows": float(tokens), "sparsity": 1 - kept / sum(weight.numel() for weight in weights)},
        prepare=lambda x: time.sleep(_PAUSE),
        seconds=4.0,
    )


def _register(pattern: str, tokens: int) -> None:
    block, sparsity = _PATTERNS[pattern]

    def build(s: Settings) -> Work:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that sparse layouts are in beta
            return _stack(s, block, sparsity, tokens)

    build.__doc__ = (
        f"Eight packed layers, {sparsity:.0%} of their {block[0]} x {block[1]} blocks zero, {tokens} tokens."
    )
    case("stack", f"{pattern}-tokens-{tokens}", quick=(pattern, tokens) == _QUICK)(build)


for _pattern, _tokens in itertools.product(_PATTERNS, _TOKENS):
    _register(_pattern, _tokens)
