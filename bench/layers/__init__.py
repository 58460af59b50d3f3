"""Cases of the layers with sparse activations, one file each."""

from __future__ import annotations

from bench.layers import connectivity_attention, product_key_experts

__all__ = ["connectivity_attention", "product_key_experts"]
