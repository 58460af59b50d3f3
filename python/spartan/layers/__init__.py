"""Layers whose activations are sparse, on the operators: one file each, `nn.Module`s to put into any model."""

from __future__ import annotations

from spartan.layers.knapsack_gate import KnapsackGate

__all__ = ["KnapsackGate"]
