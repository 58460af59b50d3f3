"""The byte-level model in a plain loop, which every integration must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import spartan
from spartan.training.models import ByteTransformer

STEPS = 12
BATCH = 4
TEXT = torch.tensor(list((__doc__ or "").encode() * 60))
OPTIONS: dict[str, Any] = {"count": "masked"}
METHOD = spartan.Spartan(sparsity=0.6, beta=4.0, beta_units="threshold", preserve_scale=True)
GROWING = spartan.RigL(sparsity=0.6, block_size=4, interval=2)


class Bytes(nn.Module):
    """The byte-level model with its loss, as trainers like it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = ByteTransformer(context=16, dim=16, depth=1, heads=2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of the next byte."""
        logits = self.inner(input_ids)
        return {"loss": functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()), "logits": logits}


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Pieces of text, each with the same shifted by one."""
    pieces = [TEXT[16 * i : 16 * i + 17] for i in range(count)]
    return [{"input_ids": piece[:-1], "labels": piece[1:]} for piece in pieces]


def batch(index: int) -> dict[str, torch.Tensor]:
    chosen = examples(BATCH * (index + 1))[BATCH * index :]
    return {key: torch.stack([example[key] for example in chosen]) for key in ("input_ids", "labels")}


class Plain:
    """The loop without any trainer."""

    def __init__(self, method: Any = METHOD, steps: int = STEPS, clip: float = 0.5, accumulate: int = 1) -> None:
        self.model, self.clip, self.accumulate = Bytes(), clip, accumulate
        self.sparsifier = spartan.Sparsifier(self.model, method, steps, **OPTIONS)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)
        self.sparsifier.attach(self.optimizer)

    def train(self, steps: int, each: Callable[[], Any] = lambda: None, bf16: bool = False) -> Plain:
        """Some optimizer steps; `each` is called after every one."""
        for step in range(self.sparsifier.step_count, self.sparsifier.step_count + steps):
            self.optimizer.zero_grad()
            for part in range(self.accumulate):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = self.model(**batch(step * self.accumulate + part))["loss"]
                (loss / self.accumulate).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            each()
        return self

    def finalized(self) -> nn.Module:
        """A finalized copy of the model, which goes on."""
        state = copy.deepcopy(self.sparsifier.state_dict())
        other = Plain(self.sparsifier.method, self.sparsifier.total_steps)
        other.model.load_state_dict(self.model.state_dict())
        other.sparsifier.load_state_dict(state)
        other.sparsifier.finalize()
        return other.model


def require_same(model: nn.Module, other: nn.Module) -> None:
    """The same weights, bit for bit, with the same names."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    different = [name for name, value in mine.items() if not torch.equal(value, theirs[name])]
    assert not different, different


def sparsity(model: nn.Module) -> float:
    """Fraction of zeros in what is masked by default: the matrices of the layers."""
    values = [p.detach() for name, p in model.named_parameters() if "layers." in name and p.dim() == 2]
    return sum(int((v == 0).sum()) for v in values) / sum(v.numel() for v in values)
