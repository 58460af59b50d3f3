"""Small runs of `spartan train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_images import write_set

from spartan.training.config import Config, config_from
from spartan.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
METHOD = {"name": "Spartan", "sparsity": 0.8, "beta": 4, "beta_units": "threshold"}


def image_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A perceptron on a few images of 8x8, in `folder` with all it leaves; one thread, so that results are the same."""
    if not (folder / "data").exists():
        write_set(folder / "data", train=64, test=20)
    settings: dict[str, Any] = {
        "task": "images",
        "model": {"name": "mlp", "hidden": [24, 16]},
        "method": METHOD,
        "data": {"folder": str(folder / "data")},
        "steps": STEPS,
        "batch_size": 16,
        "threads": 1,
        "device": "cpu",
        "evaluate_every": 8,
        "out": str(folder / "run"),
    }
    return {**settings, **changes}


def text_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A transformer on a few files of text."""
    (folder / "text").mkdir(exist_ok=True)
    for index in range(4):
        (folder / "text" / f"{index}.txt").write_text(f"line {index} of many lines.\n" * 20)
    settings: dict[str, Any] = {
        "task": "text",
        "model": {"name": "gpt", "context": 16, "dim": 16, "depth": 1, "heads": 2},
        "method": METHOD,
        "data": {"folder": str(folder / "text"), "pattern": "*.txt"},
        "optimizer": {"learning_rate": 1e-2},
    }
    return {**image_settings(folder), "evaluate_every": None, **settings, **changes}


def config(settings: dict[str, Any]) -> Config:
    """Its `Config`."""
    return config_from(settings)


def saved_model(settings: dict[str, Any]) -> dict[str, bytes]:
    """Every bit of the tensors that a run saved, by name."""
    parts = load_file(Path(settings["out"]) / "model" / "model.safetensors")
    return {name: part.numpy().tobytes() for name, part in sorted(parts.items())}


def stop_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in a step."""
    original = Trainer._train_step

    def train_step(self: Trainer, examined: bool) -> torch.Tensor:
        if self.step == step:
            os.kill(os.getpid(), number)
        return original(self, examined)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


def environment() -> dict[str, str]:
    """Of a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "OMP_NUM_THREADS": "1"}
