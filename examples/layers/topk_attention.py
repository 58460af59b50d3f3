"""A language model of bytes whose queries attend to k keys: bits per byte, and the time of the attention, by k.

The text is Python's standard library; the second half of each context quotes the first, so that attention has
something to find.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from byte_model import QuotingTask, bits_per_byte, byte_model, text, train
from study import Record, Study, means, options
from torch import Tensor, nn
from torch.nn import functional as F

from spartan.layers import TopKAttention, topk_attention

CONTEXT, DIM, HEADS, BETA = 128, 64, 2, 4.0
SIZES = (4, 8, 16, 32)


def attention(kind: str, k: int | tuple[int, ...] | None) -> nn.Module | None:
    """The attention layer of a row of the table; None: dense, the model's own."""
    if k is None:
        return None
    return TopKAttention(DIM, HEADS, k, causal=True, beta=BETA if kind == "soft" else None)


def bits(kind: str, k: int | tuple[int, ...] | None, seed: int, steps: int, quick: bool) -> float:
    """Train a model and evaluate it."""
    torch.manual_seed(seed)
    task = QuotingTask(text(quick), CONTEXT)
    model = byte_model(CONTEXT, DIM, 1, HEADS)
    layer = attention(kind, k)
    if layer is not None:
        model.layers[0].attention = layer
    train(task, model, model.parameters(), steps, 16, seed, 4e-3)
    return bits_per_byte(task, model)


def name(k: int | tuple[int, ...] | None) -> str:
    """How the table calls it."""
    return "all" if k is None else str(k) if isinstance(k, int) else ", ".join(map(str, k))


def times(settings: Sequence[tuple[str, Any]], quick: bool) -> list[float]:
    """Median time of forward and backward as a multiple of dense attention's, runs in turn."""
    tokens = 128 if quick else 1024
    operands = [torch.randn(1, 8, tokens, 64, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(1, 8, tokens, 64)

    def call(kind: str, k: Any) -> Callable[[], Tensor]:
        if k is None:
            return lambda: F.scaled_dot_product_attention(*operands, is_causal=True)
        return lambda: topk_attention(*operands, k, is_causal=True, beta=BETA if kind == "soft" else None)

    calls = [call(kind, k) for kind, k in settings]
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(2 if quick else 12):
        for seconds, run in zip(taken, calls, strict=True):
            begin = time.perf_counter()
            torch.autograd.grad(run(), operands, upstream)
            seconds.append(time.perf_counter() - begin)
    medians = [statistics.median(seconds[1:]) for seconds in taken]
    return [median / medians[0] for median in medians]


def draw(axes: Any, records: Sequence[Record]) -> None:
    """Bits per byte by k, one line for each kind; dense attention and the mixture as levels."""
    for kind, style in (("hard", "o-"), ("soft", "s--")):
        own = [str(k) for k in SIZES if any(r["kind"] == kind and r["k"] == str(k) for r in records)]
        axes.plot(own, [means(records, "bits", kind=kind, k=k) for k in own], style, label=kind)
    for kind, style in (("dense", "-"), ("hard, mixed", ":")):
        axes.axhline(means(records, "bits", kind=kind), color="0.4", linestyle=style, label=kind)
    axes.set(xlabel=f"keys of a query, of {CONTEXT}", ylabel="bits per byte, lower is better")
    axes.legend()


def main() -> None:
    """Train every setting with every seed; measure the times once."""
    chosen = options(__doc__)
    steps = 3 if chosen.quick else 450
    settings: list[tuple[str, int | tuple[int, ...] | None]] = [("dense", None)]
    settings += [(kind, k) for kind in ("hard", "soft") for k in SIZES]
    settings.append(("hard, mixed", SIZES))
    study = Study(
        "topk_attention",
        {"kind": "selection", "k": "k"},
        {"bits": ("bits per byte", "{:.3f}"), "time": ("time, of dense", "{:.1f}×")},
        f"Text with quotations, {CONTEXT} bytes of context, one layer of width {DIM} with {HEADS} heads, {steps} steps"
        f" of 16; soft: beta {BETA:g}. Time: forward and backward of causal attention over 1024 tokens, 8 heads of 64.",
    )
    ratios = times(settings, chosen.quick)
    for seed in chosen.seeds:
        for (kind, k), ratio in zip(settings, ratios, strict=True):
            found = bits(kind, k, seed, steps, chosen.quick)
            study.add(seed, kind=kind, k=name(k), bits=found, time=ratio)
    study.finish(chosen.out, draw)


if __name__ == "__main__":
    main()
