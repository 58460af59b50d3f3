"""Classify images by attention that keeps a part of the pairs of tokens: predicted pairs, random ones, or all.

A small vision transformer learns Fashion-MNIST from patches of 4 x 4 pixels, 49 tokens, with all their pairs.
Then each way to keep fewer pairs takes the place of its attention, and the model is trained on. Each pair that is kept
costs operations. The predictor of the pairs costs some too, and both are counted. The data is fetched, or found where
Debian's package dataset-fashion-mnist puts it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.layers import study
from examples.layers.training import held_out, train
from spartan.layers import ConnectivityAttention
from spartan.layers.selection import kept_indices
from spartan.training.images import load_data
from spartan.training.models import VisionTransformer
from spartan.training.tasks import ImageTask

DIM, DEPTH, HEADS, PATCH, RANK = 64, 2, 4, 4, 7
BATCH, LEARNING_RATE, LATER_RATE = 32, 3e-3, 1e-3
KEPT = (12, 6, 3)


class RandomPairs(ConnectivityAttention):
    """Keeps pairs that are drawn once."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_buffer("drawn", torch.rand(self.heads, self.tokens, self.tokens))

    def connectivity(self, query: Tensor, key: Tensor) -> Tensor:
        """The same for every input."""
        return self.drawn.expand(len(query), -1, -1, -1)


class FirstPairs(ConnectivityAttention):
    """Keeps what the predictor says, which gets no gradient: D and U stay as they began."""

    def connectivity(self, query: Tensor, key: Tensor) -> Tensor:
        """Without a gradient."""
        with torch.no_grad():
            return super().connectivity(query, key)


PAIRS = {"predicted": ConnectivityAttention, "not trained": FirstPairs, "random": RandomPairs}


def keep_pairs(model: VisionTransformer, pairs: str, kept: int) -> VisionTransformer:
    """A copy of the model whose attention keeps so many keys of a query; "all": a copy as it is."""
    model = copy.deepcopy(model)
    tokens = model.positions.shape[0]
    for layer in model.layers if pairs != "all" else ():
        sparse = PAIRS[pairs](DIM, HEADS, tokens, keep=kept, rank=min(RANK, tokens))
        sparse.copy_projections(layer.attention)  # the predictor is new
        layer.attention = sparse
    return model


def operations(model: VisionTransformer, pairs: str) -> int:
    """Of choosing pairs, their scores and values, in all layers, for one image."""
    tokens = model.positions.shape[0]
    if pairs == "all":
        return DEPTH * 4 * tokens * tokens * DIM
    counts = [layer.attention.flops() for layer in model.layers]
    return sum(c["attention"] + (0 if pairs == "random" else c["predictor"]) for c in counts)


@torch.no_grad()
def share_of_softmax(model: VisionTransformer, images: Tensor) -> float:
    """Percent of a softmax over all keys that falls on the kept ones, mean over layers, heads and queries."""
    shares = []

    def measure(module: ConnectivityAttention, inputs: tuple[Tensor, ...]) -> None:
        query, key, _ = module.split(inputs[0])
        full = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        indices = kept_indices(module.connectivity(query, key), module.k)
        shares.append(float(full.gather(-1, indices).sum(-1).mean()))

    hooks = [layer.attention.register_forward_pre_hook(measure) for layer in model.layers]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return 100 * sum(shares) / len(shares)


def draw(axes: Any, records: list[study.Record]) -> None:
    """Accuracy against operations, a line for each way to choose."""
    for pairs in dict.fromkeys(r["pairs"] for r in records):
        own = [r for r in records if r["pairs"] == pairs]
        kept = list(dict.fromkeys(r["kept"] for r in own))
        x = [study.means(own, "flops", kept=k) for k in kept]
        y = [study.means(own, "accuracy", kept=k) for k in kept]
        if pairs == "all":
            axes.axhline(y[0], color="gray", linestyle="--", label=f"pairs: all ({x[0]:.2f} million)")
        else:
            axes.plot(x, y, "o-", label=f"pairs: {pairs}")
    axes.set_xlabel("million operations of attention for an image, projections aside")
    axes.set_ylabel("accuracy in percent")
    axes.legend()


def main() -> None:
    """Train a model for each seed, and go on from it with each setting."""
    asked = study.options(
        __doc__,
        steps={"type": int, "default": 800},
        later_steps={"type": int, "default": 150},
        data={"type": Path, "help": "folder of the four files of Fashion-MNIST; else they are found or fetched"},
    )
    steps, later, images, tests, kept = asked.steps, asked.later_steps, 20_000, 5000, KEPT
    if asked.quick:
        steps, later, images, tests, kept = 3, 3, 200, 100, KEPT[-1:]
    data = load_data(asked.data, notice=print).first(images, tests)
    task, tokens = ImageTask(data, BATCH), (data.side // PATCH) ** 2
    run = study.Study(
        "connectivity_attention",
        {"pairs": "pairs", "kept": f"keys of {tokens}"},
        {
            "flops": ("million operations of attention", "{:.3f}"),
            "at_once": ("accuracy % at once", "{:.2f}"),
            "accuracy": (f"after {later} steps", "{:.2f}"),
            "share": ("of the softmax over all keys %", "{:.0f}"),
        },
        f"{data.name}, {len(data.test_labels):,} test images; {steps} steps of {BATCH} images with all pairs, then"
        f" {later} with those kept; vision transformer of {DEPTH} layers of {DIM} with {HEADS} heads; predictor of rank"
        f" {RANK}.",
    )
    settings = [("all", tokens), *((pairs, k) for pairs in ("predicted", "random") for k in kept if k < tokens)]
    for seed in asked.seeds:
        torch.manual_seed(seed)
        dense = VisionTransformer(data.side, data.classes, PATCH, DIM, DEPTH, HEADS)
        train(dense, task, steps, BATCH, LEARNING_RATE, seed)
        for pairs, k in [*settings, ("not trained", kept[-1])]:
            model = keep_pairs(dense, pairs, k)
            at_once = held_out(model, task)[1]
            train(model.train(), task, later, BATCH, LATER_RATE, seed + 1000)
            found = {"at_once": at_once, "accuracy": held_out(model, task)[1], "flops": operations(model, pairs) / 1e6}
            share = 100.0 if pairs == "all" else share_of_softmax(model, data.test_images[:500])
            run.add(seed, pairs=pairs, kept=k, share=share, **found)
    run.finish(asked.out, draw)


if __name__ == "__main__":
    main()
