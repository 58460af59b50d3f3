"""A training step of a ViT-B/16 in bfloat16 autocast: dense, with single weights masked, and in blocks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import spartan
from bench.case import Settings, Work
from bench.timing import seconds_of
from spartan.training.models import VisionTransformer
from spartan_kernels.devices import device_of

_TOTAL_STEPS = 10_000
_BATCH = 64


Method = Callable[[bool], Any] | None


def _spartan(block: int) -> Callable[[bool], Any]:
    """In blocks of `block`; the small model has room for blocks of 16, most of them zero."""

    def method(quick: bool) -> Any:
        sparsity, side = (0.6, min(block, 16)) if quick else (0.9, block)
        return spartan.Spartan(sparsity=sparsity, block_size=side, distribution="uniform")

    return method


METHODS: dict[str, Method] = {
    "dense": None,
    "block 32": _spartan(32),
    "block 128": _spartan(128),
    "single weights": _spartan(1),
}


def _model(quick: bool) -> tuple[nn.Module, int]:
    """The transformer on one channel, and the side of its images."""
    if quick:
        return VisionTransformer(16, 10, patch=8, dim=32, depth=1, heads=1, expansion=2), 16
    return VisionTransformer(224, 1000, patch=16, dim=768, depth=12, heads=12, expansion=4), 224


class _Trainer:
    def __init__(self, s: Settings, method: Method) -> None:
        torch.manual_seed(0)
        self.device, self.backend = device_of(s.device), s.backend or "auto"
        self.model, side = _model(s.quick)
        self.model.to(s.device)
        self.weights = sum(p.numel() for p in self.model.parameters())
        self.sparsifier = None if method is None else spartan.Sparsifier(self.model, method(s.quick), _TOTAL_STEPS)
        on_gpu = s.device != "cpu"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, capturable=on_gpu)
        batch = 2 if s.quick else _BATCH
        self.x = torch.randn(batch, 1, side, side, device=s.device)
        self.y = torch.randint(10, (batch,), device=s.device)
        self.autocast = torch.autocast(s.device, torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def forward_backward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        with spartan.backend(self.backend):
            loss = self.forward_backward()
            if self.sparsifier is not None:
                self.sparsifier.correct_gradients()
            self.optimizer.step()
            if self.sparsifier is not None:
                self.sparsifier.step()
        return loss

    def breakdown(self) -> dict[str, float]:
        """Seconds of each part, with the device waited for between them."""
        parts: dict[str, Callable[[], Any]] = {"forward and backward": self.forward_backward}
        if self.sparsifier is not None:
            parts["gradients corrected"] = self.sparsifier.correct_gradients
        parts["optimizer"] = self.optimizer.step
        if self.sparsifier is not None:
            parts["masks"] = self.sparsifier.step
        with spartan.backend(self.backend):
            return seconds_of(parts, self.device.synchronize)

    def check(self, loss: Tensor) -> None:
        if not math.isfinite(float(loss)):
            raise AssertionError(f"the loss is {float(loss)}")


def step(s: Settings, method: Method) -> Work:
    """One step; its graph holds the schedule of the step that was captured, which does not change its time."""
    trainer = _Trainer(s, method)
    for _ in range(2):  # the optimizer makes its state
        trainer.step()
    return Work(
        ours=trainer.step,
        operands=[()],
        check=trainer.check,
        bytes=0,
        breakdown=trainer.breakdown,
        notes={"weights": float(trainer.weights), "batch": float(len(trainer.x))},
    )
