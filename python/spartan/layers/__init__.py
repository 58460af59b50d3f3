"""Layers whose activations are sparse, on the operators: one file each, `nn.Module`s to put into any model."""

from __future__ import annotations

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
