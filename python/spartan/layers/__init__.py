"""Layers whose activations are sparse, on the operators: one file each, `nn.Module`s to put into any model."""

from __future__ import annotations

from spartan.layers.connectivity_attention import ConnectivityAttention
from spartan.layers.gathered import attention_at_kept, gathered_dot, gathered_sum
from spartan.layers.product_key_experts import ProductKeyExperts, product_key_topk

__all__ = [
    "ConnectivityAttention",
    "ProductKeyExperts",
    "attention_at_kept",
    "gathered_dot",
    "gathered_sum",
    "product_key_topk",
]
