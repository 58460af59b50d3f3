"""Cases of the layers with sparse activations, one file each."""

from __future__ import annotations

from bench.layers import hierarchical_memory, sparse_encoder

__all__ = ["hierarchical_memory", "sparse_encoder"]
