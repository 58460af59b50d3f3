"""Cases of the layers with sparse activations, one file each."""

from __future__ import annotations

from bench.layers import topk_autoencoder

__all__ = ["topk_autoencoder"]
from bench.layers import block_gated_attention, topk_attention

__all__ = ["block_gated_attention", "topk_attention"]
from bench.layers import gated_attention

__all__ = ["gated_attention"]
from bench.layers import hierarchical_memory, sparse_encoder

__all__ = ["hierarchical_memory", "sparse_encoder"]
from bench.layers import knapsack_gate

__all__ = ["knapsack_gate"]
from bench.layers import connectivity_attention, product_key_experts

__all__ = ["connectivity_attention", "product_key_experts"]
