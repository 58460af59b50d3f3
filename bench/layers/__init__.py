"""Cases of the layers with sparse activations, one file each."""

from __future__ import annotations

from bench.layers import (
    block_gated_attention,
    connectivity_attention,
    gated_attention,
    hierarchical_memory,
    knapsack_gate,
    product_key_experts,
    sparse_encoder,
    topk_attention,
    topk_autoencoder,
)

__all__ = [
    "block_gated_attention",
    "connectivity_attention",
    "gated_attention",
    "hierarchical_memory",
    "knapsack_gate",
    "product_key_experts",
    "sparse_encoder",
    "topk_attention",
    "topk_autoencoder",
]
