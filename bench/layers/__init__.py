"""Cases of the layers with sparse activations, one file each."""

from __future__ import annotations

from bench.layers import knapsack_gate

__all__ = ["knapsack_gate"]
