"""How examples of this folder train a model on images or text."""

from __future__ import annotations

import torch
from torch import nn

from spartan.training.tasks import Slice, Task

WARM_UP = 0.1  # of the steps


def train(model: nn.Module, task: Task, steps: int, batch: int, learning_rate: float, seed: int) -> None:
    """AdamW, whose rate rises and falls linearly; batches depend on the seed alone."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), (1 - step / steps) / (1 - WARM_UP), 1)
    )
    for step in range(steps):
        loss = task.loss(model, *task.batch(step, batch, seed, Slice()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def held_out(model: nn.Module, task: Task) -> tuple[float, float]:
    """Mean loss in nats, and percent of right predictions, on what is held out."""
    loss, right, count = task.score(model, torch.device("cpu"), Slice()).tolist()
    return loss / count, 100 * right / count
