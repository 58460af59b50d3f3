"""Clients that learn together: each has gates of its own within its budget of operations, beside federated averaging.

Fashion-MNIST, which is fetched if it is not there (`python -m spartan.demo` says how), is dealt to 12 clients with a
Dirichlet skew of their labels. They can afford 25%, 50% or all of the operations of a perceptron.
Needs the extra `train`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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

BLOCK, WIDTH = 16, 256
BUDGETS = (0.25, 0.5, 1.0)
SKEW = 0.3  # of the Dirichlet distribution: a client has a few labels
BATCH, LEARNING_RATE, GATE_RATE = 32, 0.1, 0.02


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    clients: int = 12
    images: int = 300
    rounds: int = 20
    steps: int = 15
    tuning: int = 60


@dataclass(frozen=True)
class Client:
    """Images of one client, and the fraction of the operations that it can afford."""

    number: int
    budget: float
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Network(nn.Module):
    """A perceptron whose two hidden layers have a gate for each 16 x 16 block of their weights."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(pixels, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, 10)

    def costs(self) -> Tensor:
        """Multiplications of each block."""
        return torch.cat([self._sum(torch.ones_like(layer.weight)) for layer in self.hidden])

    def sizes(self) -> Tensor:
        """Norm of each block."""
        return torch.cat([self._sum(layer.weight.detach().square()).sqrt() for layer in self.hidden])

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Scores `[batch, 10]` of the labels; blocks whose gate is 0 are not multiplied."""
        x = x.flatten(1)
        for layer, own in zip(self.hidden, self.by_layer(gates), strict=True):
            x = spartan.masked_linear(x, layer.weight, own, BLOCK, layer.bias, "relu")
        return self.head(x)

    def by_layer(self, gates: Tensor) -> list[Tensor]:
        """Gates [n] as the grids of blocks of the layers."""
        grids = [(layer.out_features // BLOCK, -(-layer.in_features // BLOCK)) for layer in self.hidden]
        parts = gates.split([rows * columns for rows, columns in grids])
        return [part.view(grid) for part, grid in zip(parts, grids, strict=True)]

    def flops(self, gates: Tensor) -> float:
        """Multiplications of the kept blocks and the head, as a percentage of all."""
        head = self.head.weight.numel()
        return 100 * float(((gates != 0) * self.costs()).sum() + head) / float(self.costs().sum() + head)

    @staticmethod
    def _sum(elements: Tensor) -> Tensor:
        columns = -elements.shape[1] % BLOCK
        return F.avg_pool2d(F.pad(elements, (0, columns))[None], BLOCK)[0].flatten() * BLOCK**2


Gates = Callable[[Network], Tensor]


def deal(data: ImageData, scale: Scale, seed: int) -> list[Client]:
    """Images of each client: as many of each label as a draw from a Dirichlet distribution says."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    labels = torch.distributions.Dirichlet(torch.full((10,), SKEW)).sample((scale.clients,))

    def draw(wanted: Tensor, images: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        chosen = []
        for label, count in enumerate((wanted * min(scale.images, len(found))).round().int().tolist()):
            own = (found == label).nonzero()[:, 0]
            chosen.append(own[torch.randperm(len(own), generator=generator)[:count]])
        index = torch.cat(chosen)
        return images[index], found[index]

    return [
        Client(
            i,
            BUDGETS[i % len(BUDGETS)],
            draw(labels[i], data.train_images, data.train_labels),
            draw(labels[i], data.test_images, data.test_labels),
        )
        for i in range(scale.clients)
    ]


def train(model: Network, gates: Gates, client: Client, steps: int, *others: torch.optim.Optimizer) -> None:
    """Take SGD steps on a client's own images; `others` train what makes the gates."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), *others]
    images, labels = client.train
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,))
        loss = F.cross_entropy(model(images[batch], gates(model)), labels[batch])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def average(model: Network, found: Sequence[Network], kept: Sequence[Tensor]) -> None:
    """Server: each block becomes its mean over the clients that kept it, everything else the mean over all."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.stack([dict(other.named_parameters())[name] for other in found]).mean(0))
        for i, layer in enumerate(model.hidden):
            rows, columns = layer.weight.shape
            masks = [other.by_layer(gates)[i] for other, gates in zip(found, kept, strict=True)]
            whole = [m.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns] for m in masks]
            stacked = torch.stack([other.hidden[i].weight for other in found])
            count = torch.stack(whole).sum(0)
            mean = (stacked * torch.stack(whole)).sum(0) / count.clamp(min=1)
            layer.weight.copy_(torch.where(count > 0, mean, stacked[0]))


def cut(model: Network, budget: float) -> Tensor:
    """Gates of the largest blocks, the same fraction in each layer: all of them cost the same."""
    sizes = [grid.flatten() for grid in model.by_layer(model.sizes())]
    return torch.cat([spartan.hard_topk(size, budget * len(size)) for size in sizes]).float()


def accuracy(model: Network, gates: Tensor, client: Client) -> float:
    """Percentage of right labels on a client's own test images."""
    images, labels = client.test
    with torch.no_grad():
        return 100 * float((model(images, gates).argmax(-1) == labels).float().mean())


