"""Train in blocks, then multiply only what is kept: python examples/block_sparse_inference.py.

Trains a perceptron for a few steps with blocks of zeros, makes the zeros final, packs the blocks that are left, checks
that the packed model computes the same, and times it beside the dense one. Then it saves the packed model and loads it
into a fresh one, which runs on packed blocks again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time

import torch
from torch import nn

import spartan


def perceptron(width: int) -> nn.Sequential:
    """Three hidden layers."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def train(model: nn.Module, width: int, sparsity: float, block: int, steps: int) -> None:
    """Learn which input is largest, at the sparsity asked for."""
    method = spartan.Spartan(sparsity=sparsity, block_size=block)
    sparsifier = spartan.Sparsifier(model, method, total_steps=steps, count="masked")
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    for _ in range(steps):
        x = torch.randn(64, width)
        loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sparsifier.finalize()
    print(sparsifier.report())


@torch.inference_mode()
def compare(dense: nn.Module, packed: nn.Module, x: torch.Tensor, rounds: int = 20) -> tuple[float, float]:
    """Largest difference of the outputs, and the median of the ratios of times taken side by side."""
    ratios = []
    for _ in range(rounds):
        seconds = []
        for model in (dense, packed):
            start = time.perf_counter()
            model(x)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return float((dense(x) - packed(x)).abs().max()), statistics.median(ratios)


def main() -> None:
    """Train, pack, compare, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = perceptron(options.width)
    train(model, options.width, options.sparsity, options.block, options.steps)

    packed = spartan.to_block_sparse(copy.deepcopy(model), options.block)
    x = torch.randn(256, options.width)
    error, ratio = compare(model, packed, x)
    print(f"packed and dense outputs differ by {error:.1e} at most; time {ratio:.2f} of the dense model's")

    with tempfile.TemporaryDirectory() as folder:
        spartan.save_pretrained(packed, folder)
        print(spartan.inspect_file(folder))
        loaded = spartan.load_pretrained(perceptron(options.width), folder)
    same = torch.equal(loaded(x), packed(x))
    print(f"loaded into a fresh model: {'the same outputs' if same else 'DIFFERENT outputs'}")


if __name__ == "__main__":
    main()
