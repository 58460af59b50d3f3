"""Powerpropagation: the optimizer trains a root of the weights, so that large ones grow and small ones stay small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spartan.masks import MaskSet
from spartan.methods.base import Method, SparseMethod, require_number

__all__ = ["Powerpropagation"]


@dataclass(frozen=True)
class Powerpropagation(Method):
    """Train phi in theta = phi |phi|^(alpha - 1), with any method that chooses masks for theta.

    dL/dphi = dL/dtheta alpha |phi|^(alpha - 1), phi = sign(theta) |theta|^(1 / alpha). Weights, masks, gradients that
    the method corrects, and checkpoints are those of theta; only while the optimizer steps are the weights and their
    gradients those of phi, so momentum, moments and weight decay act there. The initial weights are kept as they are.

    Attach the optimizer before other hooks that read weights in its steps; driven by hand it is refused, as a step
    that is skipped could not be told.

    Args:
        method: chooses the masks; not one that grows weights from zero, where the gradient of phi is zero
            (`IHT`, `WGSEF`, `SET`, `RigL`, `GSE`).
        alpha: the power, at least 1; 1 changes nothing.

    Raises:
        TypeError: a method without masks. ValueError: a method that grows weights from zero, alpha below 1;
            `Sparsifier.correct_gradients` by hand.

    Source: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", NeurIPS 2021,
    arXiv 2110.00296, equations (1) and (2).
    """

    method: SparseMethod
    alpha: float = 2.0

    one_optimizer = True

    def __post_init__(self) -> None:
        if not isinstance(self.method, SparseMethod):
            raise TypeError(f"method must be one with masks, such as GMP(sparsity=0.9); got {self.method!r}")
        if self.method.grows_from_zero:
            raise ValueError(
                "method must not grow weights from zero, where the gradient of powerpropagation is zero;"
                f" got {self.method!r}"
            )
        require_number("alpha", self.alpha, 1.0)

    @property
    def masking(self) -> SparseMethod:
        """The method that chooses the masks."""
        return self.method

    def settings(self) -> dict[str, Any]:
        """The settings as plain types, for checkpoints."""
        return {"alpha": self.alpha, "method": self.method.name, "settings": self.method.settings()}

    def beta_at(self, step: int, total_steps: int) -> float | None:
        """That of the method."""
        return self.method.beta_at(step, total_steps)

    def shortfall(self, total_steps: int) -> str | None:
        """That of the method."""
        return self.method.shortfall(total_steps)

    def start(self, masks: MaskSet) -> None:
        """As the method does."""
        self.method.start(masks)

    def resume(self, masks: MaskSet) -> None:
        """As the method does."""
        self.method.resume(masks)

    @property
    def takes_shards(self) -> bool:  # type: ignore[override]
        """As the method does."""
        return self.method.takes_shards

    def correct_gradients(self, masks: MaskSet) -> None:
        """Correct the gradients as the method does, then give the optimizer phi and its gradient."""
        if not masks.optimizers:
            raise ValueError(
                "Powerpropagation changes the weights for as long as the optimizer steps: use attach(optimizer)"
            )
        self.method.correct_gradients(masks)
        with torch.no_grad():
            for tensor in masks.tensors:
                weight, grad = tensor.values, tensor.gradient
                root = weight.abs().pow_(1 / self.alpha)
                if grad is not None:
                    grad.mul_(root.pow(self.alpha - 1).mul_(self.alpha))
                weight.copy_(root.copysign_(weight))

    def update(self, masks: MaskSet) -> None:
        """Take the weights back from phi, then update the masks as the method does."""
        for tensor in masks.tensors:
            weight = tensor.values
            weight.copy_(weight.abs().pow_(self.alpha).copysign_(weight))
        self.method.update(masks)

    def finish(self, masks: MaskSet) -> None:
        """As the method does."""
        self.method.finish(masks)
