"""What the accuracy table trains: models, their data, and how one is trained from a seed to its figure of merit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

import torch

from spartan.demo.plan import FULL
from spartan.demo.train import Recipe, Training, accuracy, train
from spartan.methods import Method
from spartan.sparsifier import hidden_matrices, kept_fractions
from spartan.training.config import Config, config_from
from spartan.training.images import ImageData
from spartan.training.interrupt import StopRequest
from spartan.training.progress import Progress
from spartan.training.tasks import ImageTask, Task, make_task
from spartan.training.trainer import Trainer
from spartan.training.workers import Workers

NORMALISED, PLAIN = "MLP", "MLP without normalisation"
TRANSFORMER, LANGUAGE = "ViT 256×4", "Byte-level language model"
CONVOLUTIONAL, CONVOLUTIONAL_FLOPS = "Residual CNN", "Residual CNN, by FLOPs"

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Subject(ABC):
    """A model of the table: what it is, in words, how it is trained, and what a sparsity is a fraction of."""

    what: str
    removed: str = field(default="zeros", kw_only=True)

    @abstractmethod
    def measure(self, method: Method, data: ImageData, seed: int, epochs: int | None = None) -> Outcome:
        """Train once, over `epochs` instead of its own if given: steps, zeros really there, figures of merit."""

    @abstractmethod
    def description(self, epochs: int | None = None) -> dict[str, Any]:
        """What makes one file's runs of this model comparable, as plain types."""


@dataclass(frozen=True)
class Demonstrated(Subject):
    """Trained as the demonstration trains it."""

    model: str
    recipe: Recipe

    def measure(self, method: Method, data: ImageData, seed: int, epochs: int | None = None) -> Outcome:
        """Train with AdamW without clipping."""
        training = Training(self.model, method, data, self._recipe(epochs), seed)
        train(training)
        training.sparsifier.finalize()
        _, zeros = kept_fractions(training.model, hidden_matrices(training.model))
        return {
            "steps": training.total_steps,
            "measured_sparsity": zeros,
            "accuracy": accuracy(training.model, data),
        }

    def description(self, epochs: int | None = None) -> dict[str, Any]:
        """What, and the recipe."""
        return {"what": self.what, "recipe": asdict(self._recipe(epochs))}

    def _recipe(self, epochs: int | None) -> Recipe:
        return self.recipe if epochs is None else replace(self.recipe, epochs=epochs)


@dataclass(frozen=True)
class Configured(Subject):
    """Trained as `spartan train` does; `settings` are those of its YAML file, without method and seed.

    Attributes:
        epochs: what the settings' `steps` count as, where another number of epochs is asked for.
    """

    settings: dict[str, Any] = field(hash=False)
    epochs: int

    def measure(self, method: Method, data: ImageData, seed: int, epochs: int | None = None) -> Outcome:
        """Train from the settings; text comes from where they say, images are `data`."""
        own = {entry.name: getattr(method, entry.name) for entry in fields(cast(Any, method))}
        config = config_from(
            {
                **self._settings(epochs),
                "method": {"name": type(method).__name__, **own},
                "seed": seed,
                "checkpoint_minutes": _NEVER,
            }
        )
        task = _text(config) if config.task == "text" else ImageTask(data, config.batch_size)
        trainer = Trainer(config, task, Workers(0, 1, torch.device("cpu")))
        names = list(trainer.sparsifier.masks())
        trainer.run(StopRequest(), Progress(config.steps, 0, shown=False))
        trainer.sparsifier.finalize()
        zeros = kept_fractions(trainer.model, names)[1] if names else 0.0
        costs = trainer.sparsifier.costs().values()
        removed = {}
        if costs and config.sparsifier.costs != "parameters":
            removed["removed_cost"] = 1 - sum(cost.kept for cost in costs) / sum(cost.dense for cost in costs)
        return {"steps": config.steps, "measured_sparsity": zeros, **removed, **_merit(trainer.evaluate())}

    def description(self, epochs: int | None = None) -> dict[str, Any]:
        """What, and the settings."""
        return {"what": self.what, "recipe": self._settings(epochs)}

    def _settings(self, epochs: int | None) -> dict[str, Any]:
        if epochs is None:
            return self.settings
        return {**self.settings, "steps": max(1, self.settings["steps"] * epochs // self.epochs)}


_NEVER = 1e9  # minutes
_TASKS: dict[str, Task] = {}  # text is read once in a process


def _text(config: Config) -> Task:
    key = repr((config.data, config.model))
    if key not in _TASKS:
        _TASKS[key] = make_task(config, lambda message: None)
    return _TASKS[key]


def _merit(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("accuracy", "bits_per_byte") if name in metrics}


_PERCEPTRON = FULL.recipes["MLP"]
_CONVOLUTIONAL: dict[str, Any] = {
    "task": "images",
    "model": {"name": "cnn", "widths": [16, 32, 64], "depth": 1},
    "optimizer": {"learning_rate": 4e-3},
    "batch_size": 64,
    "steps": 937,
}
_RESIDUAL = "residual network of 78,000 parameters: a stem and 3 blocks of two 3×3 convolutions, 16, 32 and 64 channels"
SUBJECTS: dict[str, Subject] = {
    NORMALISED: Demonstrated("multilayer perceptron 784-512-256-10, batch normalisation", NORMALISED, _PERCEPTRON),
    PLAIN: Demonstrated("multilayer perceptron 784-512-256-10, no normalisation", PLAIN, _PERCEPTRON),
    TRANSFORMER: Configured(
        "vision transformer of 3.2 million parameters, 16 patches of 7×7, 4 layers of width 256",
        {
            "task": "images",
            "model": {"name": "vit", "patch": 7, "dim": 256, "depth": 4, "heads": 8, "expansion": 4},
            "sparsifier": {"include": "layers.*.weight"},
            "optimizer": {"learning_rate": 1e-3},
            "batch_size": 64,
            "steps": 1874,
        },
        epochs=2,
    ),
    LANGUAGE: Configured(
        "language model of bytes, 0.9 million parameters, 4 layers of width 128, 128 bytes of context, trained on 16 MB"
        " of the source of Python's standard library",
        {
            "task": "text",
            "model": {"name": "gpt", "context": 128, "dim": 128, "depth": 4, "heads": 4, "expansion": 4},
            "data": {"limit": 16_000_000, "evaluation_limit": 131_072},
            "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.05},
            "batch_size": 16,
            "steps": 1500,
        },
        epochs=1,
    ),
    CONVOLUTIONAL: Configured(_RESIDUAL, _CONVOLUTIONAL, epochs=1),
    CONVOLUTIONAL_FLOPS: Configured(
        f"{_RESIDUAL}; the budget is one of FLOPs",
        {**_CONVOLUTIONAL, "sparsifier": {"costs": "flops"}},
        epochs=1,
        removed="fewer FLOPs",
    ),
}
