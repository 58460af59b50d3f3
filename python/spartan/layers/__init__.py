"""Layers whose activations are sparse, on the operators: one file each, `nn.Module`s to put into any model."""

from __future__ import annotations

from spartan.layers.topk_autoencoder import AutoencoderLoss, TopKAutoencoder, downstream_gradient

__all__ = ["AutoencoderLoss", "TopKAutoencoder", "downstream_gradient"]
from spartan.layers.block_gated_attention import BlockGatedAttention, block_gated_attention, block_maxima
from spartan.layers.block_gates import BlockGate
from spartan.layers.topk_attention import TopKAttention, topk_attention

__all__ = [
    "BlockGate",
    "BlockGatedAttention",
    "TopKAttention",
    "block_gated_attention",
    "block_maxima",
    "topk_attention",
]
from spartan.layers.gated_attention import GatedAttention, InterventionTokens
from spartan.layers.path_sparsity import DualAscent, causal_graph, path_sparsity

__all__ = ["DualAscent", "GatedAttention", "InterventionTokens", "causal_graph", "path_sparsity"]
from spartan.layers.adding_memory import add_memory, load_memory_state_dict, memory_state_dict, remove_memory
from spartan.layers.hierarchical_memory import HierarchicalMemory
from spartan.layers.sparse_encoder import SparseEncoder, flops_loss, to_csr

__all__ = [
    "HierarchicalMemory",
    "SparseEncoder",
    "add_memory",
    "flops_loss",
    "load_memory_state_dict",
    "memory_state_dict",
    "remove_memory",
    "to_csr",
]
from spartan.layers.knapsack_gate import KnapsackGate

__all__ = ["KnapsackGate"]
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
