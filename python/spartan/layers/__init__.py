"""Layers whose activations are sparse, on the operators: one file each, `nn.Module`s to put into any model."""

from __future__ import annotations

from spartan.layers.adding_memory import add_memory, load_memory_state_dict, memory_state_dict, remove_memory
from spartan.layers.block_gated_attention import BlockGatedAttention, block_gated_attention, block_maxima
from spartan.layers.block_gates import BlockGate
from spartan.layers.connectivity_attention import ConnectivityAttention
from spartan.layers.gated_attention import GatedAttention
from spartan.layers.gathered import attention_at_kept, gathered_dot, gathered_sum
from spartan.layers.hierarchical_memory import HierarchicalMemory
from spartan.layers.intervention_tokens import InterventionTokens
from spartan.layers.knapsack_gate import KnapsackGate
from spartan.layers.path_sparsity import DualAscent, causal_graph, path_sparsity
from spartan.layers.product_key_experts import ProductKeyExperts, product_key_topk
from spartan.layers.selection import kept_indices
from spartan.layers.sparse_encoder import SparseEncoder, flops_loss, to_csr
from spartan.layers.topk_attention import TopKAttention, topk_attention
from spartan.layers.topk_autoencoder import AutoencoderLoss, TopKAutoencoder, downstream_gradient

__all__ = [
    "AutoencoderLoss",
    "BlockGate",
    "BlockGatedAttention",
    "ConnectivityAttention",
    "DualAscent",
    "GatedAttention",
    "HierarchicalMemory",
    "InterventionTokens",
    "KnapsackGate",
    "ProductKeyExperts",
    "SparseEncoder",
    "TopKAttention",
    "TopKAutoencoder",
    "add_memory",
    "attention_at_kept",
    "block_gated_attention",
    "block_maxima",
    "causal_graph",
    "downstream_gradient",
    "flops_loss",
    "gathered_dot",
    "gathered_sum",
    "kept_indices",
    "load_memory_state_dict",
    "memory_state_dict",
    "path_sparsity",
    "product_key_topk",
    "remove_memory",
    "to_csr",
    "topk_attention",
]
