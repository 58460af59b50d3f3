"""A small language model of bytes: how the examples of attention train it and what it comes to on text held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import take_steps

from spartan.training.models import ByteTransformer
from spartan.training.tasks import Slice, TextTask
from spartan.training.text import TextData, load_text


class LastBytes(nn.Module):
    """Sum of the embeddings of a byte and of those before it, so that one layer of attention can find repetitions."""

    BYTES = 4

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ByteTransformer.VOCABULARY, dim) for _ in range(self.BYTES))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[n, tokens]` to `[n, tokens, dim]`; before the first byte stand zeros."""
        padded = F.pad(tokens, (self.BYTES - 1, 0))
        begins = range(self.BYTES - 1, -1, -1)
        shifted = (padded[:, begin : begin + tokens.shape[1]] for begin in begins)
        return torch.stack([table(x) for table, x in zip(self.tables, shifted, strict=True)]).sum(0)


def byte_model(context: int, dim: int, depth: int, heads: int) -> ByteTransformer:
    """A `ByteTransformer` whose tokens are the last four bytes."""
    model = ByteTransformer(context, dim, depth, heads, expansion=2)
    model.embed = LastBytes(dim)  # type: ignore[assignment]
    return model


@cache
def text(quick: bool) -> TextData:
    """Python's standard library; some of its files are held out."""
    return load_text(limit=4_000_000, held_out_limit=8_000 if quick else 60_000)


class QuotingTask(TextTask):
    """Text whose second half quotes the first, in pieces of 32 bytes and in another order."""

    PIECE = 32

    def batch(self, step: int, size: int, seed: int, part: Slice) -> tuple[Tensor, Tensor]:
        """As for plain text, then quoted."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self._quoted(super().batch(step, size, seed, part)[0], generator)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As for plain text, then quoted in an order that is always the same."""
        generator = torch.Generator().manual_seed(0)
        return (self._quoted(inputs, generator) for inputs, _ in super().held_out())

    def _quoted(self, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        first = text[:, : self.context // 2]
        pieces = first.unflatten(1, (-1, self.PIECE))
        order = torch.rand(pieces.shape[:2], generator=generator).argsort(1)
        quoted = torch.cat([first, pieces.gather(1, order[..., None].expand_as(pieces)).flatten(1)], 1)
        return quoted[:, :-1], quoted[:, 1:]


def train(
    task: TextTask, model: nn.Module, parameters: Iterable[nn.Parameter], steps: int, batch: int, seed: int, rate: float
) -> None:
    """Train by AdamW: a tenth of the steps to warm up, the last fifth to fall to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)

    def rate_at(step: int) -> float:
        return min(1.0, 10 * (step + 1) / steps, 5 * (1 - step / steps))

    take_steps(model.train(), task, optimizer, rate_at, steps, batch, seed)


@torch.no_grad()
def bits_per_byte(task: TextTask, model: nn.Module) -> float:
    """Mean cross-entropy of the next byte on the text held out, in bits."""
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in task.held_out():
        total += float(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return total / count / math.log(2)
