"""Layers whose activations are sparse, on the operators: one file each, `nn.Module`s to put into any model."""

from __future__ import annotations

from spartan.layers.gated_attention import GatedAttention
from spartan.layers.intervention_tokens import InterventionTokens
from spartan.layers.path_sparsity import DualAscent, causal_graph, path_sparsity

__all__ = ["DualAscent", "GatedAttention", "InterventionTokens", "causal_graph", "path_sparsity"]
