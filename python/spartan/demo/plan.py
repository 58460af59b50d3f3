"""Which runs the demonstration makes, and how each model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spartan.demo.train import Recipe
from spartan.methods import GMP, Dense, Method, OneShot, Spartan

# (sparsity, block size), each trained with Spartan and with one-shot magnitude pruning
SPARSITIES = ((0.90, 1), (0.95, 1), (0.98, 1), (0.90, 16))


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    model: str
    method: str
    sparsity: float = 0.0
    block: int = 1

    @property
    def key(self) -> str:
        """Name of the run's folder."""
        if self.method == "Dense":
            return f"{self.model}-dense".lower()
        blocks = "" if self.block == 1 else f"-block{self.block}"
        return f"{self.model}-{self.method}-{round(100 * self.sparsity)}{blocks}".lower().replace(" ", "-")

    @property
    def label(self) -> str:
        """Name of the run on screen."""
        if self.method == "Dense":
            return f"{self.model} Dense"
        blocks = "" if self.block == 1 else f" {self.block}x{self.block}"
        return f"{self.model} {self.method} {self.sparsity:.0%}{blocks}"

    def build(self) -> Method:
        """Make the training method, with its defaults.

        Raises:
            ValueError: `method` is none of the demonstration's.
        """
        sparse: dict[str, Any] = {"sparsity": self.sparsity, "block_size": self.block}
        if self.method == "Dense":
            return Dense()
        if self.method == "Spartan":
            return Spartan(**sparse)
        if self.method == "One-shot":
            return OneShot(**sparse)
        if self.method == "GMP":
            return GMP(**sparse)
        raise ValueError(f"method must be Dense, Spartan, One-shot or GMP; got {self.method!r}")


@dataclass(frozen=True)
class Plan:
    """Runs in order, a recipe per model, and how many of the training images to use (None: all)."""

    runs: tuple[Run, ...]
    recipes: dict[str, Recipe]
    training_images: int | None = None


def _runs(model: str) -> tuple[Run, ...]:
    sparse = [Run(model, method, *target) for method in ("Spartan", "One-shot") for target in SPARSITIES]
    return (Run(model, "Dense"), *sparse)


FULL = Plan(
    runs=_runs("MLP") + _runs("ViT"),
    recipes={
        "MLP": Recipe(epochs=8, batch_size=256, learning_rate=2e-3),
        "ViT": Recipe(epochs=3, batch_size=128, learning_rate=3e-3),
    },
)
QUICK = Plan(
    runs=FULL.runs,
    recipes={
        "MLP": Recipe(epochs=4, batch_size=128, learning_rate=2e-3),
        "ViT": Recipe(epochs=3, batch_size=128, learning_rate=3e-3),
    },
    training_images=6_000,
)
