"""Model text by bytes with very many experts of one neuron each, beside a dense layer of as many active parameters.

A small transformer learns to predict the next byte of the source of Python's standard library, which is there. Its
two-layer perceptrons are replaced: each token looks up its neurons among 1,024 to 16,384.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.layers import study
from examples.layers.training import held_out, train
from spartan.layers import ProductKeyExperts
from spartan.training.models import ByteTransformer, TransformerLayer
from spartan.training.tasks import TextTask
from spartan.training.text import load_text

DIM, DEPTH, HEADS, EXPANSION = 64, 2, 4, 4
QUERIES, KEPT, KEY_DIM = 8, 14, 32
CONTEXT, BATCH, LEARNING_RATE = 64, 16, 6e-3
EXPERTS = (1024, 4096, 16384)


class ExpertLayer(TransformerLayer):
    """Experts in the place of the two-layer perceptron."""

    def __init__(self, experts: int) -> None:
        super().__init__(DIM, HEADS, EXPANSION, causal=True)
        del self.expand, self.contract
        self.experts = ProductKeyExperts(DIM, experts, QUERIES, KEPT, KEY_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, tokens, dim]` to the same shape."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.experts(self.norm_mlp(x))


def build(experts: int | None) -> ByteTransformer:
    """A transformer with so many experts in each layer; None: a dense perceptron."""
    model = ByteTransformer(CONTEXT, DIM, DEPTH, HEADS, EXPANSION)
    if experts is not None:
        model.layers = nn.ModuleList(ExpertLayer(experts) for _ in range(DEPTH))
    return model


def parameters(model: ByteTransformer) -> tuple[int, int]:
    """Of the first layer's perceptron or experts: all, and those that a token uses."""
    layer = model.layers[0]
    if isinstance(layer, ExpertLayer):
        return sum(p.numel() for p in layer.experts.parameters()), layer.experts.active_parameters()
    dense = sum(p.numel() for part in (layer.expand, layer.contract) for p in part.parameters())
    return dense, dense


def note_used(layer: ExpertLayer) -> Tensor:
    """One for each expert that the layer uses from now on, else zero."""
    used = torch.zeros(layer.experts.experts)

    def note(module: ProductKeyExperts, inputs: tuple[Tensor, ...]) -> None:
        used[module.choose(inputs[0])[1].flatten()] = 1

    layer.experts.register_forward_pre_hook(note)
    return used


def evaluate(model: ByteTransformer, task: TextTask) -> dict[str, float]:
    """Bits a byte of text, and the percent of the experts that any byte of it used."""
    used = [note_used(layer) for layer in model.layers if isinstance(layer, ExpertLayer)]
    bits = held_out(model, task)[0] / math.log(2)
    return {"bits": bits} | ({"used": 100 * float(torch.cat(used).mean())} if used else {})


def draw(axes: Any, records: list[study.Record]) -> None:
    """Bits a byte against the number of experts, and the dense layer's."""
    counts = [r for r in dict.fromkeys(r["experts"] for r in records) if r is not None]
    for seed in dict.fromkeys(r["seed"] for r in records):
        own = [r["bits"] for r in records if r["seed"] == seed and r["experts"] is not None]
        axes.plot(counts, own, ".", color="C0")
    axes.plot(counts, [study.means(records, "bits", experts=n) for n in counts], "-", color="C0", label="experts")
    dense = study.means(records, "bits", experts=None)
    axes.axhline(dense, color="gray", linestyle="--", label="dense layer of as many active parameters")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("experts in a layer")
    axes.set_ylabel("bits a byte, held-out text")
    axes.legend()


def main() -> None:
    """Train each number of experts for each seed."""
    asked = study.options(__doc__, steps={"type": int, "default": 200})
    steps, limit, counts = asked.steps, 65_536, EXPERTS
    if asked.quick:
        steps, limit, counts = 3, 2048, EXPERTS[:1]
    data = load_text(limit=4_000_000, held_out_limit=limit)
    task = TextTask(data, CONTEXT)
    run = study.Study(
        "product_key_experts",
        {"experts": "experts"},
        {
            "bits": ("bits a byte", "{:.3f}"),
            "active": ("active parameters of a layer", "{:,}"),
            "total": ("all parameters of a layer", "{:,}"),
            "used": ("experts used on held-out text %", "{:.1f}"),
        },
        f"The source of Python's standard library, {len(data.train) / 1e6:g} million bytes, {len(data.held_out):,} held"
        f" out; {steps} steps of {BATCH} times {CONTEXT} bytes; {DEPTH} layers of {DIM}; {QUERIES} heads that take"
        f" {KEPT} experts each.",
    )
    for seed in asked.seeds:
        for experts in (None, *counts):
            torch.manual_seed(seed)
            model = build(experts)
            total, active = parameters(model)
            train(model, task, steps, BATCH, LEARNING_RATE, seed)
            run.add(seed, experts=experts, total=total, active=active, **evaluate(model, task))
    run.finish(asked.out, draw)


if __name__ == "__main__":
    main()
