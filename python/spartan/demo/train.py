"""One training run: model, optimizer and sparsifier, stepped over shuffled batches held in memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spartan.methods import Dense, Method
from spartan.saving.packing import to_block_sparse
from spartan.sparsifier import Sparsifier
from spartan.training.images import ImageData
from spartan.training.learning_rate import warmup_cosine
from spartan.training.models import MODELS

EVALUATION_BATCH = 1000
INFERENCE_PAIRS = 15


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, learning rate up over `warmup` of the steps, then along a cosine."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: float = 0.1

    def steps_per_epoch(self, examples: int) -> int:
        """Full batches in an epoch."""
        return examples // self.batch_size

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Give the learning rate of step `step` of `total_steps`."""
        return warmup_cosine(step, total_steps, self.learning_rate, self.warmup)


class Training:
    """A fresh model with optimizer and sparsifier; its seed gives its weights and the order of batches."""

    def __init__(self, model: str, method: Method, data: ImageData, recipe: Recipe, seed: int) -> None:
        per_epoch = recipe.steps_per_epoch(len(data.train_labels))
        if per_epoch < 1:
            raise ValueError(
                f"batch_size {recipe.batch_size} is larger than the {len(data.train_labels)} training images"
            )
        torch.manual_seed(seed)
        self.data, self.recipe, self.seed = data, recipe, seed
        self.steps_per_epoch, self.total_steps = per_epoch, per_epoch * recipe.epochs
        self.model: nn.Module = MODELS[model](data.side, data.classes)
        self.sparsifier = Sparsifier(self.model, method, total_steps=self.total_steps, count="masked")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.step = 0
        self.step_seconds: list[float] = []
        self.mask_seconds: list[float] = []

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches from the present step on; the order in an epoch depends on seed and epoch alone."""
        while self.step < self.total_steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            order = self.data.order(self.seed, epoch)
            for _ in range(position, self.steps_per_epoch):
                start = (self.step % self.steps_per_epoch) * self.recipe.batch_size
                chosen = order[start : start + self.recipe.batch_size]
                yield self.data.train_images[chosen], self.data.train_labels[chosen]

    def train_step(self, images: Tensor, labels: Tensor) -> float:
        """One step; the seconds it took, and those of them in the sparsifier, are kept.

        The sparsifier is called by hand to be timed; `sparsifier.attach(optimizer)` does the same by hooks.
        """
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step, self.total_steps)
        self.model.train()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        before = time.perf_counter()
        self.sparsifier.correct_gradients()
        corrected = time.perf_counter()
        self.optimizer.step()
        stepped = time.perf_counter()
        self.sparsifier.step(self.optimizer)
        updated = time.perf_counter()
        self.optimizer.zero_grad()
        self.step += 1
        self.step_seconds.append(time.perf_counter() - start)
        self.mask_seconds.append(corrected - before + updated - stepped)
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if never interrupted."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "rng": torch.get_rng_state(),
            "step_seconds": self.step_seconds,
            "mask_seconds": self.mask_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of a run with the same settings."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        self.step_seconds, self.mask_seconds = list(state["step_seconds"]), list(state["mask_seconds"])


class DenseProbe:
    """A dense twin that takes a few steps now and then during a run, to compare step times side by side."""

    EVERY = 40
    STEPS = 3  # the first brings the twin's weights into the cache and is not counted
    NEIGHBOURS = 8

    def __init__(self, model: str, data: ImageData, recipe: Recipe, seed: int) -> None:
        self.twin = Training(model, Dense(), data, recipe, seed)
        self.ratios: list[float] = []

    def visit(self, training: Training, images: Tensor, labels: Tensor) -> None:
        """If it is time to, take dense steps on this batch and compare them with the run's last ones."""
        if training.step % self.EVERY != self.EVERY // 2:
            return
        for _ in range(self.STEPS):
            self.twin.train_step(images, labels)
        run, dense = training.step_seconds[-self.NEIGHBOURS :], self.twin.step_seconds[1 - self.STEPS :]
        self.ratios.append(statistics.median(run) / statistics.median(dense))

    def ratio(self) -> float | None:
        """Median of the pairs; None if the run was too short for one."""
        return statistics.median(self.ratios) if self.ratios else None


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    """Fraction of the test images classified rightly."""
    model.eval()
    batches = zip(
        torch.split(data.test_images, EVALUATION_BATCH),
        torch.split(data.test_labels, EVALUATION_BATCH),
        strict=True,
    )
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches) / len(data.test_labels)


@torch.no_grad()
def inference_ratio(model: nn.Module, data: ImageData, block: int) -> float:
    """Time of a batch of test images with the linear layers on packed blocks, over that of `model` as it is.

    Raises:
        ValueError: the packed model does not compute what the model computes.
    """
    packed = to_block_sparse(copy.deepcopy(model), block)
    images = data.test_images[:EVALUATION_BATCH]
    contestants = (model.eval(), packed.eval())
    expected, found = (network(images) for network in contestants)
    error = float((found - expected).abs().max())
    if not error <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise ValueError(f"the packed model's logits differ by {error:g} from the model's")
    ratios = []
    for _ in range(INFERENCE_PAIRS):
        seconds = []
        for network in contestants:
            start = time.perf_counter()
            network(images)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def train(
    training: Training,
    after_step: Callable[[Training, float], bool] = lambda training, loss: True,
    probe: DenseProbe | None = None,
) -> bool:
    """Train to the end, or until `after_step(training, loss)` returns False; whether the end was reached."""
    for images, labels in training.batches():
        if probe is not None:
            probe.visit(training, images, labels)
        if not after_step(training, training.train_step(images, labels)):
            return training.step == training.total_steps
    return True
