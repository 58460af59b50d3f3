"""One task after the other with sparse weights, sparse gradients and fewer samples, beside dense rehearsal.

Fashion-MNIST, which is fetched if it is not there (`python -m spartan.demo` says how), as five tasks of two labels.
After each, the network has to tell all labels so far apart, with a few images of the tasks before in a buffer.
Needs the extra `train`.

Source: Wang et al., "SparCL: Sparse Continual Learning on the Edge", NeurIPS 2022, arXiv 2209.09476.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spartan
from spartan.functional import hard_topk_global
from spartan.training.images import ImageData, load_data

TASKS = 5
SPARSITY, GRADIENT = 0.9, 0.4  # zeros of the hidden weights; kept weights that change in a step
EASY = 0.3  # of a task's images are removed after each of its epochs but the last
BATCH, LEARNING_RATE = 32, 0.1
HIDDEN = 256


@dataclass(frozen=True)
class Scale:
    """How much is trained: images of a task, images in the buffer."""

    images: int = 3000
    epochs: int = 4
    buffer: int = 300
    interval: int = 30


@dataclass(frozen=True)
class Recipe:
    """What a row of the table does.

    Attributes:
        masks: "none", "fixed" (random, from the start) or "by task" (those of the task before, which then move).
        gradient: whether a part of the kept weights changes in a step; with masks alone.
        easy: whether easy images of a task are removed on the way.
        rehearse: whether there is a buffer.
        hidden: units of each hidden layer.
    """

    masks: str = "none"
    gradient: bool = False
    easy: bool = False
    rehearse: bool = True
    hidden: int = HIDDEN


class Buffer:
    """Some images of all that were seen, each with the same probability."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Look at images once (reservoir sampling)."""
        for image, label in zip(images, labels, strict=True):
            self.seen += 1
            if len(self.images) < self.size:
                self.images.append(image)
                self.labels.append(label)
            elif (place := int(torch.randint(self.seen, ()))) < self.size:
                self.images[place], self.labels[place] = image, label

    def draw(self) -> tuple[Tensor, Tensor]:
        """A batch."""
        index = torch.randint(len(self.images), (BATCH,)).tolist()
        return torch.stack([self.images[i] for i in index]), torch.stack([self.labels[i] for i in index])


