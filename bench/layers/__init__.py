"""Cases of the layers with sparse activations, one file each."""

from bench.layers import gated_attention

__all__ = ["gated_attention"]
