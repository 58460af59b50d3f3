"""Gates of key blocks distilled from a trained language model of bytes, beside other choices of as many blocks.

The text is Python's standard library; the second half of each context quotes the first, so that a query has to find
one block among many. The second table has the time of the attention alone, for long inputs.
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

from spartan.layers import BlockGate, BlockGatedAttention, block_gated_attention, block_maxima
from spartan.training.tasks import Slice

CONTEXT, BLOCK, DIM, HEADS = 256, 8, 64, 2
BLOCKS = CONTEXT // BLOCK
KEPT = (16, 8, 4, 2)
LONG_BLOCK = 64


class FixedGate(nn.Module):
    """Gates that nothing is learned for: the blocks' true maxima, chance, or the latest blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Gates `[n, heads, blocks, blocks]`."""
        if self.kind == "oracle":
            return block_maxima(query, key, BLOCK, is_causal=True)
        if self.kind == "random":
            return torch.rand(*query.shape[:2], BLOCKS, BLOCKS)
        return torch.arange(float(BLOCKS)).expand(*query.shape[:2], BLOCKS, BLOCKS)


def distil(task: QuotingTask, model: nn.Module, layer: BlockGatedAttention, steps: int, seed: int) -> None:
    """Teach the gates what the frozen model attends to."""
    model.requires_grad_(False)
    layer.gate.requires_grad_(True)
    losses: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: losses.append(module.distillation_loss(*inputs)))
    optimizer = torch.optim.Adam(layer.gate.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        losses.clear()
        model(task.batch(step, 8, 1000 + seed, Slice())[0])
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    hook.remove()


def share(k: int, blocks: int) -> float:
    """Part of the causal pairs of blocks that are computed, in percent."""
    return 100 * sum(min(k, row + 1) for row in range(blocks)) / (blocks * (blocks + 1) / 2)


def compare(study: Study, seed: int, quick: bool) -> None:
    """Train a dense model, distil its gates, and evaluate every choice of blocks."""
    torch.manual_seed(seed)
    task = QuotingTask(text(quick), CONTEXT)
    model = byte_model(CONTEXT, DIM, 1, HEADS)
    train(task, model, model.parameters(), 3 if quick else 600, 8, seed, 4e-3)
    layer = BlockGatedAttention.from_attention(model.layers[0].attention, None, block=BLOCK)
    model.layers[0].attention = layer
    study.add(seed, kind="dense", k=BLOCKS, share=100.0, bits=bits_per_byte(task, model))
    gates: dict[str, nn.Module] = {kind: FixedGate(kind) for kind in ("oracle", "random", "window")}
    gates["untrained"] = BlockGate(HEADS, DIM // HEADS, BLOCK)
    distil(task, model, layer, 3 if quick else 400, seed)
    gates["distilled"] = layer.gate
    for kind, gate in gates.items():
        layer.gate = gate  # type: ignore[assignment]
        for k in KEPT:
            layer.k = k
            study.add(seed, kind=kind, k=k, share=share(k, BLOCKS), bits=bits_per_byte(task, model))


def draw(axes: Any, records: Sequence[Record]) -> None:
    """Bits per byte by the part of the blocks, one line for each kind of gates."""
    axes.axhline(means(records, "bits", kind="dense"), color="0.4", label="dense")
    for kind in ("oracle", "distilled", "untrained", "window", "random"):
        axes.plot(
            [share(k, BLOCKS) for k in KEPT], [means(records, "bits", kind=kind, k=k) for k in KEPT], "o-", label=kind
        )
    axes.set(xlabel="blocks kept, % of the causal ones", ylabel="bits per byte, lower is better", xscale="log")
    axes.set_xticks([round(share(k, BLOCKS)) for k in KEPT], [f"{share(k, BLOCKS):.0f}" for k in KEPT], minor=False)
    axes.minorticks_off()
    axes.legend()


def measure(study: Study, tokens: int, rounds: int) -> None:
    """Medians over rounds; in each, dense attention and every k take their turn."""
    torch.manual_seed(0)
    query, key, value, upstream = (torch.randn(1, 8, tokens, 64) for _ in range(4))
    operands = [x.requires_grad_() for x in (query, key, value)]
    gate, blocks = BlockGate(8, 64, LONG_BLOCK), tokens // LONG_BLOCK

    def gated(k: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                gates = gate(query, key)
            return block_gated_attention(query, key, value, gates, k, LONG_BLOCK, is_causal=True)

        return call

    calls = {k: gated(k) for k in (blocks // 10, blocks // 20)}
    calls = {blocks: lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), **calls}
    taken: dict[int, list[tuple[float, float]]] = {k: [] for k in calls}
    for _ in range(rounds):
        for k, call in calls.items():
            begin = time.perf_counter()
            with torch.no_grad():
                call()
            middle = time.perf_counter()
            torch.autograd.grad(call(), operands, upstream)
            taken[k].append((middle - begin, time.perf_counter() - middle))
    medians = {k: [1e3 * statistics.median(column) for column in zip(*runs, strict=True)] for k, runs in taken.items()}
    for k, (forward, both) in medians.items():
        speed = {"forward_x": medians[blocks][0] / forward, "both_x": medians[blocks][1] / both}
        study.add(0, tokens=tokens, k=k, share=share(k, blocks), forward=forward, both=both, **speed)


def draw_times(axes: Any, records: Sequence[Record]) -> None:
    """Forward time by tokens."""
    lengths = sorted({r["tokens"] for r in records})
    for place, name in enumerate(("dense", "a tenth of the key blocks", "a twentieth")):
        own = [[r for r in records if r["tokens"] == tokens][place] for tokens in lengths]
        axes.plot(lengths, [r["forward"] for r in own], "o-", label=name)
    axes.set(xlabel="tokens", ylabel="forward, ms", xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(tokens) for tokens in lengths])
    axes.minorticks_off()
    axes.legend()


def main() -> None:
    """Make both tables."""
    chosen = options(__doc__)
    study = Study(
        "block_gated_attention",
        {"kind": "gates", "k": "blocks kept"},
        {"share": ("% of the causal blocks", "{:.0f}"), "bits": ("bits per byte", "{:.3f}")},
        f"Text with quotations, {CONTEXT} bytes of context in blocks of {BLOCK}, one layer of width {DIM} with {HEADS}"
        " heads, 600 steps of 8; the model frozen, 400 steps of 8 for the gates.",
    )
    for seed in chosen.seeds:
        compare(study, seed, chosen.quick)
    study.finish(chosen.out, draw)
    times = Study(
        "block_gated_attention_time",
        {"tokens": "tokens", "k": "key blocks kept"},
        {
            "share": ("% of the causal blocks", "{:.1f}"),
            "forward": ("forward, ms", "{:.0f}"),
            "forward_x": ("times as fast", "{:.1f}×"),
            "both": ("forward and backward, ms", "{:.0f}"),
            "both_x": ("times as fast", "{:.1f}×"),
        },
        f"Causal attention alone, 8 heads of 64, blocks of {LONG_BLOCK}, gates included; dense is PyTorch's.",
    )
    for tokens in (1280, 2560) if chosen.quick else (4096, 8192, 16384):
        measure(times, tokens, 1 if chosen.quick else 3)
    times.finish(chosen.out, draw_times)


if __name__ == "__main__":
    main()