class Learner:
    """A network that learns task after task, and counts its FLOPs."""

    def __init__(self, recipe: Recipe, scale: Scale, pixels: int) -> None:
        self.recipe, self.scale = recipe, scale
        width = recipe.hidden
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.hidden = [self.model[1].weight, self.model[3].weight]
        self.buffer = Buffer(scale.buffer)
        self.first = True
        self.flops = 0.0

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """Train on a task; the buffer gets its images at the end."""
        optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE)
        left = torch.arange(len(labels))
        sizes = [len(left)]
        for _ in range(self.scale.epochs - 1):
            sizes.append(round(sizes[-1] * (1 - EASY)) if self.recipe.easy else sizes[-1])
        sparsifier = self._sparsifier(sum(-(-size // BATCH) for size in sizes))
        if sparsifier is not None:
            sparsifier.attach(optimizer)
        hardness = torch.zeros(len(labels))
        masks: list[Tensor] | None = None
        step = 0
        for size in sizes:
            left = left[hardness[left].argsort(descending=True, stable=True)[:size]]
            for part in left[torch.randperm(size)].split(BATCH):
                step += 1
                moves = step % self.scale.interval == 0  # masks may: a step with all gradients
                optimizer.zero_grad()
                hardness[part] += self._backward(images[part], labels[part], moves, masks)
                strengths = [weight.grad.abs() for weight in self.hidden] if self.recipe.gradient and moves else None
                if strengths is None and masks is not None:
                    for weight, mask in zip(self.hidden, masks, strict=True):
                        weight.grad.mul_(mask)
                optimizer.step()
                if strengths is not None:
                    kept = sparsifier.masks().values()  # after they moved
                    masks = largest([strength * mask.hard for strength, mask in zip(strengths, kept, strict=True)])
        if sparsifier is not None:
            sparsifier.finalize()
            self.hidden = [self.model[1].weight, self.model[3].weight]
        if self.recipe.rehearse:
            self.buffer.add(images, labels)
        self.first = False

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Percentage of right labels among all ten."""
        with torch.no_grad():
            return 100 * float((self.model(images).argmax(-1) == labels).float().mean())

    def _sparsifier(self, steps: int) -> spartan.Sparsifier | None:
        """Masks of one task: after the first, they begin with the weights that are not zero."""
        if self.recipe.masks == "none":
            return None
        if self.recipe.masks == "fixed":
            method: Any = spartan.StaticRandom(sparsity=SPARSITY)
        else:
            method = spartan.RigL(sparsity=SPARSITY, interval=self.scale.interval)
        include = ["1.weight", "3.weight"]
        return spartan.Sparsifier(self.model, method, steps, include=include, count="masked", keep_zeros=not self.first)

    def _backward(self, images: Tensor, labels: Tensor, moves: bool, masks: list[Tensor] | None) -> Tensor:
        """Add the gradient of the task and of the buffer; how hard each image was: 1 and more is a mistake."""
        z = self.model(images)
        loss, count = F.cross_entropy(z, labels), len(labels)
        if self.buffer.images:
            others, known = self.buffer.draw()
            loss = loss + F.cross_entropy(self.model(others), known)
            count += len(known)
        loss.backward()
        sparse = self.recipe.masks != "none"
        kept = (1 - SPARSITY) if sparse else 1.0
        dense_gradient = moves and self.recipe.masks == "by task"
        changed = 1.0 if dense_gradient else kept * (GRADIENT if masks is not None else 1.0)
        size = sum(weight.numel() for weight in self.hidden)
        # forward, gradient of the inputs, gradient of the weights
        self.flops += 2 * count * (size * (2 * kept + changed) + 3 * self.model[5].weight.numel())
        with torch.no_grad():
            right = z.softmax(-1).gather(1, labels[:, None])[:, 0]
            return (z.argmax(-1) != labels).float() + (1 - right) / 2


def largest(gradients: list[Tensor]) -> list[Tensor]:
    """Which weights change until the masks move again: the part of the kept ones with the largest gradients."""
    total = sum(gradient.numel() for gradient in gradients)
    return hard_topk_global(gradients, GRADIENT * (1 - SPARSITY) * total)


RECIPES = {
    "dense, no buffer": Recipe(rehearse=False),
    "dense": Recipe(),
    "dense, 32 units": Recipe(hidden=32),
    "fixed masks": Recipe("fixed"),
    "masks by task": Recipe("by task"),
    "+ gradient masks": Recipe("by task", gradient=True),
    "+ fewer samples": Recipe("by task", gradient=True, easy=True),
}


def tasks(images: Tensor, labels: Tensor, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """The images of two labels each, in the order of the labels."""
    found = []
    for task in range(TASKS):
        own = (labels // 2 == task).nonzero()[:limit, 0]
        found.append((images[own], labels[own]))
    return found


def run(data: ImageData, recipe: Recipe, scale: Scale) -> dict[str, float]:
    """All tasks in turn: accuracy in the end, what was forgotten since each task's best, FLOPs."""
    learner = Learner(recipe, scale, data.side**2)
    tests = tasks(data.test_images, data.test_labels)
    history = []
    for images, labels in tasks(data.train_images, data.train_labels, scale.images):
        learner.learn(images, labels)
        history.append([learner.accuracy(*test) for test in tests])
    last = history[-1]
    lost = [max(row[task] for row in history) - last[task] for task in range(TASKS - 1)]
    return {
        "accuracy": sum(last) / TASKS,
        "forgetting": sum(lost) / len(lost),
        "flops": learner.flops / 1e9,
        "zeros": 100 * float(sum((w == 0).sum() for w in learner.hidden)) / sum(w.numel() for w in learner.hidden),
    }


def draw(axes: Any, records: list[study.Record]) -> None:
    """Accuracy against the FLOPs of training."""
    for method in dict.fromkeys(record["method"] for record in records):
        flops, right = (study.means(records, key, method=method) for key in ("flops", "accuracy"))
        axes.plot(flops, right, "o", label=method)
    axes.set(xscale="log", xlabel="FLOPs of training, billions", ylabel="accuracy on all tasks in the end, %")
    axes.legend()


def main() -> None:
    """Run every recipe over the seeds."""
    found = study.options(__doc__, data={"type": Path, "default": None, "help": "folder of the images"})
    scale = Scale(images=64, epochs=3, buffer=16, interval=2) if found.quick else Scale()
    data = load_data(found.data, print)
    about = (
        f"{data.name} as {TASKS} tasks of two labels, {scale.images} images and {scale.epochs} epochs each; a"
        f" perceptron with two hidden layers of {HIDDEN}, told which of ten labels, not which task; a buffer of"
        f" {scale.buffer} images. Masks leave {SPARSITY:.0%} zeros in the hidden weights; gradient masks change"
        f" {GRADIENT:.0%} of the others in a step; fewer samples: after an epoch the {EASY:.0%} easiest images are"
        " removed."
    )
    measures = {
        "accuracy": ("accuracy %", "{:.1f}"),
        "forgetting": ("forgetting, points", "{:.1f}"),
        "flops": ("FLOPs of training, billions", "{:.1f}"),
        "zeros": ("zeros %", "{:.0f}"),
    }
    result = study.Study("continual_learning", {"method": "method"}, measures, about)
    for seed in found.seeds:
        for method, recipe in RECIPES.items():
            torch.manual_seed(seed)
            result.add(seed, method=method, **run(data, recipe, scale))
    result.finish(found.out, draw)


if __name__ == "__main__":
    main()
