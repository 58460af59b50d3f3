"""Search for the operations of a sparse network: the scores of a gate under a budget of FLOPs, beside random search.

Fashion-MNIST, which is fetched if it is not there (`python -m spartan.demo` says how), at 14 x 14 pixels. Each of five
residual positions may have any of six convolutions, two of them with sparse weights, and all share one budget.
Needs the extra `train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spartan
from spartan.layers import KnapsackGate
from spartan.training.images import ImageData, load_data

POSITIONS, CHANNELS = 5, 16
BUDGET = 0.2  # of the operations of all candidates
BATCH, LEARNING_RATE, GATE_RATE = 64, 0.004, 0.05
SHARPNESS = (1.0, 10.0)  # beta at the start and the end of the search
# kernel, groups, kept fraction of the weights
CANDIDATES = {
    "3x3": (3, 1, 1.0),
    "3x3, 75% zeros": (3, 1, 0.25),
    "3x3, 90% zeros": (3, 1, 0.1),
    "1x1": (1, 1, 1.0),
    "3x3 by channel": (3, CHANNELS, 1.0),
    "5x5 by channel": (5, CHANNELS, 1.0),
}


@dataclass(frozen=True)
class Scale:
    """How much is trained: steps of the search, of each try of random search, and of the network in the end."""

    images: int = 12_000
    held_out: int = 3000
    search: int = 360
    tried: int = 300
    final: int = 600


class Convolution(nn.Module):
    """A convolution of which the largest weights are kept, normalisation, ReLU."""

    def __init__(self, kernel: int, groups: int, kept: float) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding="same", groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]` to the same shape; all weights get a gradient."""
        weight = self.convolution.weight
        if self.kept < 1:
            size = weight.detach().abs().flatten()
            kept = weight.detach() * spartan.hard_topk(size, self.kept * len(size)).view_as(weight)
            weight = weight + (kept - weight).detach()
        y = F.conv2d(x, weight, padding="same", groups=self.convolution.groups)
        return self.norm(y).relu()


class Network(nn.Module):
    """Residual positions, each the sum of its candidates times their gates."""

    def __init__(self, chosen: Tensor) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1)
        self.positions = nn.ModuleList(
            nn.ModuleDict({str(i): Convolution(*CANDIDATES[name]) for i, name in enumerate(CANDIDATES) if row[i]})
            for row in chosen.view(POSITIONS, -1)
        )
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Scores `[batch, 10]` of the labels."""
        x = self.stem(x)
        for position, row in zip(self.positions, gates.view(POSITIONS, -1), strict=True):
            x = x + sum(row[int(i)] * operation(x) for i, operation in position.items())
        return self.head(x.mean((2, 3)))


def costs() -> Tensor:
    """Multiplications of each candidate of each position for one pixel."""
    own = [kernel**2 * CHANNELS**2 / groups * kept for kernel, groups, kept in CANDIDATES.values()]
    return torch.tensor(own * POSITIONS)


def batches(images: Tensor, labels: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, as many as steps."""
    for _ in range(steps):
        index = torch.randint(len(labels), (BATCH,))
        yield images[index], labels[index]


