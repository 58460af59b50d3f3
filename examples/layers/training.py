"""How examples of this folder train a model on images or text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from spartan.training.tasks import Slice, Task

WARM_UP = 0.1  # of the steps


def train(model: nn.Module, task: Task, steps: int, batch: int, learning_rate: float, seed: int) -> None:
    """AdamW, whose rate rises and falls linearly; batches depend on the seed alone."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)

    def rate_at(step: int) -> float:
        return min((step + 1) / (WARM_UP * steps), (1 - step / steps) / (1 - WARM_UP), 1)

    take_steps(model, task, optimizer, rate_at, steps, batch, seed)


def take_steps(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    rate_at: Callable[[int], float],
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """Steps of an optimizer, whose learning rate is multiplied by `rate_at` of the step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
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