def federated(pixels: int, clients: Sequence[Client], scale: Scale, gated: bool) -> tuple[Network, list[Tensor]]:
    """Train one network with all clients, dense or through gates that each learns; the network and their gates."""
    model = Network(pixels)
    ones = torch.ones_like(model.costs())
    # sparse: a step touches the scores of its client alone
    scores = nn.Embedding(len(clients), len(ones), sparse=True)
    with torch.no_grad():
        scores.weight.copy_(0.1 * torch.randn(len(ones)).expand_as(scores.weight))  # all begin alike
    gate = KnapsackGate(model.costs(), scores)
    optimizer = torch.optim.SparseAdam(gate.parameters(), lr=GATE_RATE)

    def gates_of(client: Client) -> Gates:
        if not gated:
            return lambda model: ones
        return lambda model: gate(torch.tensor(client.number), torch.tensor(client.budget))

    for _ in range(scale.rounds):
        found, kept = [], []
        for client in clients:
            own = copy.deepcopy(model)
            kept.append(gates_of(client)(own).detach())  # what it fetches; what it sends may be blocks of others
            train(own, gates_of(client), client, scale.steps, *([optimizer] if gated else []))
            kept[-1] = torch.maximum(kept[-1], gates_of(client)(own).detach())
            found.append(own)
        average(model, found, kept)
    return model, [gates_of(client)(model).detach() for client in clients]


def run(data: ImageData, scale: Scale, seed: int) -> list[tuple[str, Client, float, float]]:
    """Every method on the clients of one seed: name, client, accuracy and operations of its model."""
    clients, pixels = deal(data, scale, seed), data.side**2
    rows: list[tuple[str, Client, float, float]] = []

    def record(method: str, client: Client, model: Network, gates: Tensor) -> None:
        rows.append((method, client, accuracy(model, gates, client), model.flops(gates)))

    def tuned(model: Network, gates: Tensor, client: Client) -> Network:
        own = copy.deepcopy(model)
        train(own, lambda model: gates, client, scale.tuning)
        return own

    torch.manual_seed(seed)
    averaged, every = federated(pixels, clients, scale, gated=False)
    torch.manual_seed(seed)
    gated, own_gates = federated(pixels, clients, scale, gated=True)
    for client, all_blocks, own in zip(clients, every, own_gates, strict=True):
        record("FedAvg, dense", client, averaged, all_blocks)
        record("FedAvg, dense, tuned", client, tuned(averaged, all_blocks, client), all_blocks)
        kept = cut(averaged, client.budget)
        record("FedAvg, cut", client, averaged, kept)
        record("FedAvg, cut, tuned", client, tuned(averaged, kept, client), kept)
        record("gates", client, gated, own)
        record("gates, tuned", client, tuned(gated, own, client), own)
        torch.manual_seed(seed)
        alone = Network(pixels)
        train(alone, lambda model, ones=all_blocks: ones, client, scale.rounds * scale.steps)
        kept = cut(alone, client.budget)
        record("alone, cut, tuned", client, tuned(alone, kept, client), kept)
    return rows


def draw(axes: Any, records: Sequence[study.Record]) -> None:
    """Accuracy by the budget of the clients."""
    for method in dict.fromkeys(record["method"] for record in records):
        shown = [study.means(records, f"at{round(100 * b)}", method=method) for b in BUDGETS]
        axes.plot([100 * b for b in BUDGETS], shown, marker="o", label=method)
    axes.set(xlabel="budget of a client, % of the operations", ylabel="accuracy on its own labels, %")
    axes.legend()


def main() -> None:
    """Run every method over the seeds."""
    found = study.options(__doc__, data={"type": Path, "default": None, "help": "folder of the images"})
    scale = Scale(clients=3, images=20, rounds=2, steps=2, tuning=2) if found.quick else Scale()
    data = load_data(found.data, print)
    measures = {"accuracy": ("accuracy %", "{:.1f}"), "flops": ("FLOPs %", "{:.0f}")}
    measures |= {f"at{round(100 * b)}": (f"clients of {b:.0%}", "{:.1f}") for b in BUDGETS}
    about = (
        f"{data.name}; {scale.clients} clients of {scale.images} images, labels by Dirichlet({SKEW}); a third each can"
        f" afford 25%, 50% and all FLOPs of a perceptron with two hidden layers of {WIDTH}; {scale.rounds} rounds of"
        f" {scale.steps} steps of {BATCH} images, tuning of {scale.tuning} steps on the client. Cut: the largest"
        " blocks of each layer."
    )
    result = study.Study("knapsack_gate", {"method": "method"}, measures, about)
    for seed in found.seeds:
        rows = run(data, scale, seed)
        for method in dict.fromkeys(row[0] for row in rows):
            own = [row for row in rows if row[0] == method]

            def mean(column: int, budget: float | None = None, own: list[Any] = own) -> float:
                values = [row[column] for row in own if budget in (None, row[1].budget)]
                return sum(values) / len(values)

            by_budget = {f"at{round(100 * b)}": mean(2, b) for b in BUDGETS}
            result.add(seed, method=method, accuracy=mean(2), flops=mean(3), **by_budget)
    result.finish(found.out, draw)


if __name__ == "__main__":
    main()
