"""Cases of the layers with sparse activations, one file each."""

from __future__ import annotations

from bench.layers import hierarchical_memory

__all__ = ["hierarchical_memory"]