def fit(model: Network, gates: Tensor, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train a network whose gates are fixed."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for x, y in batches(images, labels, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x, gates), y).backward()
        optimizer.step()
        schedule.step()


def accuracy(model: Network, gates: Tensor, images: Tensor, labels: Tensor) -> float:
    """Percentage of right labels."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part, gates).argmax(-1) for part in images.split(500)])
    model.train()
    return 100 * float((found == labels).float().mean())


def search(data: ImageData, scale: Scale) -> Tensor:
    """Train all candidates and the scores of their gate in turns, the scores on held-out images; the choice [n]."""
    gate = KnapsackGate(costs(), budget=BUDGET, kind="soft")
    model = Network(torch.ones_like(gate.costs))
    weights = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    scores = torch.optim.Adam(gate.parameters(), GATE_RATE)
    train, held_out = slice(scale.held_out, None), slice(scale.held_out)
    for step in range(scale.search):
        first, last = SHARPNESS
        gate.beta = first * (last / first) ** (step / scale.search)
        part, optimizer = ((train, weights), (held_out, scores))[step % 2]
        ((x, y),) = batches(data.train_images[part], data.train_labels[part], 1)
        weights.zero_grad()
        scores.zero_grad()
        F.cross_entropy(model(x, gate()), y).backward()
        optimizer.step()
    gate.kind = "hard"
    return gate().detach()


def drawn() -> Tensor:
    """A random choice that spends at least nine tenths of the budget."""
    gate = KnapsackGate(costs(), budget=BUDGET)
    while True:
        torch.nn.init.normal_(gate.free)
        gates = gate().detach()
        if gate.spent(gates) >= 0.9 * BUDGET:
            return gates


def random_search(data: ImageData, scale: Scale) -> tuple[Tensor, int]:
    """The best of random choices on held-out images, with as many FLOPs of training as the search; and their number."""
    tries = max(1, round(scale.search / BUDGET / scale.tried))
    found: list[tuple[float, Tensor]] = []
    for _ in range(tries):
        gates = drawn()
        model = Network(gates)
        fit(model, gates, data.train_images[scale.held_out :], data.train_labels[scale.held_out :], scale.tried)
        held_out = data.train_images[: scale.held_out], data.train_labels[: scale.held_out]
        found.append((accuracy(model, gates, *held_out), gates))
    return max(found, key=lambda pair: pair[0])[1], tries


def named(gates: Tensor) -> str:
    """The chosen operations by position."""
    rows = gates.view(POSITIONS, -1)
    return "; ".join(" + ".join(n for n, g in zip(CANDIDATES, row, strict=True) if g) or "none" for row in rows)


def draw(axes: Any, records: Sequence[study.Record]) -> None:
    """Accuracy of each seed by the way of choosing."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    for i, method in enumerate(methods):
        own = [record["accuracy"] for record in records if record["method"] == method]
        axes.plot([i] * len(own), own, "o")
        axes.plot([i - 0.2, i + 0.2], [study.means(records, "accuracy", method=method)] * 2, color="black")
    axes.set_xticks(range(len(methods)), methods)
    axes.set(ylabel="test accuracy, %")


def main() -> None:
    """Choose, train what was chosen, and compare."""
    found = study.options(__doc__, data={"type": Path, "default": None, "help": "folder of the images"})
    scale = Scale(images=200, held_out=50, search=4, tried=4, final=4) if found.quick else Scale()
    data = load_data(found.data, print).first(scale.images)
    data = ImageData(
        data.name,
        data.source,
        F.avg_pool2d(data.train_images, 2),
        data.train_labels,
        F.avg_pool2d(data.test_images, 2),
        data.test_labels,
    )
    about = (
        f"{data.name}, at {data.side} x {data.side} pixels; {POSITIONS} residual positions of {len(CANDIDATES)}"
        f" candidates, {CHANNELS} channels; budget {BUDGET:.0%} of the FLOPs of all candidates. {scale.search} steps of"
        f" search on all candidates; random search trains each choice {scale.tried} steps, with as many FLOPs in all."
        f" Every choice is then trained {scale.final} steps of {BATCH} images from new weights."
    )
    measures = {
        "accuracy": ("accuracy %", "{:.2f}"),
        "flops": ("FLOPs spent %", "{:.1f}"),
        "operations": ("operations", "{:.1f}"),
    }
    result = study.Study("architecture_search", {"method": "method"}, measures, about)
    for seed in found.seeds:
        torch.manual_seed(seed)
        best, tries = random_search(data, scale)
        choices = {"gate": search(data, scale), f"best of {tries} random": best, "one random": drawn()}
        for method, gates in choices.items():
            torch.manual_seed(seed)
            model = Network(gates)
            fit(model, gates, data.train_images, data.train_labels, scale.final)
            right = accuracy(model, gates, data.test_images, data.test_labels)
            spent = 100 * float((gates * costs()).sum() / costs().sum())
            result.add(seed, method=method, accuracy=right, flops=spent, operations=float(gates.sum()))
            print(f"    {named(gates)}")
    result.finish(found.out, draw)


if __name__ == "__main__":
    main()
